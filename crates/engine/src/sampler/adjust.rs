//! What of a sequence its next choice depends on, and how that changes the logits.

use std::collections::HashMap;

use super::SamplingParams;
use crate::step::TokenId;

/// A sequence's parameters and what of its tokens matters for the next one. A function of the request and the
/// tokens generated so far.
#[derive(Clone, Debug)]
pub(crate) struct SamplingState {
    params: SamplingParams,
    /// Tokens that end the answer.
    ends: Vec<TokenId>,
    /// The tokens of the prompt and the answer, and how often each was generated; empty without a penalty.
    counts: HashMap<TokenId, u32>,
    num_generated: usize,
}

impl SamplingState {
    /// The state of a sequence that has nothing but its prompt, with a model of these end-of-sequence tokens.
    pub(crate) fn new(
        params: SamplingParams,
        prompt: &[TokenId],
        eos_token_ids: &[TokenId],
    ) -> Self {
        let eos = if params.ignore_eos { &[] } else { eos_token_ids };
        let ends = [eos, &params.stop_token_ids].concat();
        let prompt = if params.repetition_penalty == 1.0 { &[] } else { prompt };
        let counts = prompt.iter().map(|token| (*token, 0)).collect();
        Self { params, ends, counts, num_generated: 0 }
    }

    /// The parameters.
    pub(crate) fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Number of tokens generated.
    pub(crate) fn num_generated(&self) -> usize {
        self.num_generated
    }

    /// Whether the token ends the answer.
    pub(crate) fn is_end(&self, token: TokenId) -> bool {
        self.ends.contains(&token)
    }

    /// Takes a generated token.
    pub(crate) fn push(&mut self, token: TokenId) {
        self.num_generated += 1;
        if self.params.has_penalty() {
            *self.counts.entry(token).or_default() += 1;
        }
    }

    /// The logits as bias, penalties and `min_new_tokens` leave them, in `scratch`; `None` if nothing changes.
    pub(super) fn adjust<'l>(
        &self,
        logits: &[f32],
        scratch: &'l mut Vec<f32>,
    ) -> Option<&'l [f32]> {
        if !self.adjusts() {
            return None;
        }
        let params = &self.params;
        scratch.clear();
        scratch.extend_from_slice(logits);
        for (token, bias) in &params.logit_bias {
            change(scratch, *token, |logit| logit + bias);
        }
        for (token, &count) in &self.counts {
            change(scratch, *token, |logit| self.penalise(logit, count));
        }
        if self.is_too_early() {
            for token in &self.ends {
                change(scratch, *token, |_| f32::NEG_INFINITY);
            }
        }
        Some(scratch)
    }

    /// Whether [`Self::adjust`] changes anything.
    pub(super) fn adjusts(&self) -> bool {
        !self.params.logit_bias.is_empty() || !self.counts.is_empty() || self.is_too_early()
    }

    /// Whether tokens that end the answer are not possible yet.
    fn is_too_early(&self) -> bool {
        self.num_generated < self.params.min_new_tokens && !self.ends.is_empty()
    }

    /// The logit of a token that the sequence contains, after `count` times in the answer.
    fn penalise(&self, logit: f32, count: u32) -> f32 {
        let params = &self.params;
        let repetition = params.repetition_penalty;
        let logit = if logit > 0.0 { logit / repetition } else { logit * repetition };
        if count == 0 {
            return logit;
        }
        logit - params.frequency_penalty * count as f32 - params.presence_penalty
    }
}

/// Changes the logit of a token, if the row has it.
fn change(logits: &mut [f32], token: TokenId, new: impl FnOnce(f32) -> f32) {
    if let Some(logit) = logits.get_mut(token as usize) {
        *logit = new(*logit);
    }
}
