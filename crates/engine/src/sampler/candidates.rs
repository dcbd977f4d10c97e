//! The tokens that may be drawn: what temperature, top-k, top-p, min-p and typical sampling leave of a row.
//!
//! Nothing here sorts a whole vocabulary: sets are cut off with selections of growing size.

use std::cmp::Ordering;

use super::SamplingParams;
use crate::step::TokenId;

/// Tokens that are put in order at first; four times as many whenever they are not enough.
const FIRST_CHUNK: usize = 64;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) token: TokenId,
    /// Logarithm of its unnormalised probability: 0 for the likeliest token.
    log_weight: f64,
    /// Its unnormalised probability: 1 for the likeliest token.
    pub(super) weight: f64,
}

/// The tokens that may be drawn from one row, in the order in which a draw goes through them.
#[derive(Debug, Default)]
pub(super) struct Candidates(Vec<Candidate>);

impl Candidates {
    /// Starts anew with what the parameters leave of a row whose highest logit is `best`.
    pub(super) fn restrict(&mut self, logits: &[f32], best: f32, params: &SamplingParams) {
        self.gather(logits, best, params.temperature);
        self.keep_top_k(params.top_k);
        for candidate in &mut self.0 {
            candidate.weight = candidate.log_weight.exp();
        }
        self.0.retain(|candidate| candidate.weight > 0.0);
        if params.top_p < 1.0 {
            self.keep_smallest_set(params.top_p, likelier);
        }
        if params.min_p > 0.0 {
            let least = f64::from(params.min_p);
            self.0.retain(|candidate| candidate.weight >= least);
        }
        if params.typical_p < 1.0 {
            self.keep_typical(params.typical_p);
        }
    }

    /// The token in which `draw`, from `[0, 1)`, falls; `None` when there is none.
    pub(super) fn pick(&self, draw: f64) -> Option<TokenId> {
        let target = draw * self.total();
        let mut mass = 0.0;
        let reached = self.0.iter().find(|candidate| {
            mass += candidate.weight;
            mass > target
        });
        reached.or(self.0.last()).map(|candidate| candidate.token)
    }

    /// What is left.
    #[cfg(test)]
    pub(super) fn as_slice(&self) -> &[Candidate] {
        &self.0
    }

    fn total(&self) -> f64 {
        self.0.iter().map(|candidate| candidate.weight).sum()
    }

    /// Takes the tokens of a row that are possible, in the order of their ids.
    fn gather(&mut self, logits: &[f32], best: f32, temperature: f32) {
        let (best, temperature) = (f64::from(best), f64::from(temperature));
        let candidate = |(id, &logit): (usize, &f32)| {
            let logit = f64::from(logit);
            // Of infinite logits there may be several.
            let log_weight = if logit == best { 0.0 } else { (logit - best) / temperature };
            Candidate { token: id as TokenId, log_weight, weight: 0.0 }
        };
        self.0.clear();
        self.0.extend(logits.iter().enumerate().map(candidate));
    }

    fn keep_top_k(&mut self, top_k: usize) {
        if top_k > 0 && top_k < self.0.len() {
            self.0.select_nth_unstable_by(top_k - 1, likelier);
            self.0.truncate(top_k);
            self.0.sort_unstable_by(likelier);
        }
    }

    /// Keeps the first tokens in an order that together have at least this share of the probability.
    fn keep_smallest_set(
        &mut self,
        share: f32,
        order: impl Fn(&Candidate, &Candidate) -> Ordering + Copy,
    ) {
        let wanted = f64::from(share) * self.total();
        let mut sorted = 0;
        let mut chunk = FIRST_CHUNK;
        let mut mass = 0.0;
        while sorted < self.0.len() {
            let rest = &mut self.0[sorted..];
            if chunk < rest.len() {
                rest.select_nth_unstable_by(chunk - 1, order);
            }
            let end = chunk.min(rest.len());
            rest[..end].sort_unstable_by(order);
            for candidate in &rest[..end] {
                mass += candidate.weight;
                sorted += 1;
                if mass >= wanted {
                    self.0.truncate(sorted);
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
        let entropy: f64 =
            self.0.iter().map(|candidate| candidate.weight / total * information(candidate)).sum();
        let distance = |candidate: &Candidate| (information(candidate) - entropy).abs();
        self.keep_smallest_set(share, |a, b| {
            distance(a).total_cmp(&distance(b)).then_with(|| likelier(a, b))
        });
    }
}

/// Likeliest first, the lower id first among equals.
fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.log_weight.total_cmp(&a.log_weight).then(a.token.cmp(&b.token))
}
