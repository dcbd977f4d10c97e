//! The tokens that may be drawn: what temperature, top-k, top-p, min-p and typical sampling leave of a row.
//!
//! Nothing here sorts a whole vocabulary: what can't be in a set is left out at once, and sets are cut off with
//! selections of growing size.

use std::cmp::Ordering;

use super::SamplingParams;
use super::row::{Ranked, Weights, likeliest, log_weight};
use crate::kernels::Simd;
use crate::step::TokenId;

/// Tokens that are put in order at first; four times as many whenever they are not enough.
const FIRST_CHUNK: usize = 64;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token: TokenId,
    /// Logarithm of its unnormalised probability: 0 for the likeliest token.
    log_weight: f64,
    /// Its unnormalised probability: 1 for the likeliest token.
    weight: f64,
}

/// The tokens that may be drawn from one row, in the order in which a draw goes through them.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    /// Of the whole row, or of what top-k leaves of it.
    row: Weights,
    top: Vec<Ranked>,
    top_logits: Vec<f32>,
    /// The candidates.
    listed: Vec<Candidate>,
    /// Whether all of the row are candidates instead, which spares the list.
    is_whole: bool,
}

impl Candidates {
    /// Starts anew with what the parameters leave of a row whose highest logit is `best`.
    pub(super) fn restrict(
        &mut self,
        simd: Simd,
        logits: &[f32],
        best: f32,
        params: &SamplingParams,
    ) {
        let scale = (f64::from(best), f64::from(params.temperature));
        self.listed.clear();
        self.is_whole = false;
        let has_top_k = params.top_k > 0 && params.top_k < logits.len();
        if has_top_k {
            self.list_top_k(simd, logits, scale, params.top_k);
        } else {
            self.row.compute(simd, logits, scale);
            if params.top_p >= 1.0 && params.min_p <= 0.0 && params.typical_p >= 1.0 {
                self.is_whole = true;
                return;
            }
            self.list_row(logits, scale, params);
        }
        if params.top_p < 1.0 {
            self.keep_smallest_set(f64::from(params.top_p) * self.row.total(), likelier);
        }
        if params.min_p > 0.0 {
            let least = f64::from(params.min_p);
            self.listed.retain(|candidate| candidate.weight >= least);
        }
        if params.typical_p < 1.0 {
            self.keep_typical(params.typical_p);
        }
    }

    /// The token in which `draw`, from `[0, 1)`, falls; `None` when there is none.
    pub(super) fn pick(&self, draw: f64) -> Option<TokenId> {
        if self.is_whole {
            return self.row.pick(draw);
        }
        let target = draw * self.total();
        let mut mass = 0.0;
        let reached = self.listed.iter().find(|candidate| {
            mass += candidate.weight;
            mass > target
        });
        reached.or(self.listed.last()).map(|candidate| candidate.token)
    }

    /// Weights by token, 0 for those that are no candidates.
    #[cfg(test)]
    pub(super) fn weights(&self, vocab_size: usize) -> Vec<f64> {
        if self.is_whole {
            return self.row.as_slice().to_vec();
        }
        let mut weights = vec![0.0; vocab_size];
        for candidate in &self.listed {
            weights[candidate.token as usize] = candidate.weight;
        }
        weights
    }

    fn total(&self) -> f64 {
        self.listed.iter().map(|candidate| candidate.weight).sum()
    }

    /// Lists the `top_k` likeliest tokens.
    fn list_top_k(&mut self, simd: Simd, logits: &[f32], scale: (f64, f64), top_k: usize) {
        likeliest(simd, logits, top_k, &mut self.top);
        self.top_logits.clear();
        self.top_logits.extend(self.top.iter().map(|(logit, _)| *logit));
        self.row.compute(simd, &self.top_logits, scale);
        for (&(logit, token), &weight) in self.top.iter().zip(self.row.as_slice()) {
            if weight > 0.0 {
                let log_weight = log_weight(logit, scale.0, scale.1);
                self.listed.push(Candidate { token, log_weight, weight });
            }
        }
    }

    /// Lists the tokens of the row that the other parameters may leave.
    fn list_row(&mut self, logits: &[f32], scale: (f64, f64), params: &SamplingParams) {
        let least = if params.top_p < 1.0 {
            // Together the tokens below it have less than what top-p leaves out, so none of them is in.
            (1.0 - f64::from(params.top_p)) * self.row.total() / logits.len() as f64 * (1.0 - 1e-9)
        } else {
            f64::from(params.min_p)
        };
        for (id, weight) in self.row.as_slice().iter().enumerate() {
            if *weight > 0.0 && *weight >= least {
                let log_weight = log_weight(logits[id], scale.0, scale.1);
                self.listed.push(Candidate { token: id as TokenId, log_weight, weight: *weight });
            }
        }
    }

    /// Keeps the first tokens in an order that together have at least this weight.
    fn keep_smallest_set(
        &mut self,
        wanted: f64,
        order: impl Fn(&Candidate, &Candidate) -> Ordering + Copy,
    ) {
        let mut sorted = 0;
        let mut chunk = FIRST_CHUNK;
        let mut mass = 0.0;
        while sorted < self.listed.len() {
            let rest = &mut self.listed[sorted..];
            if chunk < rest.len() {
                rest.select_nth_unstable_by(chunk - 1, order);
            }
            let end = chunk.min(rest.len());
            rest[..end].sort_unstable_by(order);
            for candidate in &rest[..end] {
                mass += candidate.weight;
                sorted += 1;
                if mass >= wanted {
                    self.listed.truncate(sorted);
                    return;
                }
            }
            chunk *= 4;
        }
    }

    /// Keeps the smallest set with this share of the probability of those tokens whose information is closest
    /// to the entropy (Meister et al., 2023).
    fn keep_typical(&mut self, share: f32) {
        let total = self.total();
        let information = |candidate: &Candidate| total.ln() - candidate.log_weight;
        let entropy: f64 = self
            .listed
            .iter()
            .map(|candidate| candidate.weight / total * information(candidate))
            .sum();
        let distance = |candidate: &Candidate| (information(candidate) - entropy).abs();
        self.keep_smallest_set(f64::from(share) * total, |a, b| {
            distance(a).total_cmp(&distance(b)).then_with(|| likelier(a, b))
        });
    }
}

/// Likeliest first, the lower id first among equals.
fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.log_weight.total_cmp(&a.log_weight).then(a.token.cmp(&b.token))
}
