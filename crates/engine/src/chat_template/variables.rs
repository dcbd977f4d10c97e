//! What a query tells the chat template beside its messages, such as `enable_thinking`.

use minijinja::Value;
use minijinja::value::{Serde, ValueKind};
use serde::Serialize;

use crate::Error;

/// Variables of a chat template with their values.
#[derive(Clone, Debug)]
pub struct TemplateVariables(Value);

impl TemplateVariables {
    /// The fields of what is serialised as a map.
    pub fn new(fields: &impl Serialize) -> Self {
        Self(Value::from(Serde(fields)))
    }

    /// The names of the variables.
    pub fn names(&self) -> impl Iterator<Item = String> {
        items(&self.0).map(|name| name.to_string())
    }

    /// The same with all texts, names of inner fields included, as `change` makes them.
    pub(crate) fn map_texts(
        &self,
        change: &impl Fn(&str) -> Result<String, Error>,
    ) -> Result<Self, Error> {
        let variables = items(&self.0).map(|name| {
            let value = mapped(&field(&self.0, &name), change)?;
            Ok((name, value))
        });
        let variables: Vec<_> = variables.collect::<Result<_, Error>>()?;
        Ok(Self(Value::from_pairs(variables)))
    }

    pub(super) fn value(&self) -> &Value {
        &self.0
    }
}

impl Default for TemplateVariables {
    fn default() -> Self {
        Self(Value::from_pairs::<_, Value, Value>([]))
    }
}

fn mapped(value: &Value, change: &impl Fn(&str) -> Result<String, Error>) -> Result<Value, Error> {
    match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => change(text).map(Value::from),
        (ValueKind::Seq, _) => {
            let list: Result<Vec<_>, Error> =
                items(value).map(|item| mapped(&item, change)).collect();
            Ok(Value::from(list?))
        }
        (ValueKind::Map, _) => {
            let fields = items(value)
                .map(|name| Ok((mapped(&name, change)?, mapped(&field(value, &name), change)?)));
            let fields: Vec<_> = fields.collect::<Result<_, Error>>()?;
            Ok(Value::from_pairs(fields))
        }
        _ => Ok(value.clone()),
    }
}

/// The items of a list, or the names of a map's fields.
fn items(value: &Value) -> impl Iterator<Item = Value> {
    value.try_iter().into_iter().flatten()
}

fn field(map: &Value, name: &Value) -> Value {
    map.get_item(name).unwrap_or_default()
}
