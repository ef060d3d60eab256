//! Kubernetes quantities: `500m`, `0.5`, `64Mi`, `1e3`.
//!
//! Source: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>.

use crate::{
    decode::{Cursor, shorten},
    pod::Resources,
};

/// Reads `resources`: `limits` count; `requests` are checked and have no effect, for nothing is scheduled by them.
pub(super) fn resources(cursor: &Cursor<'_>) -> Resources {
    let mut fields = cursor.fields();
    let limits = fields.get("limits").map(|limits| amounts(&limits));
    if let Some(requests) = fields.get("requests") {
        amounts(&requests);
        requests.warn("has no effect in Heddle: only limits are applied");
    }
    fields.finish();
    limits.unwrap_or_default()
}

fn amounts(cursor: &Cursor<'_>) -> Resources {
    let mut fields = cursor.fields();
    let cpu = fields.get("cpu");
    let memory = fields.get("memory");
    fields.finish();
    Resources {
        cpu_millis: cpu.and_then(|cpu| amount(&cpu, 1_000, "CPUs such as 2, 0.5 or 500m")),
        memory_bytes: memory.and_then(|memory| amount(&memory, 1, "bytes such as 64Mi or 1G")),
    }
}

/// The quantity in units of 1/`parts`, rounded up, more than nothing.
fn amount(cursor: &Cursor<'_>, parts: u128, expected: &str) -> Option<u64> {
    let text = cursor.number_text().or_else(|| cursor.text())?;
    let amount = parse(text, parts);
    if amount.is_none_or(|amount| amount == 0) {
        let found = shorten(text);
        cursor.error(format!("{found} is not a quantity above 0"), expected);
        return None;
    }
    amount
}

/// `text` times `parts`, rounded up.
fn parse(text: &str, parts: u128) -> Option<u64> {
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.len() > 18 || fraction.contains('.') {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let fraction_digits = u32::try_from(fraction.len()).ok()?;
    let (multiplier, exponent) = scale(suffix)?;
    let mut numerator = digits.checked_mul(multiplier)?.checked_mul(parts)?;
    let mut denominator = 10_u128.checked_pow(fraction_digits)?;
    let power = 10_u128.checked_pow(exponent.unsigned_abs())?;
    if exponent >= 0 {
        numerator = numerator.checked_mul(power)?;
    } else {
        denominator = denominator.checked_mul(power)?;
    }
    u64::try_from(numerator.div_ceil(denominator)).ok()
}

/// What a suffix multiplies by: a factor and a power of ten.
fn scale(suffix: &str) -> Option<(u128, i32)> {
    if let Some(exponent) = suffix
        .strip_prefix(['e', 'E'])
        .filter(|rest| !rest.is_empty())
    {
        return Some((
            1,
            exponent
                .parse()
                .ok()
                .filter(|power: &i32| power.abs() <= 24)?,
        ));
    }
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn quantities() {
        for (text, parts, expected) in [
            ("500m", 1_000, Some(500)),
            ("0.5", 1_000, Some(500)),
            ("1", 1_000, Some(1_000)),
            ("1.5", 1_000, Some(1_500)),
            ("100u", 1_000, Some(1)),
            ("64Mi", 1, Some(64 << 20)),
            ("1G", 1, Some(1_000_000_000)),
            ("1.5Gi", 1, Some(3 << 29)),
            ("1e3", 1, Some(1_000)),
            ("1E", 1, Some(1_000_000_000_000_000_000)),
            ("99E", 1, None),
            ("", 1, None),
            (".", 1, None),
            ("-1", 1, None),
            ("1.2.3", 1, None),
            ("64MB", 1, None),
            ("1e99", 1, None),
        ] {
            assert_eq!(parse(text, parts), expected, "{text}");
        }
    }
}
