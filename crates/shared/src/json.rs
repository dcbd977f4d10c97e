//! A JSON value as it was written: the fields of an object stay in their order, which a template may show.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    /// `null`
    Null,
    /// `true` or `false`
    Boolean(bool),
    /// A whole number of at least 0.
    Unsigned(u64),
    /// A whole number below 0.
    Negative(i64),
    /// Another number.
    Float(f64),
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Json>),
    /// An object.
    Object(Object),
}

/// The fields of an object, each once, in their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Object(Vec<(String, Json)>);

impl Object {
    /// The names of the fields.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// These fields, and those of `other` that are not among them.
    #[must_use]
    pub fn or(mut self, other: &Self) -> Self {
        for (name, value) in &other.0 {
            if !self.has(name) {
                self.0.push((name.clone(), value.clone()));
            }
        }
        self
    }

    fn has(&self, name: &str) -> bool {
        self.names().any(|known| known == name)
    }
}

impl Serialize for Object {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Boolean(value) => serializer.serialize_bool(*value),
            Self::Unsigned(value) => serializer.serialize_u64(*value),
            Self::Negative(value) => serializer.serialize_i64(*value),
            Self::Float(value) => serializer.serialize_f64(*value),
            Self::Text(value) => serializer.serialize_str(value),
            Self::List(values) => values.serialize(serializer),
            Self::Object(fields) => fields.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object, A::Error> {
                fields(map)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// The fields of a map; an error if one comes twice.
fn fields<'de, A: MapAccess<'de>>(mut map: A) -> Result<Object, A::Error> {
    let mut object = Object::default();
    while let Some((name, value)) = map.next_entry::<String, Json>()? {
        if object.has(&name) {
            return Err(A::Error::custom(format!("`{name}` is there twice")));
        }
        object.0.push((name, value));
    }
    Ok(object)
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Boolean(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Unsigned(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Json, E> {
        // MessagePack may write any whole number as a signed one.
        Ok(u64::try_from(value).map_or(Json::Negative(value), Json::Unsigned))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Float(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Text(value.to_owned()))
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Json, E> {
        Ok(Json::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Json, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        Ok(Json::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Json, A::Error> {
        fields(map).map(Json::Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"z":[null,true,-3,18446744073709551615,0.5,"ü\"\n",[],{}],"a":{"c":1,"b":{"y":"","x":2}}}"#;

    #[test]
    fn values_go_through_json_and_the_wire_as_they_were_written() {
        let object: Object = serde_json::from_str(TEXT).unwrap();
        assert_eq!(serde_json::to_string(&object).unwrap(), TEXT);
        let bytes = rmp_serde::to_vec_named(&object).unwrap();
        let received: Object = rmp_serde::from_slice(&bytes).unwrap();
        assert_eq!(received, object);
        assert_eq!(serde_json::to_string(&received).unwrap(), TEXT);
    }

    #[test]
    fn what_comes_twice_or_is_no_object_is_refused() {
        let error = |text| serde_json::from_str::<Object>(text).unwrap_err().to_string();
        assert!(error(r#"{"a": 1, "b": 2, "a": 1}"#).contains("`a` is there twice"));
        assert!(error(r#"{"a": {"x": 1, "x": 2}}"#).contains("`x` is there twice"));
        assert!(error("[1]").contains("expected an object"));
    }

    #[test]
    fn the_first_to_name_a_field_is_heard() {
        let object = |text| serde_json::from_str::<Object>(text).unwrap();
        let both = object(r#"{"b": 1, "c": null}"#).or(&object(r#"{"a": 2, "b": 2, "c": 2}"#));
        assert_eq!(both, object(r#"{"b": 1, "c": null, "a": 2}"#));
    }
}
