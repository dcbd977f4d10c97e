//! What happens to rows between the products: norms, activations, rotation, softmax.

use super::{Cpu, Kernel, LANES, Rows, SharedRows, Vector};

/// Rows of one piece of work.
const PIECE_ROWS: usize = 16;

/// What one element costs, in multiply-adds, to judge whether a second thread is worth it.
const ELEMENT_WORK: usize = 8;

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

/// Sums lanes in a fixed tree.
#[inline(always)]
fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
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

/// `out = x / rms(x) * weight`
#[inline(always)]
pub(crate) fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
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

/// Replaces scores by `e^(score - max)` and returns their sum: element `i` goes to lane `i % 16`, in order.
#[inline(always)]
pub(crate) fn softmax_row(scores: &mut [f32]) -> f32 {
    let mut max = f32::NEG_INFINITY;
    let (chunks, rest) = scores.as_chunks::<LANES>();
    let mut maxima = [max; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            maxima[lane] = if chunk[lane] > maxima[lane] { chunk[lane] } else { maxima[lane] };
        }
    }
    for x in maxima.iter().chain(rest) {
        max = if *x > max { *x } else { max };
    }
    for score in scores.iter_mut() {
        *score = exp(*score - max);
    }
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

/// Norms rows `from[i]` of `x` into rows `i` of `out`.
pub(crate) fn rms_norm(
    cpu: &Cpu,
    x: Rows<'_>,
    from: &[usize],
    (weight, eps): (&[f32], f32),
    out: SharedRows<'_>,
) {
    let width = out.width();
    let pieces = from.len().div_ceil(PIECE_ROWS);
    cpu.threads.share(pieces, from.len() * width * ELEMENT_WORK, |piece| {
        let first = piece * PIECE_ROWS;
        let from = &from[first..from.len().min(first + PIECE_ROWS)];
        cpu.simd.run(RmsNorm { x, from, weight, eps, out, first });
    });
}

struct RmsNorm<'a> {
    x: Rows<'a>,
    from: &'a [usize],
    weight: &'a [f32],
    eps: f32,
    out: SharedRows<'a>,
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
            rms_norm_row(self.x.slice(row, 0, width), self.weight, self.eps, out);
        }
    }
}

/// `out = silu(gate) * up`, where a row of `gate_up` is the gates and then the ups.
pub(crate) fn silu_mul(cpu: &Cpu, gate_up: Rows<'_>, num_rows: usize, out: SharedRows<'_>) {
    let width = out.width();
    let pieces = num_rows.div_ceil(PIECE_ROWS);
    cpu.threads.share(pieces, num_rows * width * ELEMENT_WORK * 2, |piece| {
        let rows = piece * PIECE_ROWS..num_rows.min((piece + 1) * PIECE_ROWS);
        cpu.simd.run(SiluMul { gate_up, rows, out });
    });
}

struct SiluMul<'a> {
    gate_up: Rows<'a>,
    rows: std::ops::Range<usize>,
    out: SharedRows<'a>,
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint rows")]
    fn run<V: Vector>(self) {
        let width = self.out.width();
        for row in self.rows {
            let gate = self.gate_up.slice(row, 0, width);
            let up = self.gate_up.slice(row, width, width);
            // SAFETY: each piece of work has rows of its own.
            let out = unsafe { self.out.slice_mut(row, 0, width) };
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
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
        let sum = softmax_row(&mut weights);
        for (weight, score) in weights.iter().zip(&scores) {
            let want = f64::from(*score).exp() / total;
            assert!((f64::from(weight / sum) - want).abs() < 1e-6);
        }
    }
}
