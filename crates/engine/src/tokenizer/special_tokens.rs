//! Tokens that `tokenizer_config.json` and `special_tokens_map.json` name beside `tokenizer.json`.

use std::collections::BTreeMap;

use serde_json::Value;
use tokenizers::AddedToken;

/// The tokens with a role of their own, as the files name them.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The text of a token in a configuration file: a string, or an object that contains it.
pub(super) fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// Text of the tokens by their roles. A `special_tokens_map.json` is of older versions: it counts where the
/// configuration doesn't list the tokens itself.
pub(crate) fn named_tokens(config: &Value, map: &Value) -> BTreeMap<String, String> {
    let roles = ROLES.iter().filter_map(|role| Some((*role, role_token(config, map, role)?)));
    let all = roles.chain(other_roles(config));
    all.filter_map(|(role, token)| Some((role.to_owned(), content(token)?.to_owned()))).collect()
}

/// Tokens with roles that only this model has, such as `image_token`.
fn other_roles(config: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let fields = config.as_object().into_iter().flatten();
    let fields = fields.map(|(name, value)| (name.as_str(), value));
    fields.filter(|(name, _)| name.ends_with("_token") && !ROLES.contains(name))
}

fn role_token<'a>(config: &'a Value, map: &'a Value, role: &str) -> Option<&'a Value> {
    let older = Some(&map[role]).filter(|value| !value.is_null() && !lists_tokens(config));
    older.or_else(|| config.get(role))
}

fn lists_tokens(config: &Value) -> bool {
    config["added_tokens_decoder"].is_object()
}

/// Adds to the tokenizer what the configuration names and `tokenizer.json` lacks, or has with other marks.
pub(super) fn add_configured(
    tokenizer: &mut tokenizers::Tokenizer,
    config: &Value,
    map: &Value,
) -> tokenizers::Result<()> {
    let mut listed: Vec<(u32, AddedToken)> = Vec::new();
    for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
        let id = id.parse()?;
        listed.push((id, serde_json::from_value(complete(token))?));
    }
    listed.sort_by_key(|(id, _)| *id);
    tokenizer.add_tokens(listed.into_iter().map(|(_, token)| token))?;
    let roles = ROLES.iter().filter_map(|role| role_token(config, map, role));
    let others = other_roles(config).map(|(_, value)| value);
    let extra = ["extra_special_tokens", "additional_special_tokens"].into_iter();
    let extra = extra.flat_map(|name| match &config[name] {
        Value::Array(values) => values.iter().collect(),
        Value::Object(values) => values.values().collect(),
        _ => Vec::new(),
    });
    let mut known: Vec<String> =
        tokenizer.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
    for value in roles.chain(others).chain(extra) {
        let Some(content) = content(value) else { continue };
        if known.iter().any(|known| known == content) {
            continue;
        }
        known.push(content.to_owned());
        let token = match value {
            Value::Object(_) => serde_json::from_value(complete(value))?,
            _ => AddedToken::from(content.to_owned(), true),
        };
        tokenizer.add_tokens([AddedToken { special: true, ..token }])?;
    }
    Ok(())
}

/// The token with all of its marks: files may leave out those that aren't set.
fn complete(token: &Value) -> Value {
    let mut token = token.clone();
    let is_special = token["special"] == true;
    if let Some(fields) = token.as_object_mut() {
        fields.remove("__type");
        for mark in ["single_word", "lstrip", "rstrip", "special"] {
            fields.entry(mark).or_insert(Value::Bool(false));
        }
        fields.entry("normalized").or_insert(Value::Bool(!is_special));
    }
    token
}
