//! The sampler: a row of logits in, one token out.
//!
//! The choice depends on the row, the sequence's own parameters and the position of the token, and on
//! nothing else: not on the batch, not on what was drawn before, not on whether the sequence was preempted
//! or its job delivered twice. The engine calls it once for each row of a step.

use std::cmp::Ordering;

use crate::Error;
use crate::step::TokenId;

/// How the tokens of one sequence are chosen, and when it ends.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; higher flattens the distribution.
    pub temperature: f32,
    /// Samples from the smallest set of tokens with at least this probability; 1 is all of them.
    pub top_p: f32,
    /// Samples from that many likeliest tokens; 0 is all of them.
    pub top_k: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Seed of the draws.
    pub seed: u64,
    /// Whether to go on behind an end-of-sequence token.
    pub ignore_eos: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            stop: Vec::new(),
            seed: 0,
            ignore_eos: false,
        }
    }
}

impl SamplingParams {
    /// Checks the parameters; the error names everything that is wrong with them.
    pub fn validate(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        if self.max_new_tokens == 0 {
            problems.push("max_new_tokens must be at least 1, got 0".to_owned());
        }
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            problems.push(format!("temperature must be 0 or more, got {}", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            problems.push(format!("top_p must be above 0 and at most 1, got {}", self.top_p));
        }
        if self.stop.iter().any(String::is_empty) {
            problems.push("a stop string must not be empty".to_owned());
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Reject(problems.join("; "))) }
    }
}

/// Why no token can be chosen from a row of logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model computed something that is not a number.
    #[error("the model's logits contain NaN")]
    NotANumber,
    /// No token is possible: the row is empty or minus infinity throughout.
    #[error("the model's logits leave no token possible")]
    NothingPossible,
}

/// Chooses the token of a row of logits; `position` counts the tokens generated before it.
///
/// Equal logits are ordered by token id, the lower first.
pub fn sample(
    logits: &[f32],
    params: &SamplingParams,
    position: usize,
) -> Result<TokenId, SampleError> {
    let best = argmax(logits)?;
    if params.temperature <= 0.0 || params.top_k == 1 {
        return Ok(best);
    }
    let draw = uniform(params.seed, position as u64);
    let weights = Weights { logits, best: logits[best as usize], temperature: params.temperature };
    if params.top_k == 0 && params.top_p >= 1.0 {
        let all = 0..logits.len() as TokenId;
        return Ok(pick(all.clone(), weights.sum(all), draw, &weights).unwrap_or(best));
    }
    let kept = restrict(&weights, params);
    let total = weights.sum(kept.iter().copied());
    Ok(pick(kept.iter().copied(), total, draw, &weights).unwrap_or(best))
}

/// The unnormalised probabilities of a row: 1 for the likeliest token.
struct Weights<'a> {
    logits: &'a [f32],
    best: f32,
    temperature: f32,
}

impl Weights<'_> {
    fn of(&self, token: TokenId) -> f64 {
        let logit = self.logits[token as usize];
        if logit == self.best {
            return 1.0; // also where both are infinite
        }
        ((f64::from(logit) - f64::from(self.best)) / f64::from(self.temperature)).exp()
    }

    fn sum(&self, tokens: impl Iterator<Item = TokenId>) -> f64 {
        tokens.map(|token| self.of(token)).sum()
    }

    /// Likeliest first, the lower id first among equals.
    fn order(&self, a: TokenId, b: TokenId) -> Ordering {
        self.logits[b as usize].total_cmp(&self.logits[a as usize]).then(a.cmp(&b))
    }
}

/// The likeliest token, the lowest id among equals.
fn argmax(logits: &[f32]) -> Result<TokenId, SampleError> {
    let mut best = f32::NEG_INFINITY;
    let mut token = None;
    let mut not_a_number = false;
    for (id, &logit) in logits.iter().enumerate() {
        not_a_number |= logit.is_nan();
        if logit > best {
            (best, token) = (logit, Some(id as TokenId));
        }
    }
    if not_a_number {
        return Err(SampleError::NotANumber);
    }
    token.ok_or(SampleError::NothingPossible)
}

/// The tokens that top-k and then top-p leave, likeliest first.
///
/// Sorts only as many tokens as are needed: the likeliest 64, and four times as many whenever they are not
/// enough.
fn restrict(weights: &Weights<'_>, params: &SamplingParams) -> Vec<TokenId> {
    let mut tokens: Vec<TokenId> = (0..weights.logits.len() as TokenId).collect();
    if params.top_k > 0 && params.top_k < tokens.len() {
        tokens.select_nth_unstable_by(params.top_k - 1, |a, b| weights.order(*a, *b));
        tokens.truncate(params.top_k);
        tokens.sort_unstable_by(|a, b| weights.order(*a, *b));
    } else {
        tokens.sort_unstable(); // the order of the sum below
    }
    if params.top_p >= 1.0 {
        return tokens;
    }
    let wanted = f64::from(params.top_p) * weights.sum(tokens.iter().copied());
    let mut sorted = 0;
    let mut chunk = 64;
    let mut mass = 0.0;
    loop {
        let rest = &mut tokens[sorted..];
        if chunk < rest.len() {
            rest.select_nth_unstable_by(chunk - 1, |a, b| weights.order(*a, *b));
        }
        let end = chunk.min(rest.len());
        rest[..end].sort_unstable_by(|a, b| weights.order(*a, *b));
        for offset in 0..end {
            mass += weights.of(tokens[sorted + offset]);
            if mass >= wanted {
                tokens.truncate(sorted + offset + 1);
                return tokens;
            }
        }
        sorted += end;
        if sorted == tokens.len() {
            return tokens;
        }
        chunk *= 4;
    }
}

/// The token in which `draw` of the total weight falls; `None` when there is none.
fn pick(
    tokens: impl Iterator<Item = TokenId>,
    total: f64,
    draw: f64,
    weights: &Weights<'_>,
) -> Option<TokenId> {
    let target = draw * total;
    let mut mass = 0.0;
    let mut last = None;
    for token in tokens {
        let weight = weights.of(token);
        if weight > 0.0 {
            mass += weight;
            last = Some(token);
            if mass > target {
                break;
            }
        }
    }
    last
}

/// A number in `[0, 1)` that depends on the seed and the position alone.
///
/// A counter-based generator: two rounds of the SplitMix64 finaliser (Steele, Lea and Flood, 2014).
fn uniform(seed: u64, position: u64) -> f64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let mixed = mix(mix(seed.wrapping_add(GOLDEN)) ^ position.wrapping_add(1).wrapping_mul(GOLDEN));
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}

/// The finaliser of SplitMix64.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn params(temperature: f32, top_p: f32, top_k: usize) -> SamplingParams {
        SamplingParams { temperature, top_p, top_k, seed: 7, ..SamplingParams::default() }
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_equals() {
        let logits = [0.5, 2.0, 2.0, f32::NEG_INFINITY];
        assert_eq!(sample(&logits, &params(0.0, 1.0, 0), 0), Ok(1));
    }

    #[test]
    fn nan_is_an_error_wherever_it_stands() {
        for position in 0..3 {
            let mut logits = [1.0, f32::INFINITY, 0.0];
            logits[position] = f32::NAN;
            for temperature in [0.0, 1.0] {
                let drawn = sample(&logits, &params(temperature, 1.0, 0), 0);
                assert_eq!(drawn, Err(SampleError::NotANumber));
            }
        }
    }

    #[test]
    fn infinities_are_ordinary_values() {
        let none = [f32::NEG_INFINITY; 3];
        assert_eq!(sample(&none, &params(1.0, 1.0, 0), 0), Err(SampleError::NothingPossible));
        assert_eq!(sample(&[], &params(1.0, 1.0, 0), 0), Err(SampleError::NothingPossible));
        let two = [0.0, f32::INFINITY, 5.0, f32::INFINITY];
        let mut seen = [0; 4];
        for position in 0..100 {
            seen[sample(&two, &params(1.0, 1.0, 0), position).unwrap() as usize] += 1;
        }
        assert_eq!((seen[0], seen[2]), (0, 0));
        assert!(seen[1] > 20 && seen[3] > 20, "{seen:?}");
    }

    #[test]
    fn draws_follow_the_softmax() {
        // Chi-square against the definition, at three temperatures and with each restriction.
        let logits: Vec<f32> = (0..40).map(|id| ((id * 7) % 40) as f32 / 8.0).collect();
        for (temperature, top_p, top_k) in [
            (1.0, 1.0, 0),
            (0.5, 1.0, 0),
            (2.0, 1.0, 0),
            (1.0, 0.8, 0),
            (1.0, 1.0, 9),
            (1.5, 0.7, 20),
        ] {
            let params = params(temperature, top_p, top_k);
            let expected = reference(&logits, &params);
            let num_draws = 100_000;
            let mut counts = vec![0.0; logits.len()];
            for position in 0..num_draws {
                counts[sample(&logits, &params, position).unwrap() as usize] += 1.0;
            }
            let mut chi_square = 0.0;
            let mut categories = 0.0;
            for (count, probability) in counts.iter().zip(&expected) {
                if *probability == 0.0 {
                    assert_eq!(*count, 0.0);
                    continue;
                }
                let mean = probability * num_draws as f64;
                chi_square += (count - mean) * (count - mean) / mean;
                categories += 1.0;
            }
            // Mean is categories - 1, deviation sqrt(2 (categories - 1)); five deviations is 1 in millions.
            let degrees: f64 = categories - 1.0;
            let limit = degrees + 5.0 * (2.0 * degrees).sqrt();
            assert!(chi_square < limit, "{params:?}: {chi_square} against {limit}");
        }
    }

    /// The definition, with everything sorted.
    fn reference(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
        let scale = |logit: &f32| f64::from(*logit) / f64::from(params.temperature);
        let top = logits.iter().map(scale).fold(f64::NEG_INFINITY, f64::max);
        let mut ranked: Vec<(usize, f64)> =
            logits.iter().map(|logit| (scale(logit) - top).exp()).enumerate().collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if params.top_k > 0 {
            ranked.truncate(params.top_k);
        }
        let total: f64 = ranked.iter().map(|entry| entry.1).sum();
        if params.top_p < 1.0 {
            let mut mass = 0.0;
            let end = ranked.iter().position(|entry| {
                mass += entry.1 / total;
                mass >= f64::from(params.top_p) - 1e-12
            });
            ranked.truncate(end.map_or(ranked.len(), |end| end + 1));
        }
        let total: f64 = ranked.iter().map(|entry| entry.1).sum();
        let mut probabilities = vec![0.0; logits.len()];
        for (id, weight) in ranked {
            probabilities[id] = weight / total;
        }
        probabilities
    }

    #[test]
    fn positions_and_seeds_draw_independently() {
        let mut numbers: Vec<u64> = Vec::new();
        for seed in 0..100 {
            numbers.extend((0..100).map(|position| uniform(seed, position).to_bits()));
        }
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 10_000);
    }

    #[test]
    fn validation_names_every_problem() {
        let bad = SamplingParams {
            max_new_tokens: 0,
            temperature: f32::NAN,
            top_p: 0.0,
            stop: vec![String::new()],
            ..SamplingParams::default()
        };
        let text = bad.validate().unwrap_err().to_string();
        for part in ["max_new_tokens", "temperature", "top_p", "stop"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(SamplingParams::default().validate().is_ok());
    }

    proptest! {
        #[test]
        fn top_p_keeps_the_smallest_set_with_the_probability(
            logits in prop::collection::vec(-8.0_f32..8.0, 1..700),
            top_p in 0.01_f32..0.999,
            temperature in 0.2_f32..3.0,
        ) {
            let params = params(temperature, top_p, 0);
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights = Weights { logits: &logits, best, temperature };
            let kept = restrict(&weights, &params);
            let total = weights.sum(0..logits.len() as TokenId);
            let mass = weights.sum(kept.iter().copied());
            prop_assert!(mass / total >= f64::from(top_p) - 1e-9);
            let without = weights.sum(kept[..kept.len() - 1].iter().copied());
            prop_assert!(without / total < f64::from(top_p) + 1e-9);
            let least = logits[kept[kept.len() - 1] as usize];
            for (id, logit) in logits.iter().enumerate() {
                if *logit > least {
                    prop_assert!(kept.contains(&(id as TokenId)));
                }
            }
        }

        #[test]
        fn top_k_keeps_the_likeliest(
            logits in prop::collection::vec(-4_i8..4, 1..200),
            top_k in 1_usize..250,
            position in 0_usize..1000,
        ) {
            let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
            let token = sample(&logits, &params(1.0, 1.0, top_k), position).unwrap();
            let before = (0..logits.len()).filter(|&id| {
                let (other, own) = (logits[id], logits[token as usize]);
                other > own || (other == own && id < token as usize)
            }).count();
            prop_assert!(before < top_k);
        }
    }
}
