//! From what was said about generation to the engine's parameters, and from its log-probabilities to the
//! answer's.

use std::collections::HashMap;

use engine::{GenerationConfig, SamplingParams, TokenId, TokenLogprobs, Tokenizer};
use shared::{GeneratedToken, Generation, Logprobs, TokenLogprob};

/// The parameters of a job: what it says, then the model, then flotilla's defaults.
pub(crate) fn sampling_params(asked: &Generation, model: &GenerationConfig) -> SamplingParams {
    let model = Generation {
        max_new_tokens: model.max_new_tokens,
        temperature: model.temperature,
        top_p: model.top_p,
        top_k: model.top_k,
        min_p: model.min_p,
        typical_p: model.typical_p,
        repetition_penalty: model.repetition_penalty,
        ..Generation::default()
    };
    let resolved = asked.clone().or(&model).or(&Generation::DEFAULTS);
    let count = |count: Option<u32>| count.unwrap_or_default() as usize;
    let min_new_tokens = count(resolved.min_new_tokens);
    // A limit that nobody asked for gives way to what somebody did.
    let least = if asked.max_new_tokens.is_none() { min_new_tokens } else { 0 };
    let neutral = SamplingParams::default();
    let wants_logprobs = resolved.logprobs.unwrap_or(resolved.top_logprobs.is_some());
    SamplingParams {
        max_new_tokens: count(resolved.max_new_tokens).max(least),
        min_new_tokens,
        temperature: resolved.temperature.unwrap_or(neutral.temperature),
        top_p: resolved.top_p.unwrap_or(neutral.top_p),
        top_k: count(resolved.top_k),
        min_p: resolved.min_p.unwrap_or(neutral.min_p),
        typical_p: resolved.typical_p.unwrap_or(neutral.typical_p),
        repetition_penalty: resolved.repetition_penalty.unwrap_or(neutral.repetition_penalty),
        presence_penalty: resolved.presence_penalty.unwrap_or(neutral.presence_penalty),
        frequency_penalty: resolved.frequency_penalty.unwrap_or(neutral.frequency_penalty),
        logit_bias: resolved.logit_bias.unwrap_or_default(),
        stop: resolved.stop.unwrap_or_default(),
        stop_token_ids: resolved.stop_token_ids.unwrap_or_default(),
        ignore_eos: resolved.ignore_eos.unwrap_or_default(),
        logprobs: wants_logprobs.then(|| count(resolved.top_logprobs)),
        seed: resolved.seed.unwrap_or_default(),
    }
}

/// The log-probabilities of an answer with the texts of their tokens.
pub(crate) fn logprobs(
    tokenizer: &Tokenizer,
    token_ids: &[TokenId],
    logprobs: &[TokenLogprobs],
) -> Logprobs {
    let mut texts: HashMap<TokenId, String> = HashMap::new();
    let mut entry = |token_id: TokenId, logprob| {
        let text = texts.entry(token_id).or_insert_with(|| tokenizer.token_text(token_id));
        TokenLogprob { token: text.clone(), token_id, logprob }
    };
    let content = token_ids.iter().zip(logprobs).map(|(token_id, logprobs)| GeneratedToken {
        token: entry(*token_id, logprobs.logprob),
        top_logprobs: logprobs.top.iter().map(|(id, logprob)| entry(*id, *logprob)).collect(),
    });
    Logprobs { content: content.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_job_comes_before_the_model_and_the_model_before_flotilla() {
        let model = GenerationConfig {
            temperature: Some(0.6),
            top_k: Some(20),
            max_new_tokens: Some(64),
            repetition_penalty: Some(1.1),
            ..GenerationConfig::default()
        };
        let asked = Generation { top_k: Some(5), seed: Some(9), ..Generation::default() };
        let params = sampling_params(&asked, &model);
        let expected = SamplingParams {
            max_new_tokens: 64,
            temperature: 0.6,
            top_k: 5,
            top_p: 0.95,
            repetition_penalty: 1.1,
            seed: 9,
            ..SamplingParams::default()
        };
        assert_eq!(params, expected);
        // What `--generation-config none` asks for.
        let params = sampling_params(&asked.or(&Generation::DEFAULTS), &model);
        let expected = SamplingParams {
            max_new_tokens: 512,
            temperature: 0.2,
            repetition_penalty: 1.0,
            ..expected
        };
        assert_eq!(params, expected);
    }

    #[test]
    fn a_default_length_gives_way_to_the_least_length_asked_for() {
        let asked = Generation { min_new_tokens: Some(600), ..Generation::default() };
        let params = sampling_params(&asked, &GenerationConfig::default());
        assert_eq!((params.min_new_tokens, params.max_new_tokens), (600, 600));
        let asked = Generation { max_new_tokens: Some(5), ..asked };
        let params = sampling_params(&asked, &GenerationConfig::default());
        assert!(params.validate().is_err());
    }

    #[test]
    fn logprobs_can_be_asked_for_and_taken_back() {
        let logprobs = |logprobs, top_logprobs| {
            let asked = Generation { logprobs, top_logprobs, ..Generation::default() };
            sampling_params(&asked, &GenerationConfig::default()).logprobs
        };
        assert_eq!(logprobs(None, None), None);
        assert_eq!(logprobs(Some(true), None), Some(0));
        assert_eq!(logprobs(None, Some(3)), Some(3));
        assert_eq!(logprobs(Some(true), Some(3)), Some(3));
        assert_eq!(logprobs(Some(false), Some(3)), None);
    }
}
