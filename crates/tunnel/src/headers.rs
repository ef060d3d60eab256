//! What a `CONNECT` says about the connection that it carries: where to, for whom, and within which trace.
//!
//! Sources: RFC 9113, section 8.5 (CONNECT), RFC 7239 (Forwarded), W3C Trace Context and Baggage.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, header::FORWARDED};

use crate::ConnectError;

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Longest name that DNS has (RFC 1035).
const MAX_HOST: usize = 253;
/// Longest value of `baggage` and `traceparent` that is passed on; a longer one is left out.
const MAX_VALUE: usize = 4096;

/// Where a tunnelled connection goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An address and port.
    Address(SocketAddr),
    /// A host name and port.
    Host {
        /// The name, in lower case.
        name: Box<str>,
        /// The port.
        port: u16,
    },
}

/// The text is no `ip:port` and no `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no `ip:port` or `host:port`")]
pub struct AuthorityError;

impl FromStr for Authority {
    type Err = AuthorityError;

    fn from_str(text: &str) -> Result<Self, AuthorityError> {
        let (host, port) = text.rsplit_once(':').ok_or(AuthorityError)?;
        if port.is_empty() || port.len() > 5 || !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(AuthorityError);
        }
        let port: u16 = port.parse().map_err(|_| AuthorityError)?;
        if port == 0 {
            return Err(AuthorityError);
        }
        if let Some(address) = host.strip_prefix('[') {
            let address: Ipv6Addr = address
                .strip_suffix(']')
                .and_then(|address| address.parse().ok())
                .ok_or(AuthorityError)?;
            return Ok(Self::Address((address, port).into()));
        }
        // Digits and dots alone are meant as an address; one that is none must not pass as a name.
        if host
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'.')
        {
            let address: IpAddr = host.parse().map_err(|_| AuthorityError)?;
            return Ok(Self::Address((address, port).into()));
        }
        let label = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        if host.len() > MAX_HOST || !host.split('.').all(label) {
            return Err(AuthorityError);
        }
        Ok(Self::Host {
            name: host.to_ascii_lowercase().into(),
            port,
        })
    }
}

impl From<SocketAddr> for Authority {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(SocketAddr::V4(address)) => write!(f, "{address}"),
            // Without a scope, which is a matter of one machine.
            Self::Address(SocketAddr::V6(address)) => {
                write!(f, "[{}]:{}", address.ip(), address.port())
            }
            Self::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

/// The headers that go with a `CONNECT`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConnectHeaders {
    /// Whose connection it is that is carried: `for` of `forwarded`.
    pub forwarded_for: Option<SocketAddr>,
    /// The name that the client asked for: `host` of `forwarded`.
    pub forwarded_host: Option<String>,
    /// Who calls, as `key=value,…`.
    pub baggage: Option<String>,
    /// The trace that the connection belongs to.
    pub traceparent: Option<String>,
}

impl ConnectHeaders {
    /// Reads them. What is missing, malformed or too long is left out: none of it is a reason to refuse.
    #[must_use]
    pub fn read(headers: &HeaderMap) -> Self {
        let text = |name: &HeaderName| {
            let value = headers.get(name)?.to_str().ok()?;
            (value.len() <= MAX_VALUE).then(|| value.to_owned())
        };
        let forwarded = headers.get(FORWARDED).and_then(|value| value.to_str().ok());
        let (forwarded_for, forwarded_host) = forwarded.map(parse_forwarded).unwrap_or_default();
        Self {
            forwarded_for,
            forwarded_host,
            baggage: text(&BAGGAGE),
            traceparent: text(&TRACEPARENT),
        }
    }

    /// The whole request to connect to `authority`.
    pub(crate) fn request(&self, authority: &Authority) -> Result<Request<()>, ConnectError> {
        let authority = authority.to_string();
        let uri = Uri::builder()
            .authority(authority.as_str())
            .build()
            .map_err(|_| ConnectError::Header(authority))?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        let mut put = |name, value: &str| {
            let value = HeaderValue::from_str(value)
                .map_err(|_| ConnectError::Header(value.chars().take(80).collect()))?;
            headers.insert(name, value);
            Ok::<_, ConnectError>(())
        };
        if let Some(value) = write_forwarded(self.forwarded_for, self.forwarded_host.as_deref()) {
            put(FORWARDED, &value)?;
        }
        if let Some(baggage) = &self.baggage {
            put(BAGGAGE, baggage)?;
        }
        if let Some(traceparent) = &self.traceparent {
            put(TRACEPARENT, traceparent)?;
        }
        Ok(request)
    }
}

/// What HTTP/2 counts as the size of a header list (RFC 9113, section 6.5.2).
pub(crate) fn list_size(headers: &HeaderMap) -> usize {
    let sizes = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 32);
    sizes.sum()
}

fn write_forwarded(address: Option<SocketAddr>, host: Option<&str>) -> Option<String> {
    let address = address.map(|address| format!("for=\"{}\"", Authority::Address(address)));
    let host = host.map(|host| {
        let plain = !host.is_empty()
            && host
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if plain {
            format!("host={host}")
        } else {
            format!(
                "host=\"{}\"",
                host.replace('\\', "\\\\").replace('"', "\\\"")
            )
        }
    });
    match (address, host) {
        (Some(address), Some(host)) => Some(format!("{address};{host}")),
        (Some(one), None) | (None, Some(one)) => Some(one),
        (None, None) => None,
    }
}

/// `for` and `host` of the first element (the one nearest to the client) of a `forwarded` header.
fn parse_forwarded(value: &str) -> (Option<SocketAddr>, Option<String>) {
    let mut rest = value;
    let (mut address, mut host) = (None, None);
    while let Some((name, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => match unquote(quoted) {
                Some(found) => found,
                None => break,
            },
            None => {
                let end = after.find([';', ',']).unwrap_or(after.len());
                (after[..end].trim().to_owned(), &after[end..])
            }
        };
        match name.trim().to_ascii_lowercase().as_str() {
            "for" => address = value.parse().ok(),
            "host" => host = Some(value),
            _ => {}
        }
        match after.trim_start().strip_prefix(';') {
            Some(next) => rest = next,
            None => break,
        }
    }
    (address, host)
}

/// The text of a quoted string after its opening quote, and what follows the closing one.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests;
