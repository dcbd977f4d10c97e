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
//!    left, renormalised (`candidates`, on what `row` says of the whole vocabulary). This is transformers' order. vLLM has `min_p` before `top_k` and
//!    `top_p`, which only matters where several of them are set.
//! 5. A number that the seed and the position give is looked up in what is left (`draw`).

mod adjust;
mod candidates;
mod draw;
mod logprobs;
mod params;
mod row;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, PoisonError};

use crate::kernels::{Simd, Threads};
use crate::step::TokenId;

pub(crate) use adjust::SamplingState;
use candidates::Candidates;
pub use logprobs::{MAX_LOGPROBS, TokenLogprobs};
pub use params::SamplingParams;
use row::argmax;

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

/// A choice that depends on nothing but the row of logits and these numbers: one that a device can make where its logits are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PlainChoice {
    /// 0 takes the likeliest token.
    pub(crate) temperature: f32,
    /// 0 is all of them.
    pub(crate) top_k: usize,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    /// Where it falls among the tokens that are left, a fraction of 2^64.
    pub(crate) draw: u64,
}

impl PlainChoice {
    /// The likeliest token.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) const LIKELIEST: Self =
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, draw: 0 };

    /// That of a sequence's next token; `None` where the choice depends on more.
    pub(crate) fn of(state: &SamplingState) -> Option<Self> {
        let params = state.params();
        if state.adjusts() || params.typical_p < 1.0 || params.logprobs.is_some() {
            return None;
        }
        let draw = draw::uniform(params.seed, state.num_generated() as u64);
        Some(Self {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            draw: (draw * 2.0_f64.powi(64)) as u64,
        })
    }
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chosen {
    pub(crate) token: TokenId,
    /// Where the sequence asks for them.
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// Chooses tokens. What it holds between calls is memory to be used again.
#[derive(Debug)]
pub(crate) struct Sampler {
    simd: Simd,
    adjusted: Vec<f32>,
    candidates: Candidates,
    logprobs: logprobs::Scratch,
}

/// A sampler for each thread.
#[derive(Debug)]
pub(crate) struct Samplers(Vec<Mutex<Sampler>>);

impl Samplers {
    pub(crate) fn new(num_threads: usize) -> Self {
        Self((0..num_threads.max(1)).map(|_| Mutex::default()).collect())
    }

    /// Calls `choose` with a sampler for each of `rows`, which the threads share. What is chosen does not depend
    /// on which sampler it is.
    pub(crate) fn each<T: Send>(
        &self,
        threads: &Threads,
        rows: &mut [T],
        choose: impl Fn(&mut Sampler, usize, &mut T) + Send + Sync,
    ) {
        let choose = |index: usize, row: &mut T| {
            let sampler = &self.0[threads.current()];
            // A thread that panicked leaves nothing in its sampler that is read again.
            choose(&mut sampler.lock().unwrap_or_else(PoisonError::into_inner), index, row);
        };
        match rows {
            [row] => choose(0, row),
            rows => {
                threads.share_chunks(rows, 1, |index, (): &mut (), row| choose(index, &mut row[0]));
            }
        }
    }
}

impl Default for Sampler {
    fn default() -> Self {
        Self {
            simd: Simd::detect(),
            adjusted: Vec::new(),
            candidates: Candidates::default(),
            logprobs: logprobs::Scratch::default(),
        }
    }
}

impl Sampler {
    /// Chooses the next token of a sequence from the row of logits at its end.
    pub(crate) fn sample(
        &mut self,
        logits: &[f32],
        state: &SamplingState,
    ) -> Result<Chosen, SampleError> {
        let token = self.choose(logits, state)?;
        let logprobs = state.params().logprobs.map(|num_top| {
            TokenLogprobs::of(self.simd, logits, (token, num_top), &mut self.logprobs)
        });
        Ok(Chosen { token, logprobs })
    }

    fn choose(&mut self, logits: &[f32], state: &SamplingState) -> Result<TokenId, SampleError> {
        let params = state.params();
        let adjusted = state.adjust(logits, &mut self.adjusted);
        // What is forbidden may have been NaN.
        let best = match adjusted {
            Some(adjusted) => argmax(self.simd, logits).and(argmax(self.simd, adjusted)),
            None => argmax(self.simd, logits),
        }?;
        let best = best.ok_or(SampleError::NothingPossible)?;
        if params.temperature <= 0.0 || params.top_k == 1 {
            return Ok(best);
        }
        let logits = adjusted.unwrap_or(logits);
        self.candidates.restrict(self.simd, logits, logits[best as usize], params);
        let draw = draw::uniform(params.seed, state.num_generated() as u64);
        Ok(self.candidates.pick(draw).unwrap_or(best))
    }
}
