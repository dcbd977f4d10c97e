//! Log-probabilities of tokens: the log-softmax of a row of logits as the model computed it, before bias,
//! penalties and temperature, as vLLM gives them by default.

use super::row::{Ranked, Weights, likeliest, log_weight};
use crate::kernels::Simd;
use crate::step::TokenId;

/// Most of the likeliest tokens that are given beside the chosen one.
pub const MAX_LOGPROBS: usize = 20;
/// What stands for minus infinity, which JSON can't say.
const LEAST: f32 = -9999.0;

/// The log-probability of a generated token, and of those that were likeliest in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Its own, at least -9999.
    pub logprob: f32,
    /// The likeliest tokens, as many as asked for, likeliest first and the lower id first among equals. The
    /// generated token may be among them.
    pub top: Vec<(TokenId, f32)>,
}

impl TokenLogprobs {
    /// Those of `token` and of the `num_top` likeliest in a row that leaves a token possible.
    pub(super) fn of(
        simd: Simd,
        logits: &[f32],
        (token, num_top): (TokenId, usize),
        scratch: &mut Scratch,
    ) -> Self {
        let Scratch { top, weights } = scratch;
        // One at least: the highest logit is what the others are measured by.
        likeliest(simd, logits, num_top.max(1), top);
        let best = top.first().map_or(0.0, |best| f64::from(best.0));
        weights.compute(simd, logits, (best, 1.0));
        let log_total = weights.total().ln();
        let logprob = |logit: f32| ((log_weight(logit, best, 1.0) - log_total) as f32).max(LEAST);
        Self {
            logprob: logprob(logits[token as usize]),
            top: top.iter().take(num_top).map(|(logit, token)| (*token, logprob(*logit))).collect(),
        }
    }
}

/// Memory to be used again.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    top: Vec<Ranked>,
    weights: Weights,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(logits: &[f32], token: TokenId, num_top: usize) -> TokenLogprobs {
        TokenLogprobs::of(Simd::detect(), logits, (token, num_top), &mut Scratch::default())
    }

    #[test]
    fn logprobs_are_the_log_softmax_and_the_top_is_in_order() {
        let logits = [1.0_f32, 3.0, 2.0, 3.0, -1.0];
        let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let expected = |id: usize| (f64::from(logits[id]) - total.ln()) as f32;
        let given = of(&logits, 4, 3);
        assert!((given.logprob - expected(4)).abs() < 1e-6);
        assert_eq!(given.top.iter().map(|entry| entry.0).collect::<Vec<_>>(), [1, 3, 2]);
        for (id, logprob) in given.top {
            assert!((logprob - expected(id as usize)).abs() < 1e-6);
        }
        assert_eq!(of(&logits, 0, 0).top, []);
        let all = of(&logits, 0, 20).top;
        assert_eq!(all.len(), 5);
        let sum: f64 = all.iter().map(|entry| f64::from(entry.1).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    }

    #[test]
    fn infinite_logits_give_numbers_that_json_can_say() {
        let logits = [f32::INFINITY, 0.0, f32::INFINITY, f32::NEG_INFINITY];
        let given = of(&logits, 1, 4);
        assert_eq!(given.logprob, LEAST);
        let half = 0.5_f32.ln();
        assert_eq!(given.top, [(0, half), (2, half), (1, LEAST), (3, LEAST)]);
    }
}
