//! Jinja as transformers renders chat templates with it, on top of minijinja.
//!
//! Here is what minijinja lacks or does otherwise: functions that transformers adds, methods of Python's
//! strings, and the blocks that mark what a model wrote. `tojson` is in `json`.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::json::to_json;

/// What a template raised itself; the source of the error that carries it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// What all templates have in common.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    minijinja_contrib::add_to_environment(&mut environment);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", to_json);
    environment.add_filter("trim", |value: Value, characters: Option<&str>| {
        strip(&value.to_string(), characters, (true, true)).to_owned()
    });
    for name in ["length", "count"] {
        environment.add_filter(name, length);
    }
    // To Python, text is a sequence, and so is whatever has items.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment
}

/// The environment of chat templates.
pub(super) fn chat_environment() -> Environment<'static> {
    let mut environment = environment();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_default());
    environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text.clone()).with_source(Raised(text)))
    });
    environment.add_function("strftime_now", |format: &str| strftime(format));
    environment
}

/// Length of a value; what isn't there has none.
fn length(value: &Value) -> Result<usize, Error> {
    let unsized_ = || {
        let text = format!("cannot calculate the length of a value of type {}", value.kind());
        Error::new(ErrorKind::InvalidOperation, text)
    };
    if value.is_undefined() { Ok(0) } else { value.len().ok_or_else(unsized_) }
}

/// A template as minijinja takes it. Its line ends become `\n`, as in Jinja. `{% generation %}`, transformers'
/// mark of what a model wrote, becomes a block with a scope of its own and no other meaning.
pub(super) fn prepared(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find('{') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let end = match rest.as_bytes().get(1) {
            Some(b'#') => rest.find("#}").map(|at| at + 2),
            Some(b'{') => tag_end(rest, "}}"),
            Some(b'%') => tag_end(rest, "%}"),
            _ => Some(1),
        };
        let (tag, behind) = rest.split_at(end.unwrap_or(rest.len()));
        rest = behind;
        match tag_name(tag) {
            Some("generation") => out.push_str(&tag.replacen("generation", "with", 1)),
            Some("endgeneration") => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            Some("raw") => {
                out.push_str(tag);
                let end = raw_end(rest);
                out.push_str(&rest[..end]);
                rest = &rest[end..];
            }
            _ => out.push_str(tag),
        }
    }
    out + rest
}

/// Where a tag ends; its closing mark may stand in strings.
fn tag_end(tag: &str, closing: &str) -> Option<usize> {
    let mut quote = None;
    let mut escaped = false;
    for (at, byte) in tag.bytes().enumerate().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if byte == b'\\' => escaped = true,
            Some(open) if byte == open => quote = None,
            Some(_) => {}
            None if byte == b'\'' || byte == b'"' => quote = Some(byte),
            None if tag.as_bytes()[at..].starts_with(closing.as_bytes()) => {
                return Some(at + closing.len());
            }
            None => {}
        }
    }
    None
}

/// Where raw text ends.
fn raw_end(text: &str) -> usize {
    let tags = text.match_indices("{%");
    let end = tags.map(|(at, _)| at).find(|at| tag_name(&text[*at..]) == Some("endraw"));
    end.unwrap_or(text.len())
}

/// The first word of a `{% … %}`.
fn tag_name(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    let end = inner.find(|character: char| !character.is_alphanumeric() && character != '_');
    Some(&inner[..end.unwrap_or(inner.len())])
}

/// Today's date as `strftime` writes it. A prompt must not depend on the day it is computed, so today is always
/// the day that Llama's templates fall back on: Friday, 26 July 2024.
fn strftime(format: &str) -> String {
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next();
        let is_unpadded = directive == Some('-');
        if is_unpadded {
            directive = characters.next();
        }
        let text = match directive {
            Some('Y') => "2024",
            Some('y') => "24",
            Some('m') => "07",
            Some('d' | 'e') => "26",
            Some('j') => "208",
            Some('B') => "July",
            Some('b' | 'h') => "Jul",
            Some('A') => "Friday",
            Some('a') => "Fri",
            Some('u' | 'w') => "5",
            Some('H' | 'M' | 'S') => "00",
            Some('I') => "12",
            Some('p') => "AM",
            Some('f') => "000000",
            Some('F') => "2024-07-26",
            Some('D' | 'x') => "07/26/24",
            Some('T' | 'X') => "00:00:00",
            Some('R') => "00:00",
            Some('c') => "Fri Jul 26 00:00:00 2024",
            Some('%') => "%",
            Some('z' | 'Z') => "",
            other => {
                out.push('%');
                out.extend(is_unpadded.then_some('-'));
                out.extend(other);
                continue;
            }
        };
        let unpadded = text.trim_start_matches('0');
        out.push_str(match (is_unpadded, unpadded) {
            (true, "") => "0",
            (true, unpadded) => unpadded,
            (false, _) => text,
        });
    }
    out
}

/// Methods of Python's values; those of `pycompat` where it does the same as Python.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let own = match value.as_str() {
        Some(text) => string_method(text, name, args)?,
        None => match (value.kind(), name) {
            (ValueKind::Map, "copy") => {
                let () = from_args(args)?;
                Some(value.clone())
            }
            (ValueKind::Seq, "index") => {
                let (item,): (&Value,) = from_args(args)?;
                let at = value.try_iter()?.position(|other| other == *item);
                Some(Value::from(at.ok_or_else(|| wrong("the item is not in the list"))?))
            }
            _ => None,
        },
    };
    own.map_or_else(|| pycompat::unknown_method_callback(state, value, name, args), Ok)
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let value = match name {
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, characters, (name != "rstrip", name != "lstrip")))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, after) = text.split_once(separator).unwrap_or((text, ""));
            let found = if text.contains(separator) { separator } else { "" };
            Value::from(minijinja::value::Tuple::from([before, found, after].map(Value::from)))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, after) = text.rsplit_once(separator).unwrap_or(("", text));
            let found = if text.contains(separator) { separator } else { "" };
            Value::from(minijinja::value::Tuple::from([before, found, after].map(Value::from)))
        }
        "split" | "rsplit" => {
            let (separator, max_splits, kwargs): (Option<Value>, Option<i64>, Kwargs) =
                from_args(args)?;
            let separator = separator.or(kwargs.get("sep")?).filter(|value| !value.is_none());
            let max_splits = max_splits.or(kwargs.get("maxsplit")?).unwrap_or(-1);
            kwargs.assert_all_used()?;
            let max_splits = usize::try_from(max_splits).unwrap_or(usize::MAX);
            let from_right = name == "rsplit";
            let parts = match separator.as_ref().map(Value::as_str) {
                Some(Some(separator)) => split(text, separator, (max_splits, from_right))?,
                Some(None) => return Err(wrong("a separator must be a string")),
                None => split_blanks(text, max_splits, from_right),
            };
            parts.into_iter().map(Value::from).collect()
        }
        "index" => {
            let (part,): (&str,) = from_args(args)?;
            let at = text.find(part).ok_or_else(|| wrong("substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            Value::from(pad(text, width, (fill.unwrap_or(' '), name)))
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let digits = pad(digits, width.saturating_sub(sign.len()), ('0', "rjust"));
            Value::from(sign.to_owned() + &digits)
        }
        "casefold" => {
            let () = from_args(args)?;
            Value::from(text.to_lowercase().replace('ß', "ss"))
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| {
                if c.is_uppercase() {
                    c.to_lowercase().to_string()
                } else {
                    c.to_uppercase().to_string()
                }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        _ => return Ok(None),
    };
    Ok(Some(value))
}

fn wrong(text: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, text)
}

/// White space as Python's `str.isspace` has it: Unicode's, and four separators.
fn is_blank(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

fn strip<'a>(text: &'a str, characters: Option<&str>, (left, right): (bool, bool)) -> &'a str {
    let goes = |character: char| match characters {
        Some(characters) => characters.contains(character),
        None => is_blank(character),
    };
    let text = if left { text.trim_start_matches(goes) } else { text };
    if right { text.trim_end_matches(goes) } else { text }
}

fn split<'a>(
    text: &'a str,
    separator: &str,
    (max_splits, from_right): (usize, bool),
) -> Result<Vec<&'a str>, Error> {
    if separator.is_empty() {
        return Err(wrong("empty separator"));
    }
    let num_parts = max_splits.saturating_add(1);
    if !from_right {
        return Ok(text.splitn(num_parts, separator).collect());
    }
    let mut parts: Vec<_> = text.rsplitn(num_parts, separator).collect();
    parts.reverse();
    Ok(parts)
}

/// Splits at runs of white space.
fn split_blanks(text: &str, max_splits: usize, from_right: bool) -> Vec<&str> {
    // From either end: blanks at that end go, and what is left when the splits are used up stays as it is.
    let trim = |text| strip(text, None, (!from_right, from_right));
    let mut parts = Vec::new();
    let mut rest = trim(text);
    while !rest.is_empty() {
        let at = if from_right { rest.rfind(is_blank) } else { rest.find(is_blank) };
        let Some(at) = at.filter(|_| parts.len() < max_splits) else {
            parts.push(rest);
            break;
        };
        let (before, behind) = rest.split_at(at);
        if from_right {
            parts.push(strip(behind, None, (true, false)));
            rest = trim(before);
        } else {
            parts.push(before);
            rest = trim(behind);
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

fn pad(text: &str, width: usize, (fill, side): (char, &str)) -> String {
    let missing = width.saturating_sub(text.chars().count());
    let left = match side {
        "ljust" => 0,
        "rjust" => missing,
        // Where it can't be even, Python puts the larger part left if the width is odd.
        _ => missing / 2 + (missing & width & 1),
    };
    let fill = |count: usize| std::iter::repeat_n(fill, count).collect::<String>();
    fill(left) + text + &fill(missing - left)
}
