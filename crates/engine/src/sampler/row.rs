//! What the sampler asks of a whole row of logits: the likeliest token, the likeliest few, the weight of each.
//!
//! Vectorised, and with the same bits on every instruction set. The other files of the sampler see few tokens.

use std::cmp::Ordering;

use super::SampleError;
use crate::kernels::{Kernel, Simd, Vector};
use crate::step::TokenId;

/// Numbers that are looked at side by side.
const CHUNK: usize = 32;
/// Numbers that have a sum, or a largest one, of their own.
const BLOCK: usize = 1024;
/// Least tokens of which the likeliest are selected at a time.
const MIN_SELECTION: usize = 64;

/// The likeliest token, the lowest id among equals; `None` where no token is possible.
pub(super) fn argmax(simd: Simd, logits: &[f32]) -> Result<Option<TokenId>, SampleError> {
    let mut best = Ok(None);
    simd.run(Argmax { logits, best: &mut best });
    best
}

struct Argmax<'a> {
    logits: &'a [f32],
    best: &'a mut Result<Option<TokenId>, SampleError>,
}

impl Kernel for Argmax<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let mut max = f32::NEG_INFINITY;
        let mut block_of_max = None;
        for (block, logits) in self.logits.chunks(BLOCK).enumerate() {
            let Some(block_max) = max_of(logits) else {
                *self.best = Err(SampleError::NotANumber);
                return;
            };
            if block_max > max {
                (max, block_of_max) = (block_max, Some(block));
            }
        }
        *self.best = Ok(block_of_max.and_then(|block| {
            let first = block * BLOCK;
            let place = self.logits[first..].iter().position(|logit| *logit == max)?;
            Some((first + place) as TokenId)
        }));
    }
}

/// The largest number; `None` if one of them is NaN.
#[inline(always)]
fn max_of(numbers: &[f32]) -> Option<f32> {
    const INFINITY: u32 = f32::INFINITY.to_bits();
    let mut maxima = [f32::NEG_INFINITY; CHUNK];
    // Without their signs, bits of NaN are beyond those of infinity.
    let mut sizes = [0; CHUNK];
    let (chunks, rest) = numbers.as_chunks::<CHUNK>();
    for chunk in chunks {
        for lane in 0..CHUNK {
            let x = chunk[lane];
            maxima[lane] = if x > maxima[lane] { x } else { maxima[lane] };
            sizes[lane] = sizes[lane].max(x.to_bits() & i32::MAX as u32);
        }
    }
    let is_nan = sizes.iter().any(|size| *size > INFINITY) || rest.iter().any(|x| x.is_nan());
    let max = maxima.iter().chain(rest).fold(f32::NEG_INFINITY, |max, x| max.max(*x));
    (!is_nan).then_some(max)
}

/// A token with its logit.
pub(super) type Ranked = (f32, TokenId);

/// The tokens of the `num` highest logits, highest first and the lower id first among equals. None of them is
/// NaN.
pub(super) fn likeliest(simd: Simd, logits: &[f32], num: usize, top: &mut Vec<Ranked>) {
    top.clear();
    let num = num.min(logits.len());
    if num == 0 {
        return;
    }
    simd.run(Likeliest { logits, num, top });
    let missing = num.saturating_sub(top.len());
    let impossible = |(id, logit): (usize, &f32)| {
        (*logit == f32::NEG_INFINITY).then_some((f32::NEG_INFINITY, id as TokenId))
    };
    if missing > 0 {
        top.extend(logits.iter().enumerate().filter_map(impossible).take(missing));
    }
    cut(top, num);
    top.sort_unstable_by(likelier);
}

struct Likeliest<'a> {
    logits: &'a [f32],
    num: usize,
    top: &'a mut Vec<Ranked>,
}

impl Kernel for Likeliest<'_> {
    /// Keeps those above the lowest of the best so far, until there are so many that most are not.
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { logits, num, top } = self;
        let full = (2 * num).max(MIN_SELECTION);
        let mut least = f32::NEG_INFINITY;
        let (chunks, rest) = logits.as_chunks::<CHUNK>();
        let mut first = 0;
        for chunk in chunks {
            let mut is_any = false;
            for x in chunk {
                is_any |= *x > least;
            }
            if is_any {
                keep_above(least, first, chunk, top);
                if top.len() >= full {
                    cut(top, num);
                    least = top[num - 1].0;
                }
            }
            first += CHUNK;
        }
        keep_above(least, first, rest, top);
    }
}

/// Appends the tokens from `first` on whose logits are above `least`.
fn keep_above(least: f32, first: usize, logits: &[f32], top: &mut Vec<Ranked>) {
    for (place, logit) in logits.iter().enumerate() {
        if *logit > least {
            top.push((*logit, (first + place) as TokenId));
        }
    }
}

/// Leaves the `num` likeliest, the last of them at the end.
fn cut(top: &mut Vec<Ranked>, num: usize) {
    if num < top.len() {
        top.select_nth_unstable_by(num - 1, likelier);
        top.truncate(num);
    }
}

/// Likeliest first, the lower id first among equals.
fn likelier(a: &Ranked, b: &Ranked) -> Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
}

/// The logarithm of an unnormalised probability: 0 for the likeliest token.
#[inline(always)]
pub(super) fn log_weight(logit: f32, best: f64, temperature: f64) -> f64 {
    let logit = f64::from(logit);
    // Of infinite logits there may be several.
    if logit == best { 0.0 } else { (logit - best) / temperature }
}

/// Unnormalised probabilities of a row of logits: 1 for the likeliest token.
#[derive(Debug, Default)]
pub(super) struct Weights {
    weights: Vec<f64>,
    /// Of each [`BLOCK`].
    sums: Vec<f64>,
}

impl Weights {
    /// Computes those of a row whose highest logit is `best`.
    pub(super) fn compute(&mut self, simd: Simd, logits: &[f32], (best, temperature): (f64, f64)) {
        self.weights.resize(logits.len(), 0.0);
        self.sums.clear();
        simd.run(Weigh { logits, best, temperature, weights: self });
    }

    /// The weights in the order of the tokens.
    pub(super) fn as_slice(&self) -> &[f64] {
        &self.weights
    }

    /// Their sum.
    pub(super) fn total(&self) -> f64 {
        self.sums.iter().sum()
    }

    /// The token in which `draw`, from `[0, 1)`, falls; `None` if none has a weight.
    pub(super) fn pick(&self, draw: f64) -> Option<TokenId> {
        let target = draw * self.total();
        let mut mass = 0.0;
        let mut reached = None;
        for (block, sum) in self.sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
            reached = Some((block * BLOCK, mass));
            mass += sum;
            if mass > target {
                break;
            }
        }
        let (first, mut mass) = reached?;
        let mut token = None;
        for (place, weight) in self.weights[first..].iter().take(BLOCK).enumerate() {
            if *weight > 0.0 {
                token = Some((first + place) as TokenId);
                mass += weight;
                if mass > target {
                    break;
                }
            }
        }
        token
    }
}

struct Weigh<'a> {
    logits: &'a [f32],
    best: f64,
    temperature: f64,
    weights: &'a mut Weights,
}

impl Kernel for Weigh<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { logits, best, temperature, weights: Weights { weights, sums } } = self;
        for (logits, weights) in logits.chunks(BLOCK).zip(weights.chunks_mut(BLOCK)) {
            for (weight, logit) in weights.iter_mut().zip(logits) {
                *weight = exp(log_weight(*logit, best, temperature));
            }
            sums.push(sum(weights));
        }
    }
}

/// The sum of numbers: number `i` goes to lane `i % 32`, in order.
#[inline(always)]
fn sum(numbers: &[f64]) -> f64 {
    let mut lanes = [0.0; CHUNK];
    let (chunks, rest) = numbers.as_chunks::<CHUNK>();
    for chunk in chunks {
        for lane in 0..CHUNK {
            lanes[lane] += chunk[lane];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x;
    }
    lanes.iter().sum()
}

/// `e^x` of a number that is not above 0, within 1 ulp or so; 0 below -708.
#[inline(always)]
fn exp(x: f64) -> f64 {
    const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    // Adding it leaves the nearest integer in the low bits of the mantissa.
    const ROUNDER: f64 = 6_755_399_441_055_744.0;
    /// `1 / n!` from 13 down to 0.
    const TAYLOR: [f64; 14] = [
        1.0 / 6_227_020_800.0,
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    let shifted = x.mul_add(std::f64::consts::LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    let r = (-n).mul_add(LN_2_LOW, (-n).mul_add(LN_2_HIGH, x));
    let mut sum = 0.0;
    for coefficient in TAYLOR {
        sum = r.mul_add(sum, coefficient);
    }
    let scale = f64::from_bits((shifted.to_bits() << 52).wrapping_add(1023 << 52));
    if x < -708.0 { 0.0 } else { sum * scale }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn exp_agrees_with_that_of_the_library() {
        let mut x = 0.0_f64;
        while x > -708.0 {
            let want = x.exp();
            assert!((exp(x) - want).abs() <= 4e-16 * want, "exp({x}) is {} not {want}", exp(x));
            x -= 0.003_7;
        }
        assert_eq!((exp(0.0), exp(-709.0), exp(f64::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    /// Rows with equal, infinite and impossible logits, longer and shorter than a block.
    fn rows() -> impl Strategy<Value = Vec<f32>> {
        let logit = prop_oneof![
            8 => -20.0_f32..20.0,
            4 => (-3_i8..3).prop_map(f32::from),
            1 => Just(f32::NEG_INFINITY),
            1 => Just(-0.0_f32),
        ];
        prop::collection::vec(logit, 0..3000)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn whole_rows_are_seen_as_one_by_one_and_alike_everywhere(
            logits in rows(), num in 0_usize..200, draw in 0.0_f64..1.0, temperature in 0.1_f64..3.0,
        ) {
            let mut order: Vec<Ranked> =
                logits.iter().enumerate().map(|(id, logit)| (*logit, id as TokenId)).collect();
            order.sort_by(likelier);
            let first = order.first().filter(|best| best.0 > f32::NEG_INFINITY);
            let best = first.map_or(0.0, |best| f64::from(best.0));
            let mut bits = Vec::new();
            for simd in Simd::available() {
                prop_assert_eq!(argmax(simd, &logits), Ok(first.map(|best| best.1)));
                let mut top = Vec::new();
                likeliest(simd, &logits, num, &mut top);
                prop_assert_eq!(&top, &order[..num.min(order.len())]);
                let mut weights = Weights::default();
                weights.compute(simd, &logits, (best, temperature));
                let total = weights.total();
                let naive: f64 =
                    logits.iter().map(|logit| log_weight(*logit, best, temperature).exp()).sum();
                prop_assert!((total - naive).abs() <= 1e-12 * naive, "{total} for {naive}");
                let picked = weights.pick(draw);
                prop_assert_eq!(picked.is_some(), first.is_some());
                if let Some(picked) = picked {
                    let before: f64 = weights.as_slice()[..picked as usize].iter().sum();
                    let weight = weights.as_slice()[picked as usize];
                    prop_assert!(weight > 0.0 && before <= draw * total * (1.0 + 1e-12));
                    prop_assert!(before + weight >= draw * total * (1.0 - 1e-12));
                }
                bits.push((total.to_bits(), picked));
            }
            prop_assert!(bits.iter().all(|other| *other == bits[0]));
        }

        #[test]
        fn a_row_with_nan_has_no_likeliest_token(logits in rows(), place: prop::sample::Index) {
            let mut logits = logits;
            logits.push(0.0);
            let place = place.index(logits.len());
            logits[place] = f32::NAN;
            for simd in Simd::available() {
                prop_assert_eq!(argmax(simd, &logits), Err(SampleError::NotANumber));
            }
        }
    }
}
