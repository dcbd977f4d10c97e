//! What happens to rows between the products: norms, activations, rotation, softmax.

use std::ops::Range;

use super::{Cpu, Epilogue, Kernel, LANES, Rows, SharedRows, Vector};
use crate::config::Activation;

/// Rows of one piece of work.
pub(super) const PIECE_ROWS: usize = 16;

/// What one element costs, in multiply-adds, to judge whether a second thread is worth it.
pub(super) const ELEMENT_WORK: usize = 8;

/// `e^x`, within 2 ulp; beyond what `f32` holds the nearest normal number, not zero or infinity.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_145_75;
    const LN_2_LOW: f32 = 1.428_606_8e-6;
    // Adding it leaves the nearest integer in the low bits of the mantissa.
    const ROUNDER: f32 = 12_582_912.0;
    // Comparisons rather than `clamp`: NaN stays NaN.
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    let r = (-n).mul_add(LN_2_LOW, (-n).mul_add(LN_2_HIGH, x));
    // The Taylor series: |r| <= ln(2) / 2, where what is left out is below the rounding.
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = r.mul_add(sum, coefficient);
    }
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    sum * scale
}

/// `x / (1 + e^-x)`
#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x / (1 + e^-1.702x)`
#[inline(always)]
fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + exp(-1.702 * x))
}

/// `x * (1 + tanh(u)) / 2` with `u = sqrt(2 / pi) * (x + 0.044715 * x^3)`, which is `x / (1 + e^-2u)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const TWICE_SQRT_2_PI: f32 = 1.595_769;
    let cubic = (0.044_715 * x * x).mul_add(x, x);
    x / (1.0 + exp(-TWICE_SQRT_2_PI * cubic))
}

/// `x * (1 + erf(x / sqrt(2))) / 2`
#[inline(always)]
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// The error function, within 4e-7 (Abramowitz and Stegun, 7.1.26).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let t = 1.0 / x.abs().mul_add(0.327_591_1, 1.0);
    let mut sum = 1.061_405_4;
    for coefficient in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        sum = t.mul_add(sum, coefficient);
    }
    (1.0 - sum * t * exp(-x * x)).copysign(x)
}

/// The hyperbolic tangent, within 1.2e-7.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let small = exp(-2.0 * x.abs());
    ((1.0 - small) / (1.0 + small)).copysign(x)
}

/// `x = cap * tanh(x / cap)`
#[inline(always)]
pub(crate) fn softcap_row(row: &mut [f32], cap: f32) {
    for x in row {
        *x = cap * tanh(*x / cap);
    }
}

/// Sums lanes in a fixed tree.
#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of squares: element `i` goes to lane `i % 16`, in order.
#[inline(always)]
fn sum_of_squares(row: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] = chunk[lane].mul_add(chunk[lane], sums[lane]);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum = x.mul_add(*x, *sum);
    }
    sum_lanes(sums)
}

/// `1 / rms(x)`
#[inline(always)]
fn rms_scale(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt()
}

/// `out = x / rms(x) * weight`
#[inline(always)]
pub(crate) fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = rms_scale(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// Rotates the pairs `(x[i], x[i + len / 2])`.
#[inline(always)]
pub(crate) fn rope_row(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = x.len() / 2;
    let (low, high) = x.split_at_mut(half);
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (a, b) = (*low, *high);
        *low = (-b).mul_add(*sin, a * cos);
        *high = a.mul_add(*sin, b * cos);
    }
}

/// The largest of lanes; NaN is passed over.
#[inline(always)]
fn max_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] = if other > lanes[lane] { other } else { lanes[lane] };
        }
        width /= 2;
    }
    lanes[0]
}

/// Replaces scores by `e^(score - max)`, those before `first` by 0, and returns their sum: element `i` goes
/// to lane `i % 16`, in order, so that 16 zeros more or less in front change nothing.
#[inline(always)]
pub(crate) fn softmax_row(scores: &mut [f32], first: usize) -> f32 {
    scores[..first].fill(f32::NEG_INFINITY);
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    // Whole vectors only: one by one the last few would take as long as all the others.
    let mut last = [f32::NEG_INFINITY; LANES];
    for (last, x) in last.iter_mut().zip(&*rest) {
        *last = *x;
    }
    let mut maxima = last;
    for chunk in &*chunks {
        for lane in 0..LANES {
            maxima[lane] = if chunk[lane] > maxima[lane] { chunk[lane] } else { maxima[lane] };
        }
    }
    let max = max_lanes(maxima);
    for score in chunks.as_flattened_mut() {
        *score = exp(*score - max);
    }
    for score in &mut last {
        *score = exp(*score - max);
    }
    let num_rest = rest.len();
    rest.copy_from_slice(&last[..num_rest]);
    scores[..first].fill(0.0);
    let mut sums = [0.0; LANES];
    let (chunks, rest) = scores.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += chunk[lane];
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += x;
    }
    sum_lanes(sums)
}

/// Norms rows `from[i]` of `x` into rows `i` of `out`, or adds them there.
pub(crate) fn rms_norm(
    cpu: &Cpu,
    (x, from): (Rows<'_>, &[usize]),
    (weight, eps): (&[f32], f32),
    (out, epilogue): (SharedRows<'_>, Epilogue),
) {
    let width = out.width();
    let pieces = from.len().div_ceil(PIECE_ROWS);
    cpu.threads.share(pieces, from.len() * width * ELEMENT_WORK, |piece| {
        let first = piece * PIECE_ROWS;
        let from = &from[first..from.len().min(first + PIECE_ROWS)];
        cpu.simd.run(RmsNorm { x, from, weight, eps, out, epilogue, first });
    });
}

struct RmsNorm<'a> {
    x: Rows<'a>,
    from: &'a [usize],
    weight: &'a [f32],
    eps: f32,
    out: SharedRows<'a>,
    epilogue: Epilogue,
    first: usize,
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint rows")]
    fn run<V: Vector>(self) {
        let width = self.out.width();
        for (i, &row) in self.from.iter().enumerate() {
            // SAFETY: each piece of work has rows of its own.
            let out = unsafe { self.out.slice_mut(self.first + i, 0, width) };
            let x = self.x.slice(row, 0, width);
            match self.epilogue {
                Epilogue::Store => rms_norm_row(x, self.weight, self.eps, out),
                Epilogue::Add => {
                    let scale = rms_scale(x, self.eps);
                    for ((out, x), weight) in out.iter_mut().zip(x).zip(self.weight) {
                        *out += x * scale * weight;
                    }
                }
            }
        }
    }
}

/// Replaces numbers by what the activation makes of them.
#[inline(always)]
pub(super) fn activate(activation: Activation, numbers: &mut [f32]) {
    /// A loop for each activation, so that each is vectorised.
    #[inline(always)]
    fn map(numbers: &mut [f32], f: impl Fn(f32) -> f32) {
        for x in numbers {
            *x = f(*x);
        }
    }
    match activation {
        Activation::Silu => map(numbers, silu),
        Activation::GeluTanh => map(numbers, gelu_tanh),
        Activation::Gelu => map(numbers, gelu),
        Activation::QuickGelu => map(numbers, quick_gelu),
        Activation::Relu => map(numbers, |x| x.max(0.0)),
    }
}

/// What is written of gates and ups.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Gates<'a> {
    /// What becomes of a gate.
    pub(super) activation: Activation,
    /// Added to gates, and behind them to ups.
    pub(super) bias: Option<&'a [f32]>,
}

#[cfg(target_arch = "x86_64")]
impl Gates<'_> {
    /// `activation(gate) * up` of the outputs from `column` on.
    #[inline(always)]
    pub(super) fn apply<V: Vector>(
        self,
        column: usize,
        mut gate: super::Lanes,
        mut up: super::Lanes,
    ) -> super::Lanes {
        if let Some(bias) = self.bias {
            let (gates, ups) = bias.split_at(bias.len() / 2);
            for (lanes, bias) in [(&mut gate, gates), (&mut up, ups)] {
                let bias = &bias[column..][..LANES];
                lanes.0.iter_mut().zip(bias).for_each(|(lane, bias)| *lane += bias);
            }
        }
        activate(self.activation, &mut gate.0);
        let mut gated = super::Lanes::ZERO;
        V::load(&gate).mul(V::load(&up)).store(&mut gated);
        gated
    }
}

/// Bounds rows `0..num_rows` ([`softcap_row`]).
pub(crate) fn softcap(cpu: &Cpu, cap: f32, (rows, num_rows): (SharedRows<'_>, usize)) {
    let pieces = num_rows.div_ceil(PIECE_ROWS);
    cpu.threads.share(pieces, num_rows * rows.width() * ELEMENT_WORK * 2, |piece| {
        let range = piece * PIECE_ROWS..num_rows.min((piece + 1) * PIECE_ROWS);
        cpu.simd.run(Softcap { cap, rows, range });
    });
}

struct Softcap<'a> {
    cap: f32,
    rows: SharedRows<'a>,
    range: Range<usize>,
}

impl Kernel for Softcap<'_> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint rows")]
    fn run<V: Vector>(self) {
        for row in self.range {
            // SAFETY: each piece of work has rows of its own.
            softcap_row(unsafe { self.rows.slice_mut(row, 0, self.rows.width()) }, self.cap);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_f64_over_its_range() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error < 2.5e-7, "exp({x}) is {} not {want}", exp(x));
            x += 0.003_7;
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e9) < 1.3e-38 && exp(-1e9) > 0.0);
        assert!(exp(1e9) > 1e38 && exp(1e9).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn activations_agree_with_f64() {
        for i in -4000..4000 {
            let x = i as f32 / 400.0;
            let wide = f64::from(x);
            let u = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044_715 * wide.powi(3));
            // The integral of the bell, by Simpson's rule.
            let bell = |t: f64| (-t * t / 2.0).exp() / std::f64::consts::TAU.sqrt();
            let step = wide / 200.0;
            let simpson = |k: usize| match k {
                0 | 200 => 1.0,
                k if k % 2 == 1 => 4.0,
                _ => 2.0,
            };
            let area: f64 = (0..=200).map(|k| simpson(k) * bell(k as f64 * step)).sum();
            let pairs = [
                (silu(x), wide / (1.0 + (-wide).exp())),
                (gelu_tanh(x), wide / 2.0 * (1.0 + u.tanh())),
                (gelu(x), wide * (0.5 + area * step / 3.0)),
                (tanh(x), wide.tanh()),
            ];
            for (k, (got, want)) in pairs.into_iter().enumerate() {
                let error = (f64::from(got) - want).abs();
                assert!(error < 5e-7 * wide.abs().max(1.0), "{k} of {x} is {got} not {want}");
            }
        }
        let mut row = [0.0, 25.0, -1e9, 1e9];
        softcap_row(&mut row, 50.0);
        assert!((row[1] - 23.105_858).abs() < 1e-5, "{row:?}");
        assert_eq!((row[0], row[2], row[3]), (0.0, -50.0, 50.0));
    }

    #[test]
    fn norm_agrees_with_f64() {
        let x: Vec<f32> = (0..77).map(|i| ((i * 37 % 101) as f32 - 50.0) / 13.0).collect();
        let weight: Vec<f32> = (0..77).map(|i| 0.5 + i as f32 / 77.0).collect();
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 77.0;
        let mut out = vec![0.0; 77];
        rms_norm_row(&x, &weight, 1e-5, &mut out);
        for i in 0..77 {
            let want = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
            assert!((f64::from(out[i]) - want).abs() < 1e-6, "{i}: {} not {want}", out[i]);
        }
    }

    #[test]
    fn softmax_agrees_with_f64() {
        let scores: Vec<f32> = (0..53).map(|i| ((i * 29 % 53) as f32 - 20.0) / 3.0).collect();
        let total: f64 = scores.iter().map(|x| f64::from(*x).exp()).sum();
        let mut weights = scores.clone();
        let sum = softmax_row(&mut weights, 0);
        for (weight, score) in weights.iter().zip(&scores) {
            let want = f64::from(*score).exp() / total;
            assert!((f64::from(weight / sum) - want).abs() < 1e-6);
        }
        let mut shifted = [vec![7.0; 32], scores].concat();
        assert_eq!(softmax_row(&mut shifted, 32).to_bits(), sum.to_bits());
        assert_eq!(shifted, [vec![0.0; 32], weights].concat());
    }
}
