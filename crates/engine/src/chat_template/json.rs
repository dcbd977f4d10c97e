//! The filter `tojson` as transformers defines it: Python's `json.dumps`.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// How JSON is laid out.
struct Style {
    indent: Option<String>,
    /// Between items and behind keys.
    separators: (String, String),
    ensure_ascii: bool,
    sort_keys: bool,
}

/// The filter.
#[expect(clippy::needless_pass_by_value, reason = "the shape of a filter")]
pub(super) fn to_json(
    value: Value,
    ensure_ascii: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let indent = match options.get::<Option<Value>>("indent")?.filter(|value| !value.is_none()) {
        None => None,
        Some(value) if value.kind() == ValueKind::String => Some(value.to_string()),
        Some(value) => Some(" ".repeat(usize::try_from(value)?)),
    };
    let separators = match options.get::<Option<Vec<String>>>("separators")? {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some(given) => <[String; 2]>::try_from(given).map(Into::into).map_err(|_given| {
            Error::new(ErrorKind::InvalidOperation, "tojson: expected two separators")
        })?,
    };
    let ensure_ascii = ensure_ascii.or(options.get("ensure_ascii")?).unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut text = String::new();
    write(&mut text, &value, (&Style { indent, separators, ensure_ascii, sort_keys }, 0))?;
    Ok(text)
}

fn write(out: &mut String, value: &Value, (style, depth): (&Style, usize)) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => write_number(out, value),
        ValueKind::String => write_string(out, value.as_str().unwrap_or_default(), style),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| (None, item)).collect();
            write_items(out, ("[", items, "]"), (style, depth))?;
        }
        ValueKind::Map => {
            let mut items = Vec::new();
            for key in value.try_iter()? {
                items.push((Some(json_key(&key)?), value.get_item(&key)?));
            }
            if style.sort_keys {
                items.sort_by(|(one, _), (other, _)| one.cmp(other));
            }
            write_items(out, ("{", items, "}"), (style, depth))?;
        }
        other => {
            let text = format!("a value of type {other} can't be written as JSON");
            return Err(Error::new(ErrorKind::BadSerialization, text));
        }
    }
    Ok(())
}

fn write_items(
    out: &mut String,
    (open, items, close): (&str, Vec<(Option<String>, Value)>, &str),
    (style, depth): (&Style, usize),
) -> Result<(), Error> {
    out.push_str(open);
    let is_empty = items.is_empty();
    for (index, (key, item)) in items.into_iter().enumerate() {
        if index > 0 {
            out.push_str(&style.separators.0);
        }
        new_line(out, style, depth + 1);
        if let Some(key) = key {
            write_string(out, &key, style);
            out.push_str(&style.separators.1);
        }
        write(out, &item, (style, depth + 1))?;
    }
    if !is_empty {
        new_line(out, style, depth);
    }
    out.push_str(close);
    Ok(())
}

fn new_line(out: &mut String, style: &Style, depth: usize) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        out.push_str(&indent.repeat(depth));
    }
}

/// A key as `json.dumps` makes one of what isn't a string.
fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.to_string()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(key.is_true().to_string()),
        ValueKind::Number => {
            let mut text = String::new();
            write_number(&mut text, key);
            Ok(text)
        }
        other => {
            let text = format!("a key of type {other} can't be written as JSON");
            Err(Error::new(ErrorKind::BadSerialization, text))
        }
    }
}

/// A number as Python's `repr` writes it.
fn write_number(out: &mut String, value: &Value) {
    let Some(number) = f64::try_from(value.clone()).ok().filter(|_| !value.is_integer()) else {
        out.push_str(&value.to_string());
        return;
    };
    // Writing to a String cannot fail.
    let _infallible = if number.is_nan() {
        write!(out, "NaN")
    } else if number.is_infinite() {
        write!(out, "{}Infinity", if number < 0.0 { "-" } else { "" })
    } else {
        let scientific = format!("{number:e}");
        let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        if (-4..16).contains(&exponent) {
            write!(out, "{number:?}")
        } else {
            let sign = if exponent < 0 { '-' } else { '+' };
            write!(out, "{digits}e{sign}{:02}", exponent.abs())
        }
    };
}

fn write_string(out: &mut String, text: &str, style: &Style) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            _ if character < ' ' || (style.ensure_ascii && !character.is_ascii()) => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _infallible = write!(out, "\\u{unit:04x}");
                }
            }
            _ => out.push(character),
        }
    }
    out.push('"');
}
