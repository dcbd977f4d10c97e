//! A record's `generation`: what the query itself says about how it is answered.
//!
//! The names are flotilla's; those of OpenAI and vLLM for the same thing are understood too.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;
use shared::Generation;

use super::fields::{Fields, kind, malformed};

/// The field.
pub(super) const GENERATION: &str = "generation";

/// Reads and checks the field; nothing said where it is missing or null.
pub(super) fn read(fields: &Fields<'_>) -> Result<Generation, String> {
    let Some(raw) = fields.raw(GENERATION) else {
        return Ok(Generation::default());
    };
    let generation = Fields::parse(raw.get()).and_then(|inner| {
        inner.check_doubles()?;
        let mut generation = Generation::default();
        for (name, raw) in inner.filled() {
            set(&mut generation, name, raw)?;
        }
        generation.validate()?;
        Ok(generation)
    });
    generation.map_err(|reason| format!("field `{GENERATION}`: {reason}"))
}

fn set(generation: &mut Generation, name: &str, raw: &RawValue) -> Result<(), String> {
    match name {
        "max_new_tokens" | "max_tokens" | "max_completion_tokens" => {
            once(&mut generation.max_new_tokens, name, Some(whole(name, raw)?))
        }
        "min_new_tokens" | "min_tokens" => {
            once(&mut generation.min_new_tokens, name, Some(whole(name, raw)?))
        }
        "temperature" => once(&mut generation.temperature, name, Some(number(name, raw)?)),
        "top_p" => once(&mut generation.top_p, name, Some(number(name, raw)?)),
        // Elsewhere -1 stands for all.
        "top_k" if raw.get() == "-1" => once(&mut generation.top_k, name, Some(0)),
        "top_k" => once(&mut generation.top_k, name, Some(whole(name, raw)?)),
        "min_p" => once(&mut generation.min_p, name, Some(number(name, raw)?)),
        "typical_p" => once(&mut generation.typical_p, name, Some(number(name, raw)?)),
        "repetition_penalty" => {
            once(&mut generation.repetition_penalty, name, Some(number(name, raw)?))
        }
        "presence_penalty" => {
            once(&mut generation.presence_penalty, name, Some(number(name, raw)?))
        }
        "frequency_penalty" => {
            once(&mut generation.frequency_penalty, name, Some(number(name, raw)?))
        }
        "logit_bias" => once(&mut generation.logit_bias, name, Some(biases(name, raw)?)),
        "stop" => once(&mut generation.stop, name, Some(texts(name, raw)?)),
        "stop_token_ids" => {
            let expected = "a list of token ids";
            once(&mut generation.stop_token_ids, name, Some(value(name, raw, expected)?))
        }
        "ignore_eos" => once(&mut generation.ignore_eos, name, Some(switch(name, raw)?)),
        // As the chat completions have it, or a number as elsewhere.
        "logprobs" if kind(raw.get()) == "a number" => {
            once(&mut generation.logprobs, name, Some(true))?;
            once(&mut generation.top_logprobs, name, Some(whole(name, raw)?))
        }
        "logprobs" => once(&mut generation.logprobs, name, Some(switch(name, raw)?)),
        "top_logprobs" => once(&mut generation.top_logprobs, name, Some(whole(name, raw)?)),
        "seed" => once(&mut generation.seed, name, Some(whole(name, raw)?)),
        "chat_template_kwargs" => {
            let expected = r#"an object such as {"enable_thinking": false}"#;
            once(&mut generation.chat_template_kwargs, name, Some(value(name, raw, expected)?))
        }
        _ => Err(format!("expected a setting that is known, given `{name}`")),
    }
}

/// Sets a field that another name may have set already.
fn once<T>(field: &mut Option<T>, name: &str, value: Option<T>) -> Result<(), String> {
    if field.is_some() {
        return Err(format!(
            "expected each setting once, given `{name}` beside another name for it"
        ));
    }
    *field = value;
    Ok(())
}

fn number(name: &str, raw: &RawValue) -> Result<f32, String> {
    value(name, raw, "a number")
}

fn whole<T: for<'de> Deserialize<'de>>(name: &str, raw: &RawValue) -> Result<T, String> {
    value(name, raw, "a whole number of at least 0")
}

fn switch(name: &str, raw: &RawValue) -> Result<bool, String> {
    value(name, raw, "true or false")
}

/// A text, or a list of them.
fn texts(name: &str, raw: &RawValue) -> Result<Vec<String>, String> {
    if kind(raw.get()) == "a text" {
        return Ok(vec![value(name, raw, "a text")?]);
    }
    value(name, raw, "a text or a list of texts")
}

/// Token ids with what is added to their logits.
fn biases(name: &str, raw: &RawValue) -> Result<BTreeMap<u32, f32>, String> {
    let expected = r#"an object such as {"50256": -100}"#;
    value(name, raw, expected)
}

/// A value of a type that is called `expected` in messages.
fn value<T: for<'de> Deserialize<'de>>(
    name: &str,
    raw: &RawValue,
    expected: &str,
) -> Result<T, String> {
    serde_json::from_str(raw.get()).map_err(|error| {
        let given = match kind(raw.get()) {
            "a number" => raw.get(),
            "a list" | "an object" => &malformed(&error),
            kind => kind,
        };
        format!("{name}: expected {expected}, given {given}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_field(json: &str) -> Result<Generation, String> {
        let record = format!(r#"{{"generation": {json}}}"#);
        read(&Fields::parse(&record)?)
    }

    #[test]
    fn all_settings_are_read_under_all_their_names() {
        let given = read_field(
            r#"{"max_new_tokens": 7, "min_new_tokens": 2, "temperature": 0, "top_p": 0.5, "top_k": 9,
                "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": -0.5,
                "frequency_penalty": 0.5, "logit_bias": {"3": -100, "5": 1.5}, "stop": ["\n", "END"],
                "stop_token_ids": [5, 6], "ignore_eos": true, "logprobs": true, "top_logprobs": 3,
                "seed": 18446744073709551615,
                "chat_template_kwargs": {"enable_thinking": false, "date_string": "1 Jan 2025"}}"#,
        );
        let variables = r#"{"enable_thinking": false, "date_string": "1 Jan 2025"}"#;
        let expected = Generation {
            max_new_tokens: Some(7),
            min_new_tokens: Some(2),
            temperature: Some(0.0),
            top_p: Some(0.5),
            top_k: Some(9),
            min_p: Some(0.1),
            typical_p: Some(0.9),
            repetition_penalty: Some(1.2),
            presence_penalty: Some(-0.5),
            frequency_penalty: Some(0.5),
            logit_bias: Some([(3, -100.0), (5, 1.5)].into()),
            stop: Some(vec!["\n".to_owned(), "END".to_owned()]),
            stop_token_ids: Some(vec![5, 6]),
            ignore_eos: Some(true),
            logprobs: Some(true),
            top_logprobs: Some(3),
            seed: Some(u64::MAX),
            chat_template_kwargs: Some(serde_json::from_str(variables).unwrap()),
        };
        assert_eq!(given, Ok(expected.clone()));
        // What is written into a contexts file is read from it.
        assert_eq!(read_field(&serde_json::to_string(&expected).unwrap()), Ok(expected));
        let given = read_field(
            r#"{"max_tokens": 7, "min_tokens": 2, "stop": "END", "top_k": -1, "logprobs": 3}"#,
        );
        let expected = Generation {
            max_new_tokens: Some(7),
            min_new_tokens: Some(2),
            top_k: Some(0),
            stop: Some(vec!["END".to_owned()]),
            logprobs: Some(true),
            top_logprobs: Some(3),
            ..Generation::default()
        };
        assert_eq!(given, Ok(expected));
        let given = read_field(r#"{"max_completion_tokens": 7, "temperature": null}"#).unwrap();
        assert_eq!((given.max_new_tokens, given.temperature), (Some(7), None));
        assert_eq!(read_field("null"), Ok(Generation::default()));
        assert_eq!(read_field("{}"), Ok(Generation::default()));
    }

    #[test]
    fn what_is_wrong_is_named_with_what_was_expected_and_given() {
        for (json, expected) in [
            ("[]", "expected an object, given a list"),
            (r#"{"tempreature": 0}"#, "expected a setting that is known, given `tempreature`"),
            (r#"{"temperature": -1}"#, "temperature: expected a number of at least 0, given -1"),
            (r#"{"temperature": "0.5"}"#, "temperature: expected a number, given a text"),
            (r#"{"temperature": "NaN"}"#, "temperature: expected a number, given a text"),
            (r#"{"temperature": 1e999}"#, "1e999"),
            (r#"{"temperature": 1e99}"#, "temperature: expected a number, given 1e99"),
            (r#"{"top_p": 0}"#, "top_p: expected a number above 0 and at most 1, given 0"),
            (r#"{"max_new_tokens": 0}"#, "whole number from 1 to 10000000, given 0"),
            (r#"{"max_new_tokens": -1}"#, "max_new_tokens: expected a whole number of at least 0"),
            (r#"{"max_new_tokens": 1e9}"#, "given 1e9"),
            (r#"{"max_new_tokens": 1000000000}"#, "given 1000000000"),
            (r#"{"max_tokens": 99999999999}"#, "max_tokens: expected a whole number"),
            (r#"{"max_tokens": 1.5}"#, "given 1.5"),
            (r#"{"max_tokens": 5, "max_new_tokens": 5}"#, "beside another name for it"),
            (r#"{"logprobs": 3, "top_logprobs": 3}"#, "beside another name for it"),
            (r#"{"top_p": 1, "top_p": 0.5}"#, "given `top_p` twice"),
            (r#"{"top_k": -2}"#, "top_k: expected a whole number of at least 0, given -2"),
            (r#"{"min_new_tokens": 9, "max_new_tokens": 5}"#, "expected at most max_new_tokens"),
            (r#"{"logprobs": 21}"#, "expected a whole number from 0 to 20, given 21"),
            (r#"{"stop": ""}"#, "stop: expected texts that say something"),
            (r#"{"stop": [1]}"#, "stop: expected a text or a list of texts"),
            (r#"{"stop_token_ids": 5}"#, "expected a list of token ids, given 5"),
            (r#"{"logit_bias": {"the": 1}}"#, "logit_bias: expected an object such as"),
            (r#"{"logit_bias": [1]}"#, "logit_bias: expected an object such as"),
            (r#"{"ignore_eos": 1}"#, "ignore_eos: expected true or false, given 1"),
            (r#"{"seed": -1}"#, "seed: expected a whole number"),
            (r#"{"chat_template_kwargs": [1]}"#, "expected an object such as"),
            (r#"{"chat_template_kwargs": {"a": 1, "a": 2}}"#, "`a` is there twice"),
            (r#"{"chat_template_kwargs": {"messages": []}}"#, "given messages"),
        ] {
            let reason = read_field(json).unwrap_err();
            assert!(reason.starts_with("field `generation`: "), "{json}: {reason}");
            assert!(reason.contains(expected), "{json}: {reason}");
        }
    }
}
