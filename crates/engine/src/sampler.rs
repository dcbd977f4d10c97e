//! The sampler: a row of logits in, one token out.
//!
//! The choice depends on the row, the sequence's own parameters, its tokens and the position of the token, and
//! on nothing else: not on the batch, not on what was drawn before, not on whether the sequence was preempted
//! or its job delivered twice. The engine calls it once for each row of a step.
//!
//! The order of the operations:
//!
//! 1. `logprobs` are taken: the log-softmax of the row as the model computed it (`logprobs`).
//! 2. The logits change: `logit_bias`, then the repetition, frequency and presence penalties; tokens that end
//!    the answer become impossible before `min_new_tokens` (`adjust`). This is vLLM's order; transformers
//!    has its `sequence_bias` before its `repetition_penalty` too.
//! 3. A temperature of 0 takes the likeliest token, the lowest id among equals.
//! 4. Otherwise `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, each of them on what the one before it
//!    left, renormalised (`candidates`). This is transformers' order. vLLM has `min_p` before `top_k` and
//!    `top_p`, which only matters where several of them are set.
//! 5. A number that the seed and the position give is looked up in what is left (`draw`).

mod adjust;
mod candidates;
mod draw;
mod logprobs;
mod params;
#[cfg(test)]
mod tests;

use crate::step::TokenId;

pub(crate) use adjust::SamplingState;
use candidates::Candidates;
pub use logprobs::{MAX_LOGPROBS, TokenLogprobs};
pub use params::SamplingParams;

/// Why no token can be chosen from a row of logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SampleError {
    /// The model computed something that is not a number.
    #[error("the model's logits contain NaN")]
    NotANumber,
    /// No token is possible: the row is empty or minus infinity throughout.
    #[error("the model's logits leave no token possible")]
    NothingPossible,
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chosen {
    pub(crate) token: TokenId,
    /// Where the sequence asks for them.
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// Chooses tokens. What it holds between calls is memory to be used again.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    adjusted: Vec<f32>,
    candidates: Candidates,
}

impl Sampler {
    /// Chooses the next token of a sequence from the row of logits at its end.
    pub(crate) fn sample(
        &mut self,
        logits: &[f32],
        state: &SamplingState,
    ) -> Result<Chosen, SampleError> {
        if logits.iter().fold(false, |found, logit| found | logit.is_nan()) {
            return Err(SampleError::NotANumber);
        }
        let token = self.choose(logits, state)?;
        let num_top = state.params().logprobs;
        let logprobs = num_top.map(|num_top| TokenLogprobs::of(logits, token, num_top));
        Ok(Chosen { token, logprobs })
    }

    fn choose(&mut self, logits: &[f32], state: &SamplingState) -> Result<TokenId, SampleError> {
        let params = state.params();
        let logits = state.adjust(logits, &mut self.adjusted);
        let best = argmax(logits).ok_or(SampleError::NothingPossible)?;
        if params.temperature <= 0.0 || params.top_k == 1 {
            return Ok(best);
        }
        self.candidates.restrict(logits, logits[best as usize], params);
        let draw = draw::uniform(params.seed, state.num_generated() as u64);
        Ok(self.candidates.pick(draw).unwrap_or(best))
    }
}

/// The likeliest token, the lowest id among equals; `None` where no token is possible.
fn argmax(logits: &[f32]) -> Option<TokenId> {
    let mut best = f32::NEG_INFINITY;
    let mut token = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best {
            (best, token) = (logit, Some(id as TokenId));
        }
    }
    token
}
