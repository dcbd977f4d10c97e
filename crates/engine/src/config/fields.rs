//! The fields of a JSON object, each read with its check.

use serde_json::{Map, Value};

use crate::Error;
use crate::step::TokenId;

/// No dimension of a model is larger; what is, is a damaged file.
const MAX_DIMENSION: usize = 1 << 24;

/// An object of a `config.json`, and what its fields are called in errors.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    prefix: &'a str,
}

impl<'a> Fields<'a> {
    pub(super) fn new(object: &'a Map<String, Value>, prefix: &'a str) -> Self {
        Self { object, prefix }
    }

    /// The names of all fields.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.object.keys().map(String::as_str)
    }

    /// An error that tells what a field is and should be.
    pub(super) fn wrong(&self, name: &str, value: &Value, expected: &str) -> Error {
        Error::Model(format!("{}{name} is {value}, expected {expected}", self.prefix))
    }

    /// Whether the field is there, be it null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    /// A field that is there and not null.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// An object inside this one.
    pub(super) fn optional_object(
        &self,
        name: &str,
    ) -> Result<Option<&'a Map<String, Value>>, Error> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(value) => Err(self.wrong(name, value, "an object")),
        }
    }

    pub(super) fn optional_text(&self, name: &str) -> Result<Option<&'a str>, Error> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        value.as_str().map(Some).ok_or_else(|| self.wrong(name, value, "a string"))
    }

    pub(super) fn optional_dimension(&self, name: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|value| usize::try_from(value).ok()) {
            Some(number) if (1..=MAX_DIMENSION).contains(&number) => Ok(Some(number)),
            _ => Err(self.wrong(name, value, &format!("an integer from 1 to {MAX_DIMENSION}"))),
        }
    }

    pub(super) fn dimension(&self, name: &str, default: usize) -> Result<usize, Error> {
        Ok(self.optional_dimension(name)?.unwrap_or(default))
    }

    /// A dimension that null takes away.
    pub(super) fn nullable_dimension(
        &self,
        name: &str,
        default: Option<usize>,
    ) -> Result<Option<usize>, Error> {
        if self.has(name) { self.optional_dimension(name) } else { Ok(default) }
    }

    pub(super) fn optional_positive(&self, name: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(name, value, "a positive number")),
        }
    }

    pub(super) fn positive(&self, name: &str) -> Result<f64, Error> {
        self.optional_positive(name)?
            .ok_or_else(|| Error::Model(format!("{}{name} is missing", self.prefix)))
    }

    /// A positive number that null takes away.
    pub(super) fn nullable_positive(
        &self,
        name: &str,
        default: Option<f64>,
    ) -> Result<Option<f64>, Error> {
        if self.has(name) { self.optional_positive(name) } else { Ok(default) }
    }

    /// A list of `len` positive numbers.
    pub(super) fn positives(&self, name: &str, len: usize) -> Result<Vec<f64>, Error> {
        let value = self.object.get(name).unwrap_or(&Value::Null);
        let numbers: Option<Vec<f64>> = value.as_array().and_then(|list| {
            let positive =
                |value: &Value| value.as_f64().filter(|number| *number > 0.0 && number.is_finite());
            list.iter().map(positive).collect()
        });
        let given = match value {
            Value::Array(list) => Value::from(format!("a list of {}", list.len())),
            other => other.clone(),
        };
        numbers
            .filter(|numbers| numbers.len() == len)
            .ok_or_else(|| self.wrong(name, &given, &format!("a list of {len} positive numbers")))
    }

    pub(super) fn boolean(&self, name: &str, default: bool) -> Result<bool, Error> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        value.as_bool().ok_or_else(|| self.wrong(name, value, "true or false"))
    }

    /// A list of layers; none if it is left out.
    pub(super) fn indices(&self, name: &str) -> Result<Vec<usize>, Error> {
        let Some(value) = self.get(name) else {
            return Ok(Vec::new());
        };
        let index = |value: &Value| value.as_u64().and_then(|index| usize::try_from(index).ok());
        value
            .as_array()
            .and_then(|list| list.iter().map(index).collect())
            .ok_or_else(|| self.wrong(name, value, "a list of layers"))
    }

    /// One token, several or none; `default` where the field is left out.
    pub(super) fn token_ids(
        &self,
        name: &str,
        default: Option<TokenId>,
    ) -> Result<Vec<TokenId>, Error> {
        let Some(value) = self.get(name) else {
            return Ok(default.filter(|_| !self.has(name)).into_iter().collect());
        };
        let ids = match value {
            Value::Array(values) => values.iter().collect(),
            // So older configs say that there is none.
            single if single.as_i64() == Some(-1) => Vec::new(),
            single => vec![single],
        };
        ids.into_iter()
            .map(|id| id.as_u64().and_then(|id| TokenId::try_from(id).ok()))
            .collect::<Option<_>>()
            .ok_or_else(|| self.wrong(name, value, "a token id or a list of them"))
    }
}
