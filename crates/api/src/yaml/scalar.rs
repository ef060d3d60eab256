//! Which value a scalar's text stands for: YAML 1.2.2, section 10.3.2 (core schema).

use saphyr_parser::{ScalarStyle, Tag};

use super::Value;

/// The value of `text`; `Err` says why its tag does not fit.
pub(super) fn resolve(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Result<Value, String> {
    let Some(tag) = tag else {
        return Ok(match style {
            ScalarStyle::Plain => plain(text),
            _ => Value::String(text.to_owned()),
        });
    };
    let suffix = match (tag.handle.as_str(), tag.suffix.as_str()) {
        ("", "!") | ("!", "") => "str",
        ("tag:yaml.org,2002:", suffix) => suffix,
        _ => return Err(unsupported(tag)),
    };
    let value = plain(text);
    let fits = match (suffix, &value) {
        ("str", _) => return Ok(Value::String(text.to_owned())),
        ("null", Value::Null) | ("bool", Value::Bool(_)) | ("float", Value::Number(_)) => true,
        ("int", Value::Number(number)) => is_integer(number),
        ("null" | "bool" | "float" | "int", _) => false,
        _ => return Err(unsupported(tag)),
    };
    if fits {
        return Ok(value);
    }
    let article = if suffix == "int" { "an" } else { "a" };
    Err(format!(
        "`{text}` is not {article} {suffix}, as its tag says"
    ))
}

/// What is said of a tag outside the core schema.
pub(super) fn unsupported(tag: &Tag) -> String {
    let (handle, suffix) = (&tag.handle, &tag.suffix);
    format!("the tag {handle}{suffix} is not supported")
}

fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ if is_integer(text) || is_float(text) => Value::Number(text.to_owned()),
        _ => Value::String(text.to_owned()),
    }
}

/// `[-+]? [0-9]+`, `0o [0-7]+` or `0x [0-9a-fA-F]+`.
fn is_integer(text: &str) -> bool {
    let all = |digits: &str, valid: fn(&u8) -> bool| {
        !digits.is_empty() && digits.as_bytes().iter().all(valid)
    };
    if let Some(octal) = text.strip_prefix("0o") {
        return all(octal, |digit| (b'0'..=b'7').contains(digit));
    }
    if let Some(hexadecimal) = text.strip_prefix("0x") {
        return all(hexadecimal, u8::is_ascii_hexdigit);
    }
    all(
        text.strip_prefix(['-', '+']).unwrap_or(text),
        u8::is_ascii_digit,
    )
}

/// `[-+]? ( \. [0-9]+ | [0-9]+ ( \. [0-9]* )? ) ( [eE] [-+]? [0-9]+ )?`. Infinity and NaN are no
/// value for any field and stay strings.
fn is_float(text: &str) -> bool {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let mantissa_fits =
        digits(whole) && digits(fraction) && !(whole.is_empty() && fraction.is_empty());
    let exponent_fits = exponent.is_none_or(|exponent| {
        let exponent = exponent.strip_prefix(['-', '+']).unwrap_or(exponent);
        !exponent.is_empty() && digits(exponent)
    });
    mantissa_fits && exponent_fits
}
