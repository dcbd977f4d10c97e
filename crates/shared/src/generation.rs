//! How an answer is generated, as far as somebody has said it.
//!
//! A query's line, the command line, the model's generation configuration and flotilla's defaults say it in
//! this order; [`Generation::or`] puts them together. Only the worker knows the model, so what nobody said stays
//! open until there.

use std::collections::BTreeMap;
use std::fmt::Display;

use serde::{Deserialize, Serialize};

use crate::json;

/// Most tokens that may be asked for: more than any model's window.
pub const MAX_NEW_TOKENS: u32 = 10_000_000;
/// Most of the likeliest tokens whose log-probabilities may be asked for.
pub const MAX_LOGPROBS: u32 = 20;

/// What the chat template gets from flotilla itself, or what is no variable of it but says how transformers
/// renders it.
const TAKEN_VARIABLES: [&str; 5] =
    ["messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"];

/// How an answer is generated; `None` leaves it to whoever says it next.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Generation {
    /// Most tokens to generate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<u32>,
    /// Tokens to generate before the answer may end by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_new_tokens: Option<u32>,
    /// Sampling temperature; 0 takes the most likely token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Nucleus: the smallest set of tokens whose probabilities sum to at least this; 1 keeps all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Number of most likely tokens to choose from; 0 keeps all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Least probability of a token, as a fraction of the most likely one's; 0 keeps all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Probability of the locally typical set; 1 keeps all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub typical_p: Option<f32>,
    /// Makes tokens of the prompt and the answer less likely where above 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Taken off the logits of tokens of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// Taken off the logits of tokens of the answer, as often as they are in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_bias: Option<BTreeMap<u32, f32>>,
    /// Texts that end the answer; not part of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Vec<String>>,
    /// Tokens that end the answer; not part of its text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_token_ids: Option<Vec<u32>>,
    /// Whether to go on behind the model's end-of-text token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignore_eos: Option<bool>,
    /// Whether to give the log-probabilities of the tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<bool>,
    /// How many of the most likely tokens to give beside each token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<u32>,
    /// Seed of the random numbers: of a run, or of the one job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Variables of the model's chat template; each by itself is left to whoever says it next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template_kwargs: Option<json::Object>,
}

impl Generation {
    /// What holds where nobody says anything: all that a model's generation configuration can say too.
    pub const DEFAULTS: Self = Self {
        max_new_tokens: Some(512),
        min_new_tokens: None,
        temperature: Some(0.2),
        top_p: Some(0.95),
        top_k: Some(0),
        min_p: Some(0.0),
        typical_p: Some(1.0),
        repetition_penalty: Some(1.0),
        presence_penalty: None,
        frequency_penalty: None,
        logit_bias: None,
        stop: Some(Vec::new()),
        stop_token_ids: None,
        ignore_eos: None,
        logprobs: None,
        top_logprobs: None,
        seed: Some(0),
        chat_template_kwargs: None,
    };

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// This, and what `other` says of the rest.
    #[must_use]
    pub fn or(self, other: &Self) -> Self {
        Self {
            max_new_tokens: self.max_new_tokens.or(other.max_new_tokens),
            min_new_tokens: self.min_new_tokens.or(other.min_new_tokens),
            temperature: self.temperature.or(other.temperature),
            top_p: self.top_p.or(other.top_p),
            top_k: self.top_k.or(other.top_k),
            min_p: self.min_p.or(other.min_p),
            typical_p: self.typical_p.or(other.typical_p),
            repetition_penalty: self.repetition_penalty.or(other.repetition_penalty),
            presence_penalty: self.presence_penalty.or(other.presence_penalty),
            frequency_penalty: self.frequency_penalty.or(other.frequency_penalty),
            logit_bias: self.logit_bias.or_else(|| other.logit_bias.clone()),
            stop: self.stop.or_else(|| other.stop.clone()),
            stop_token_ids: self.stop_token_ids.or_else(|| other.stop_token_ids.clone()),
            ignore_eos: self.ignore_eos.or(other.ignore_eos),
            logprobs: self.logprobs.or(other.logprobs),
            top_logprobs: self.top_logprobs.or(other.top_logprobs),
            seed: self.seed.or(other.seed),
            chat_template_kwargs: match (self.chat_template_kwargs, &other.chat_template_kwargs) {
                (Some(own), Some(other)) => Some(own.or(other)),
                (own, other) => own.or_else(|| other.clone()),
            },
        }
    }

    /// Checks what it says; the error names everything that can't be meant.
    pub fn validate(&self) -> Result<(), String> {
        let mut problems = Problems::default();
        problems.check("max_new_tokens", self.max_new_tokens, WHOLE_TOKENS, |count| {
            (1..=MAX_NEW_TOKENS).contains(count)
        });
        problems.check("min_new_tokens", self.min_new_tokens, "at most max_new_tokens", |count| {
            *count <= self.max_new_tokens.unwrap_or(MAX_NEW_TOKENS)
        });
        let positive = |value: &f32| value.is_finite() && *value > 0.0;
        problems.check("temperature", self.temperature, "a number of at least 0", |value| {
            *value == 0.0 || positive(value)
        });
        let shares = [("top_p", self.top_p), ("typical_p", self.typical_p)];
        for (name, share) in shares {
            let expected = "a number above 0 and at most 1";
            problems.check(name, share, expected, |share| positive(share) && *share <= 1.0);
        }
        let min_p_range = "a number from 0 to 1";
        problems.check("min_p", self.min_p, min_p_range, |share| (0.0..=1.0).contains(share));
        let repetition = self.repetition_penalty;
        problems.check("repetition_penalty", repetition, "a number above 0", positive);
        for (name, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            let range = -2.0..=2.0;
            problems.check(name, penalty, "a number from -2 to 2", |value| range.contains(value));
        }
        for (token, bias) in self.logit_bias.iter().flatten() {
            let name = format!("logit_bias of token {token}");
            problems.check(&name, Some(*bias), "a finite number", |bias| bias.is_finite());
        }
        let has_empty_stop = self.stop.iter().flatten().any(String::is_empty);
        let empty_stop = has_empty_stop.then_some("an empty one");
        problems.check("stop", empty_stop, "texts that say something", |_| false);
        let expected = "a whole number from 0 to 20";
        problems.check("top_logprobs", self.top_logprobs, expected, |num| *num <= MAX_LOGPROBS);
        let variables = self.chat_template_kwargs.iter().flat_map(json::Object::names);
        for name in variables.filter(|name| TAKEN_VARIABLES.contains(name)) {
            let expected = "variables that flotilla doesn't set itself";
            problems.check("chat_template_kwargs", Some(name), expected, |_| false);
        }
        problems.into_result()
    }
}

/// What is expected of a number of tokens.
const WHOLE_TOKENS: &str = "a whole number from 1 to 10000000";

/// What is wrong with values, one sentence each.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn check<T: Display>(
        &mut self,
        name: &str,
        value: Option<T>,
        expected: &str,
        is_right: impl FnOnce(&T) -> bool,
    ) {
        if let Some(value) = value.filter(|value| !is_right(value)) {
            self.0.push(format!("{name}: expected {expected}, given {value}"));
        }
    }

    fn into_result(self) -> Result<(), String> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0.join("; ")) }
    }
}

/// A job's generation on the wire.
///
/// Workers from before there were optional fields want six of them. Those are always there, with flotilla's
/// default where nobody said anything; `unset` names these for workers that know better.
pub(crate) mod wire {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Generation;

    #[derive(Serialize, Deserialize)]
    struct Wire {
        #[serde(flatten)]
        generation: Generation,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        unset: Vec<String>,
    }

    pub(crate) fn serialize<S: Serializer>(
        generation: &Generation,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let mut wire = Wire { generation: generation.clone(), unset: Vec::new() };
        let Wire { generation, unset } = &mut wire;
        let defaults = Generation::DEFAULTS;
        let mut note = |name: &str| unset.push(name.to_owned());
        fill(&mut generation.max_new_tokens, defaults.max_new_tokens, || note("max_new_tokens"));
        fill(&mut generation.temperature, defaults.temperature, || note("temperature"));
        fill(&mut generation.top_p, defaults.top_p, || note("top_p"));
        fill(&mut generation.top_k, defaults.top_k, || note("top_k"));
        fill(&mut generation.stop, defaults.stop, || note("stop"));
        fill(&mut generation.seed, defaults.seed, || note("seed"));
        wire.serialize(serializer)
    }

    fn fill<T>(field: &mut Option<T>, default: Option<T>, note: impl FnOnce()) {
        if field.is_none() {
            *field = default;
            note();
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Generation, D::Error> {
        let Wire { mut generation, unset } = Wire::deserialize(deserializer)?;
        for name in unset {
            match name.as_str() {
                "max_new_tokens" => generation.max_new_tokens = None,
                "temperature" => generation.temperature = None,
                "top_p" => generation.top_p = None,
                "top_k" => generation.top_k = None,
                "stop" => generation.stop = None,
                "seed" => generation.seed = None,
                // A newer producer's field, which nothing here fills.
                _ => {}
            }
        }
        Ok(generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The generation of a job as it was before there were optional fields.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct OldGeneration {
        max_new_tokens: u32,
        temperature: f32,
        top_p: f32,
        top_k: u32,
        stop: Vec<String>,
        seed: u64,
    }

    /// What of a job matters here.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct OldJob {
        generation: OldGeneration,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct NewJob {
        #[serde(with = "wire")]
        generation: Generation,
    }

    fn everything() -> Generation {
        Generation {
            max_new_tokens: Some(7),
            min_new_tokens: Some(2),
            temperature: Some(0.7),
            top_p: Some(0.5),
            top_k: Some(9),
            min_p: Some(0.1),
            typical_p: Some(0.9),
            repetition_penalty: Some(1.2),
            presence_penalty: Some(-0.5),
            frequency_penalty: Some(0.5),
            logit_bias: Some([(3, -100.0), (70_000, 1.5)].into()),
            stop: Some(vec!["\n".to_owned()]),
            stop_token_ids: Some(vec![5, 6]),
            ignore_eos: Some(true),
            logprobs: Some(true),
            top_logprobs: Some(3),
            seed: Some(u64::MAX),
            chat_template_kwargs: Some(variables(
                r#"{"enable_thinking": false, "b": [1, -1], "a": 0.5}"#,
            )),
        }
    }

    fn variables(text: &str) -> json::Object {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn jobs_of_older_producers_say_exactly_what_they_said() {
        let generation = OldGeneration {
            max_new_tokens: 512,
            temperature: 0.2,
            top_p: 0.95,
            top_k: 0,
            stop: vec!["END".to_owned()],
            seed: 11,
        };
        let bytes = rmp_serde::to_vec_named(&OldJob { generation }).unwrap();
        let job: NewJob = rmp_serde::from_slice(&bytes).unwrap();
        let expected = Generation {
            max_new_tokens: Some(512),
            temperature: Some(0.2),
            top_p: Some(0.95),
            top_k: Some(0),
            stop: Some(vec!["END".to_owned()]),
            seed: Some(11),
            ..Generation::default()
        };
        assert_eq!(job.generation, expected);
    }

    #[test]
    fn older_workers_read_new_jobs_with_flotillas_defaults() {
        let said = Generation {
            temperature: Some(0.0),
            min_p: Some(0.1),
            logit_bias: Some([(3, 1.0)].into()),
            seed: Some(11),
            ..Generation::default()
        };
        let bytes = rmp_serde::to_vec_named(&NewJob { generation: said }).unwrap();
        let job: OldJob = rmp_serde::from_slice(&bytes).unwrap();
        let expected = OldGeneration {
            max_new_tokens: 512,
            temperature: 0.0,
            top_p: 0.95,
            top_k: 0,
            stop: Vec::new(),
            seed: 11,
        };
        assert_eq!(job.generation, expected);
    }

    #[test]
    fn what_nobody_said_is_still_open_behind_the_wire() {
        for generation in [Generation::default(), Generation::DEFAULTS, everything()] {
            let job = NewJob { generation };
            let bytes = rmp_serde::to_vec_named(&job).unwrap();
            assert_eq!(rmp_serde::from_slice::<NewJob>(&bytes).unwrap(), job);
            let line = serde_json::to_string(&job.generation).unwrap();
            assert_eq!(serde_json::from_str::<Generation>(&line).unwrap(), job.generation);
        }
    }

    #[test]
    fn who_says_it_first_is_heard() {
        assert_eq!(Generation::default().or(&everything()), everything());
        assert_eq!(everything().or(&Generation::DEFAULTS), everything());
        let line = Generation { top_k: Some(1), logprobs: Some(false), ..Generation::default() };
        let expected = Generation { top_k: Some(1), logprobs: Some(false), ..everything() };
        assert_eq!(line.or(&everything()), expected);
        // Each variable of the template by itself.
        let line = Generation {
            chat_template_kwargs: Some(variables(r#"{"a": null}"#)),
            ..Generation::default()
        };
        let both = variables(r#"{"a": null, "enable_thinking": false, "b": [1, -1]}"#);
        let expected = Generation { chat_template_kwargs: Some(both), ..everything() };
        assert_eq!(line.or(&everything()), expected);
    }

    #[test]
    fn everything_that_cannot_be_meant_is_named() {
        assert_eq!(everything().validate(), Ok(()));
        assert_eq!(Generation::default().validate(), Ok(()));
        assert_eq!(Generation::DEFAULTS.validate(), Ok(()));
        let wrong = Generation {
            max_new_tokens: Some(0),
            min_new_tokens: Some(1),
            temperature: Some(f32::NAN),
            top_p: Some(0.0),
            top_k: None,
            min_p: Some(1.5),
            typical_p: Some(-0.5),
            repetition_penalty: Some(0.0),
            presence_penalty: Some(2.5),
            frequency_penalty: Some(f32::NEG_INFINITY),
            logit_bias: Some([(7, f32::INFINITY)].into()),
            stop: Some(vec![String::new()]),
            top_logprobs: Some(21),
            chat_template_kwargs: Some(variables(r#"{"enable_thinking": true, "messages": []}"#)),
            ..Generation::default()
        };
        let text = wrong.validate().unwrap_err();
        for expected in [
            "max_new_tokens: expected a whole number from 1 to 10000000, given 0",
            "min_new_tokens: expected at most max_new_tokens, given 1",
            "temperature: expected a number of at least 0, given NaN",
            "top_p: expected a number above 0 and at most 1, given 0",
            "min_p: expected a number from 0 to 1, given 1.5",
            "typical_p",
            "repetition_penalty: expected a number above 0, given 0",
            "presence_penalty: expected a number from -2 to 2, given 2.5",
            "frequency_penalty",
            "logit_bias of token 7: expected a finite number, given inf",
            "stop: expected texts that say something, given an empty one",
            "top_logprobs: expected a whole number from 0 to 20, given 21",
            "chat_template_kwargs: expected variables that flotilla doesn't set itself, given messages",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        for temperature in [-1.0, f32::INFINITY] {
            let wrong = Generation { temperature: Some(temperature), ..Generation::default() };
            assert!(wrong.validate().is_err(), "{temperature}");
        }
        let large = Generation { max_new_tokens: Some(1_000_000_000), ..Generation::default() };
        assert!(large.validate().is_err());
    }
}
