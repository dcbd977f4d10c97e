//! The checkpoint's `generation_config.json`: how its makers want answers generated.
//!
//! Only a default for what a request doesn't say. `do_sample` is not among it (see docs/decisions.md), and the
//! end-of-sequence tokens are the tokenizer's.

use std::path::Path;

use serde_json::Value;

use crate::Error;
use crate::model_files::ModelFiles;

/// Largest number of tokens that is believed; whole numbers up to it are exact as `f32`.
const MAX_COUNT: f32 = 1e7;

/// Settings that change answers in transformers and are not heeded here, with the values that change nothing.
const UNHEEDED: [(&str, f64); 13] = [
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
    ("guidance_scale", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("bad_words_ids", 0.0),
    ("sequence_bias", 0.0),
    ("suppress_tokens", 0.0),
    ("begin_suppress_tokens", 0.0),
    ("forced_bos_token_id", -1.0),
    ("forced_eos_token_id", -1.0),
];

/// What a model's generation configuration says; `None` where it says nothing. The fields are those of
/// [`crate::SamplingParams`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Most tokens to generate.
    pub max_new_tokens: Option<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Number of likeliest tokens; 0 is all of them.
    pub top_k: Option<u32>,
    /// Probability of the nucleus.
    pub top_p: Option<f32>,
    /// Least probability, as a fraction of the likeliest token's.
    pub min_p: Option<f32>,
    /// Probability of the locally typical set.
    pub typical_p: Option<f32>,
    /// Penalty of tokens of the prompt and the answer.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Loads that of a model, of its folder or GGUF file. A model without it says nothing; a value that nobody can
    /// sample with is left out with a warning, since requests can do without it.
    pub fn load(model_path: &Path) -> Result<Self, Error> {
        let files = ModelFiles::open(model_path)?;
        let config = files.json("generation_config.json")?.unwrap_or(Value::Null);
        for name in unheeded(&config) {
            let value = &config[name];
            tracing::warn!(name, %value, "the model's generation_config.json asks for what flotilla doesn't do");
        }
        let number = |name, is_right: fn(f32) -> bool| setting(&config, name, is_right);
        let is_count = |count: f32| (0.0..=MAX_COUNT).contains(&count) && count.fract() == 0.0;
        let is_share = |share: f32| share > 0.0 && share <= 1.0;
        let max_new_tokens = number("max_new_tokens", |count| {
            (1.0..=MAX_COUNT).contains(&count) && count.fract() == 0.0
        });
        Ok(Self {
            max_new_tokens: max_new_tokens.map(|count| count as u32),
            temperature: number("temperature", |value| value.is_finite() && value >= 0.0),
            top_k: number("top_k", is_count).map(|count| count as u32),
            top_p: number("top_p", is_share),
            min_p: number("min_p", |share| (0.0..=1.0).contains(&share)),
            typical_p: number("typical_p", is_share),
            repetition_penalty: number("repetition_penalty", |value| {
                value.is_finite() && value > 0.0
            }),
        })
    }
}

/// The settings that transformers would heed.
fn unheeded(config: &Value) -> impl Iterator<Item = &'static str> {
    let changes = |(name, neutral): &(&'static str, f64)| match config.get(name) {
        None | Some(Value::Null) => false,
        Some(Value::Array(values)) => !values.is_empty(),
        Some(Value::Object(fields)) => !fields.is_empty(),
        Some(value) => value.as_f64() != Some(*neutral),
    };
    UNHEEDED.iter().filter(move |setting| changes(setting)).map(|(name, _)| *name)
}

/// A number of the configuration; `None` if it isn't there or can't be meant.
fn setting(config: &Value, name: &str, is_right: fn(f32) -> bool) -> Option<f32> {
    let value = config.get(name).filter(|value| !value.is_null())?;
    let number = value.as_f64().map(|number| number as f32).filter(|number| is_right(*number));
    if number.is_none() {
        tracing::warn!(name, %value, "the model's generation_config.json has what cannot be meant");
    }
    number
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> GenerationConfig {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("generation_config.json"), text).unwrap();
        GenerationConfig::load(folder.path()).unwrap()
    }

    #[test]
    fn what_the_file_says_is_taken_and_the_rest_is_left_open() {
        let config = load(
            r#"{"do_sample": false, "temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.05,
                "typical_p": 0.9, "repetition_penalty": 1.05, "max_new_tokens": 2048,
                "eos_token_id": [1, 2], "transformers_version": "4.37.0"}"#,
        );
        let expected = GenerationConfig {
            max_new_tokens: Some(2048),
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.8),
            min_p: Some(0.05),
            typical_p: Some(0.9),
            repetition_penalty: Some(1.05),
        };
        assert_eq!(config, expected);
        assert_eq!(load(r#"{"temperature": null}"#), GenerationConfig::default());
        let missing = GenerationConfig::load(Path::new("nowhere")).unwrap();
        assert_eq!(missing, GenerationConfig::default());
    }

    #[test]
    fn what_transformers_would_heed_is_known_and_neutral_values_are_nothing() {
        let config = serde_json::json!({
            "num_beams": 4, "no_repeat_ngram_size": 0, "suppress_tokens": [3], "bad_words_ids": [],
            "guidance_scale": null, "forced_eos_token_id": 2, "temperature": 0.5
        });
        let found: Vec<_> = unheeded(&config).collect();
        assert_eq!(found, ["num_beams", "suppress_tokens", "forced_eos_token_id"]);
        assert_eq!(unheeded(&Value::Null).count(), 0);
    }

    #[test]
    fn values_that_cannot_be_meant_are_left_out_alone() {
        let config = load(
            r#"{"temperature": -1, "top_k": 1.5, "top_p": 0, "min_p": 2, "typical_p": "all",
                "repetition_penalty": 0, "max_new_tokens": 64}"#,
        );
        let expected = GenerationConfig { max_new_tokens: Some(64), ..GenerationConfig::default() };
        assert_eq!(config, expected);
    }
}
