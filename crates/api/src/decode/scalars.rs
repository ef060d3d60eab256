//! Single values: texts, numbers, durations, choices, addresses.

use std::{net::IpAddr, ops::RangeInclusive, time::Duration};

use ipnet::IpNet;

use super::{Cursor, closest, one_of, shorten};
use crate::yaml::Value;

impl<'a> Cursor<'a> {
    /// A text. Numbers and booleans are not: Kubernetes refuses them, and `1.10` would lose its zero.
    pub(crate) fn string(&self) -> String {
        self.text().unwrap_or_default().to_owned()
    }

    /// A text that is not empty and has no NUL, so that it can be passed to a program.
    pub(crate) fn argument(&self) -> String {
        let text = self.text().unwrap_or_default();
        if text.contains('\0') {
            self.error("holds a NUL character", "a text without NUL");
        }
        text.to_owned()
    }

    /// The text, reported and `None` if it is none.
    pub(crate) fn text(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::String(text) => Some(text),
            Value::Number(text) => {
                self.mismatch(&format!("a string: quote it, \"{text}\""));
                None
            }
            Value::Bool(value) => {
                self.mismatch(&format!("a string: quote it, \"{value}\""));
                None
            }
            _ => {
                self.mismatch("a string");
                None
            }
        }
    }

    /// A text that is not empty.
    pub(crate) fn non_empty(&self, expected: &str) -> Option<&'a str> {
        let text = self.text()?;
        if text.is_empty() {
            self.error("is empty", expected);
            return None;
        }
        Some(text)
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&self) -> bool {
        match &self.node.value {
            Value::Bool(value) => *value,
            _ => {
                self.mismatch("true or false");
                false
            }
        }
    }

    /// A whole number within `range`; its lower end if it is none.
    pub(crate) fn integer(&self, range: RangeInclusive<u32>) -> u32 {
        let least = *range.start();
        self.whole_number(range).unwrap_or(least)
    }

    fn whole_number(&self, range: RangeInclusive<u32>) -> Option<u32> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        let Value::Number(text) = &self.node.value else {
            self.mismatch(&expected);
            return None;
        };
        let number = integer(text).and_then(|number| u32::try_from(number).ok());
        let fitting = number.filter(|number| range.contains(number));
        if fitting.is_none() {
            self.error(format!("{text} is not possible here"), expected);
        }
        fitting
    }

    /// A port number; 0 if it is none.
    pub(crate) fn port(&self) -> u16 {
        let port = self.whole_number(1..=u32::from(u16::MAX));
        port.and_then(|port| u16::try_from(port).ok()).unwrap_or(0)
    }

    /// A port number as a text, the way Istio writes ports.
    pub(crate) fn port_text(&self) -> u16 {
        let Some(text) = self.text() else {
            return 1;
        };
        match port(text) {
            Some(port) => port,
            None => {
                let found = shorten(text);
                self.error(
                    format!("{found} is not a port"),
                    "a port from \"1\" to \"65535\"",
                );
                1
            }
        }
    }

    /// Seconds, fractions allowed.
    pub(crate) fn seconds(&self, range: RangeInclusive<f64>) -> Duration {
        let expected = format!("seconds from {} to {}", range.start(), range.end());
        let Value::Number(text) = &self.node.value else {
            self.mismatch(&expected);
            return Duration::ZERO;
        };
        match text.parse::<f64>() {
            Ok(seconds) if range.contains(&seconds) => Duration::from_secs_f64(seconds),
            _ => {
                self.error(format!("{text} is not possible here"), expected);
                Duration::ZERO
            }
        }
    }

    /// One of a few words.
    pub(crate) fn choice<T: Copy>(&self, choices: &[(&'static str, T)]) -> Option<T> {
        let text = self.text()?;
        if let Some((_, value)) = choices.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let mut message = format!("unknown value {}", shorten(text));
        if let Some(meant) = closest(text, &words) {
            message.push_str(&format!(", did you mean `{meant}`?"));
        }
        self.error(message, one_of(&words));
        None
    }

    /// An IP address.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        let text = self.text()?;
        let address = text.parse().ok();
        if address.is_none() {
            let found = shorten(text);
            self.error(
                format!("{found} is not an IP address"),
                "an IPv4 or IPv6 address",
            );
        }
        address
    }

    /// An address range, or a single address, which stands for the range of just that one.
    pub(crate) fn ip_block(&self) -> IpNet {
        let text = self.text().unwrap_or("0.0.0.0/0");
        let net = text
            .parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        match net {
            Ok(net) => net.trunc(),
            Err(_) => {
                let found = shorten(text);
                let message = format!("{found} is neither an address range nor an address");
                self.error(message, "such as 10.0.0.0/8, 10.1.2.3 or fd00::/8");
                IpNet::from(IpAddr::from([0, 0, 0, 0]))
            }
        }
    }

    /// An absolute path without `..` and NUL.
    pub(crate) fn absolute_path(&self) -> String {
        let Some(text) = self.text() else {
            return String::new();
        };
        let clean = text.starts_with('/')
            && !text.contains('\0')
            && !text.split('/').any(|part| part == "..");
        if !clean {
            let found = shorten(text);
            let expected = "a path that starts with `/` and has no `..`";
            self.error(format!("{found} is not an absolute path"), expected);
        }
        text.to_owned()
    }

    /// The number's text, if this is one.
    pub(crate) fn number_text(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::Number(text) => Some(text),
            _ => None,
        }
    }
}

/// A port number written as a plain decimal.
pub(crate) fn port(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| plain && *port > 0)
}

/// A whole number in any of YAML's notations; `8.0` and `1e3` count as whole.
fn integer(text: &str) -> Option<i64> {
    if let Some(octal) = text.strip_prefix("0o") {
        return i64::from_str_radix(octal, 8).ok();
    }
    if let Some(hexadecimal) = text.strip_prefix("0x") {
        return i64::from_str_radix(hexadecimal, 16).ok();
    }
    text.parse().ok().or_else(|| {
        let float: f64 = text.parse().ok()?;
        // Below 2^53 every whole number is exact.
        let whole = float.fract() == 0.0 && float.abs() < 9.0e15;
        #[allow(clippy::cast_possible_truncation)]
        whole.then_some(float as i64)
    })
}
