//! What a request says about how its tokens are chosen.

use std::collections::BTreeMap;
use std::fmt::Display;

use super::MAX_LOGPROBS;
use crate::Error;
use crate::step::TokenId;

/// How the tokens of one sequence are chosen, and when it ends. The default is greedy, without anything that
/// changes the distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// Tokens to generate before one may end the answer, or a stop string does.
    pub min_new_tokens: usize,
    /// 0 takes the likeliest token; higher flattens the distribution.
    pub temperature: f32,
    /// Samples from that many likeliest tokens; 0 is all of them.
    pub top_k: usize,
    /// Samples from the smallest set of tokens with at least this probability; 1 is all of them.
    pub top_p: f32,
    /// Samples from the tokens that are at least this likely, as a fraction of the likeliest; 0 is all of them.
    pub min_p: f32,
    /// Samples from the smallest set with at least this probability of the tokens whose information is closest
    /// to what the distribution lets expect (locally typical sampling); 1 is all of them.
    pub typical_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens of the prompt and the answer; 1
    /// changes nothing, more makes them less likely.
    pub repetition_penalty: f32,
    /// Is taken off the logits of tokens of the answer; 0 changes nothing.
    pub presence_penalty: f32,
    /// Is taken off the logit of a token once for each time that it is in the answer; 0 changes nothing.
    pub frequency_penalty: f32,
    /// Is added to the logits of these tokens.
    pub logit_bias: BTreeMap<TokenId, f32>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer; their text is not part of it.
    pub stop_token_ids: Vec<TokenId>,
    /// Whether to go on behind an end-of-sequence token.
    pub ignore_eos: bool,
    /// Whether to give the log-probability of each token, and of how many of the likeliest beside it.
    pub logprobs: Option<usize>,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            min_new_tokens: 0,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Checks the parameters; the error names everything that is wrong with them.
    pub fn validate(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        let mut check = |is_right: bool, name: &str, expected: &str, given: &dyn Display| {
            if !is_right {
                problems.push(format!("{name} must be {expected}, got {given}"));
            }
        };
        let (min, max) = (self.min_new_tokens, self.max_new_tokens);
        check(max > 0, "max_new_tokens", "at least 1", &max);
        check(min <= max, "min_new_tokens", "at most max_new_tokens", &min);
        let temperature = self.temperature;
        let is_right = temperature.is_finite() && temperature >= 0.0;
        check(is_right, "temperature", "0 or more", &temperature);
        for (name, share) in [("top_p", self.top_p), ("typical_p", self.typical_p)] {
            check(share > 0.0 && share <= 1.0, name, "above 0 and at most 1", &share);
        }
        check((0.0..=1.0).contains(&self.min_p), "min_p", "from 0 to 1", &self.min_p);
        let penalty = self.repetition_penalty;
        check(penalty.is_finite() && penalty > 0.0, "repetition_penalty", "above 0", &penalty);
        for (name, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            check(penalty.is_finite(), name, "a finite number", &penalty);
        }
        for (token, bias) in &self.logit_bias {
            check(bias.is_finite(), &format!("logit_bias of {token}"), "a finite number", bias);
        }
        check(!self.stop.iter().any(String::is_empty), "a stop string", "filled", &"an empty one");
        let num_top = self.logprobs.unwrap_or(0);
        check(num_top <= MAX_LOGPROBS, "logprobs", &format!("at most {MAX_LOGPROBS}"), &num_top);
        if problems.is_empty() { Ok(()) } else { Err(Error::Reject(problems.join("; "))) }
    }

    /// Whether the tokens so far change the next one's logits.
    pub(super) fn has_penalty(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validation_names_every_problem() {
        let bad = SamplingParams {
            max_new_tokens: 0,
            min_new_tokens: 1,
            temperature: f32::NAN,
            top_p: 0.0,
            min_p: -0.1,
            typical_p: 1.1,
            repetition_penalty: 0.0,
            presence_penalty: f32::INFINITY,
            frequency_penalty: f32::NAN,
            logit_bias: [(7, f32::NEG_INFINITY)].into(),
            stop: vec![String::new()],
            logprobs: Some(21),
            ..SamplingParams::default()
        };
        let text = bad.validate().unwrap_err().to_string();
        for part in [
            "max_new_tokens must be at least 1, got 0",
            "min_new_tokens",
            "temperature",
            "top_p",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias of 7",
            "stop",
            "logprobs must be at most 20, got 21",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(SamplingParams::default().validate().is_ok());
    }
}
