//! The fields of one record, and what can be wrong with them.
//!
//! A record is split into its fields without reading their values, so that a bad value leaves the
//! id readable, whose line in the output then says what was wrong.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use shared::{Dependencies, JobId};

/// Longest id.
const MAX_ID_BYTES: usize = 1024;

/// A record's fields in the order of the file, doubles included.
pub(super) struct Fields<'r>(Vec<(String, &'r RawValue)>);

impl<'r> Fields<'r> {
    /// Splits a record.
    pub(super) fn parse(record: &'r str) -> Result<Self, String> {
        let kind = kind(record);
        if kind != "an object" && kind != MALFORMED {
            // Its first byte may promise what the rest doesn't keep.
            return Err(match serde_json::from_str::<&RawValue>(record) {
                Ok(_) => format!("expected an object, given {kind}"),
                Err(error) => malformed(&error),
            });
        }
        serde_json::from_str(record).map_err(|error| malformed(&error))
    }

    /// The id, if it is one.
    pub(super) fn id(&self) -> Result<JobId, String> {
        let Some(raw) = self.one("id")? else {
            return Err("expected an `id`, given none".to_owned());
        };
        let text = match kind(raw.get()) {
            "a text" => self.text("id")?.unwrap_or_default(),
            "a number" => raw.get().to_owned(),
            other => {
                return Err(format!("expected a text or a number in `id`, given {other}"));
            }
        };
        match text.len() {
            0 => Err("expected an `id`, given an empty one".to_owned()),
            1..=MAX_ID_BYTES => Ok(JobId(text)),
            long => Err(format!(
                "expected an `id` of at most {MAX_ID_BYTES} bytes, given one of {long}"
            )),
        }
    }

    /// Checks that no field is there twice.
    pub(super) fn check_doubles(&self) -> Result<(), String> {
        let mut names: Vec<&str> = self.0.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(doubled(pair[0])),
            None => Ok(()),
        }
    }

    /// Whether there is such a field; a null one stands for none, as in tables with empty cells.
    pub(super) fn has(&self, name: &str) -> bool {
        self.raw(name).is_some()
    }

    /// The value of a field, unread; `None` where it is missing or null.
    pub(super) fn raw(&self, name: &str) -> Option<&'r RawValue> {
        let found = self.0.iter().find(|(field, _)| field == name);
        found.map(|(_, raw)| *raw).filter(|raw| raw.get() != "null")
    }

    /// All fields that aren't null, with their names.
    pub(super) fn filled(&self) -> impl Iterator<Item = (&str, &'r RawValue)> {
        let fields = self.0.iter().map(|(name, raw)| (name.as_str(), *raw));
        fields.filter(|(_, raw)| raw.get() != "null")
    }

    /// A field that holds text; `None` where it is missing or null.
    pub(super) fn text(&self, name: &str) -> Result<Option<String>, String> {
        self.read(name, "a text")
    }

    /// A text that must be there and say something.
    pub(super) fn filled_text(&self, name: &str) -> Result<String, String> {
        match self.text(name)? {
            None => Err(format!("expected text in `{name}`, given none")),
            Some(text) if text.trim().is_empty() => {
                Err(format!("expected text in `{name}`, given an empty one"))
            }
            Some(text) => Ok(text),
        }
    }

    /// A field of a type that is called `expected` in messages; `None` where it is missing or
    /// null.
    pub(super) fn read<T: Deserialize<'r>>(
        &self,
        name: &str,
        expected: &str,
    ) -> Result<Option<T>, String> {
        let Some(raw) = self.raw(name) else {
            return Ok(None);
        };
        let given = kind(raw.get());
        if given != expected {
            return Err(format!("expected {expected} in `{name}`, given {given}"));
        }
        serde_json::from_str(raw.get())
            .map(Some)
            .map_err(|error| format!("field `{name}`: {}", malformed(&error)))
    }

    /// The packages of the first of these fields that is there.
    pub(super) fn dependencies(&self, names: &[&str]) -> Result<Dependencies, String> {
        let found = names.iter().find_map(|&name| Some((name, self.raw(name)?)));
        let Some((name, raw)) = found else {
            return Ok(Dependencies::new());
        };
        serde_json::from_str::<Packages>(raw.get())
            .map(|packages| packages.0)
            .map_err(|error| format!("field `{name}`: {}", malformed(&error)))
    }

    fn one(&self, name: &str) -> Result<Option<&'r RawValue>, String> {
        let mut found = self.0.iter().filter(|(field, _)| field == name);
        let first = found.next().map(|(_, raw)| *raw);
        match found.next() {
            Some(_) => Err(doubled(name)),
            None => Ok(first),
        }
    }
}

impl<'r> Deserialize<'r> for Fields<'r> {
    fn deserialize<D: Deserializer<'r>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;
        impl<'r> Visitor<'r> for FieldsVisitor {
            type Value = Fields<'r>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'r>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(FieldsVisitor)
    }
}

/// Packages in any of the ways to write them: `{"numpy": "1.16.6"}`, `"numpy==1.16.6"`,
/// `"numpy"`, or a list of the two.
struct Packages(Dependencies);

impl Packages {
    /// A version as the user wrote it; no version where there is no text.
    fn version(text: &str) -> Option<String> {
        let text = text.trim();
        let text = text.strip_prefix("==").unwrap_or(text).trim_start();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// Reads `numpy==1.16.6`, `numpy`, `numpy[extra]==1.16.6`. Another comparison stays in front
    /// of its version, which then is no version of the corpus.
    fn add_requirement<E: de::Error>(&mut self, text: &str) -> Result<(), E> {
        let text = text.trim();
        let end = text.find(|c: char| "[=<>!~; ".contains(c)).unwrap_or(text.len());
        let (package, rest) = text.split_at(end);
        if package.is_empty() {
            return Err(E::custom(format!(
                "expected a package such as `numpy==1.16.6`, given `{text}`"
            )));
        }
        let rest = rest.split(';').next().unwrap_or_default();
        let rest = match rest.split_once(']') {
            Some((_, after)) if rest.starts_with('[') => after,
            _ => rest,
        };
        self.0.insert(package.to_owned(), Self::version(rest));
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Packages {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PackagesVisitor;
        impl<'de> Visitor<'de> for PackagesVisitor {
            type Value = Packages;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("packages with their versions")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                let mut packages = Packages(Dependencies::new());
                if !text.trim().is_empty() {
                    packages.add_requirement(text)?;
                }
                Ok(packages)
            }

            fn visit_seq<S: de::SeqAccess<'de>>(self, mut seq: S) -> Result<Self::Value, S::Error> {
                let mut packages = Packages(Dependencies::new());
                while let Some(text) = seq.next_element::<String>()? {
                    packages.add_requirement(&text)?;
                }
                Ok(packages)
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut packages = Packages(Dependencies::new());
                while let Some((package, raw)) = map.next_entry::<String, Box<RawValue>>()? {
                    let version = read_version(&package, &raw).map_err(de::Error::custom)?;
                    if packages.0.contains_key(&package) {
                        return Err(de::Error::custom(doubled(&package)));
                    }
                    if package.trim().is_empty() {
                        return Err(de::Error::custom("expected a package, given an empty name"));
                    }
                    packages.0.insert(package, version);
                }
                Ok(packages)
            }
        }
        deserializer.deserialize_any(PackagesVisitor)
    }
}

fn read_version(package: &str, raw: &RawValue) -> Result<Option<String>, String> {
    match kind(raw.get()) {
        "null" => Ok(None),
        "a number" => Ok(Some(raw.get().to_owned())),
        "a text" => serde_json::from_str::<String>(raw.get())
            .map(|text| Packages::version(&text))
            .map_err(|error| malformed(&error)),
        other => Err(format!("expected a version of `{package}`, given {other}")),
    }
}

const MALFORMED: &str = "no JSON";

/// What a JSON text is, by its first byte.
pub(super) fn kind(json: &str) -> &'static str {
    match json.trim_start().bytes().next() {
        Some(b'{') => "an object",
        Some(b'[') => "a list",
        Some(b'"') => "a text",
        Some(b'n') => "null",
        Some(b't' | b'f') => "true or false",
        Some(b'-' | b'0'..=b'9') => "a number",
        _ => MALFORMED,
    }
}

fn doubled(name: &str) -> String {
    format!("expected each field once, given `{name}` twice")
}

/// A parser's message without its own line count, which is the record's and not the file's.
pub(super) fn malformed(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let message = match text.rfind(" at line ") {
        Some(at) if error.line() > 0 => &text[..at],
        _ => return text,
    };
    match (error.is_data(), error.line()) {
        (true, _) => message.to_owned(),
        (false, 1) => format!("malformed JSON at column {}: {message}", error.column()),
        (false, line) => format!(
            "malformed JSON at line {line}, column {} of the record: {message}",
            error.column()
        ),
    }
}
