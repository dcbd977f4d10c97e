//! Which scales a block gets when weights are quantised: those of the least squared error.
//!
//! The largest number alone would decide a plain choice, though one number rounded worse can be worth
//! many rounded better. So several scales near the plain one are tried, each followed by the best one
//! for the whole numbers that it led to. Sums run in 16 lanes, in one order: the same blocks come out
//! of every instruction set.

use half::f16;

use super::layout::Block;
use crate::kernels::{LANES, sum_lanes};

/// Scales that are tried on either side of the plain one.
const STEPS: i32 = 9;

/// How far apart they are, in whole numbers at the largest weight.
const STEP: f32 = 0.1;

/// To the nearest whole number, for numbers below 2^22: plain additions, which every machine vectorises.
#[inline(always)]
fn round(x: f32) -> f32 {
    const ROUNDER: f32 = 12_582_912.0;
    (x + ROUNDER) - ROUNDER
}

/// To a whole number within limits.
#[inline(always)]
fn quantise(x: f32, (low, high): (f32, f32)) -> f32 {
    // Comparisons first: what is no number, or out of the rounding's range, gets a limit.
    let x = if x > low { x } else { low };
    round(if x < high { x } else { high })
}

/// The sum of `f` over all indices below `N`.
#[inline(always)]
fn sum<const N: usize>(f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for i in 0..N {
        lanes[i % LANES] += f(i);
    }
    sum_lanes(lanes)
}

#[inline(always)]
fn group<const N: usize>(weights: &[f32], index: usize) -> [f32; N] {
    std::array::from_fn(|i| weights[index * N + i])
}

/// The number that is farthest from 0, with its sign.
#[inline(always)]
fn farthest<const N: usize>(x: &[f32; N]) -> f32 {
    x.iter().fold(0.0, |far: f32, x| if x.abs() > far.abs() { *x } else { far })
}

/// The inverse, or 0 of 0.
#[inline(always)]
fn inverse(x: f32) -> f32 {
    let inverse = 1.0 / x;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The best scale for whole numbers within limits, where the farthest weight gets the lower one.
#[inline(always)]
fn fit_scale<const N: usize>(x: &[f32; N], limits: (f32, f32)) -> f32 {
    let far = farthest(x);
    let (mut best, mut best_gain) = (0.0, 0.0);
    for step in -STEPS..=STEPS {
        let by = (limits.0 - step as f32 * STEP) * inverse(far);
        let quants = x.map(|x| quantise(x * by, limits));
        let products = sum::<N>(|i| x[i] * quants[i]);
        let squares = sum::<N>(|i| quants[i] * quants[i]);
        // The squared error that the best scale takes away from that of zeros.
        let gain = products * products * inverse(squares);
        if gain > best_gain {
            (best, best_gain) = (products / squares, gain);
        }
    }
    best
}

/// The best scale and minimum (not negative) for `x = scale * (0..=15) - min`.
#[inline(always)]
fn fit_scale_and_min<const N: usize>(x: &[f32; N]) -> (f32, f32) {
    let limits = (0.0, 15.0);
    let low = x.iter().fold(0.0, |low: f32, x| if *x < low { *x } else { low });
    let high = x.iter().fold(low, |high: f32, x| if *x > high { *x } else { high });
    let mut best = (0.0, -low);
    let mut best_error = sum::<N>(|i| (x[i] - low) * (x[i] - low));
    for step in -STEPS..=STEPS {
        let by = (15.0 + step as f32 * STEP) * inverse(high - low);
        let quants = x.map(|x| quantise((x - low) * by, limits));
        let (total, squares) = (sum::<N>(|i| quants[i]), sum::<N>(|i| quants[i] * quants[i]));
        let (x_total, products) = (sum::<N>(|i| x[i]), sum::<N>(|i| x[i] * quants[i]));
        let determinant = N as f32 * squares - total * total;
        let mut scale = (N as f32 * products - x_total * total) / determinant;
        let mut min = (total * products - squares * x_total) / determinant;
        // No minimum, or the same whole number for all.
        if min < 0.0 || determinant <= 0.0 {
            (scale, min) = (products * inverse(squares), 0.0);
        }
        let error = sum::<N>(|i| {
            let difference = scale * quants[i] - min - x[i];
            difference * difference
        });
        if error < best_error {
            (best, best_error) = ((scale, min), error);
        }
    }
    best
}

/// The whole numbers for `x = scale * (quant - zero) - min`, unsigned, and their squared error.
#[inline(always)]
fn quants<const N: usize>(x: &[f32; N], scale: f32, min: f32, bits: u32) -> ([f32; N], f32) {
    let zero = if bits == 4 { 0.0 } else { (1 << (bits - 1)) as f32 };
    let limits = (0.0, ((1 << bits) - 1) as f32);
    let by = inverse(scale);
    let quants = x.map(|x| quantise((x + min) * by + zero, limits));
    let error = sum::<N>(|i| {
        let difference = scale * (quants[i] - zero) - min - x[i];
        difference * difference
    });
    (quants, error)
}

/// A block of 32 numbers of 8 bits.
#[inline(always)]
pub(super) fn q8_0(weights: &[f32]) -> Block {
    let x: [f32; 32] = group(weights, 0);
    let mut block = Block::zero();
    let (plain, fitted) = (farthest(&x).abs() / 127.0, fit_scale(&x, (-127.0, 127.0)).abs());
    let mut best_error = f32::INFINITY;
    for scale in [plain, fitted].map(f16::from_f32) {
        let (quants, error) = quants(&x, scale.to_f32(), 0.0, 8);
        if error < best_error {
            (block.scale, best_error) = (scale, error);
            store(&mut block, 0, &quants);
        }
    }
    block
}

/// A block of 256 numbers of 6 bits.
#[inline(always)]
pub(super) fn q6_k(weights: &[f32]) -> Block {
    let mut block = Block::zero();
    let scales: [f32; 16] =
        std::array::from_fn(|at| fit_scale(&group::<16>(weights, at), (-32.0, 31.0)));
    block.scale = f16::from_f32(farthest(&scales) / -128.0);
    let unit = block.scale.to_f32();
    for (at, scale) in scales.into_iter().enumerate() {
        let x = group::<16>(weights, at);
        let near = quantise(scale * inverse(unit), (-128.0, 127.0));
        let mut best_error = f32::INFINITY;
        for step in [0.0, -1.0, 1.0] {
            let steps = quantise(near + step, (-128.0, 127.0));
            let (quants, error) = quants(&x, steps * unit, 0.0, 6);
            if error < best_error {
                best_error = error;
                block.scales[at] = steps as i8;
                store(&mut block, at, &quants);
            }
        }
    }
    block
}

/// A block of 256 numbers of 4 bits with minima.
#[inline(always)]
pub(super) fn q4_k(weights: &[f32]) -> Block {
    let mut block = Block::zero();
    let fits: [(f32, f32); 8] =
        std::array::from_fn(|at| fit_scale_and_min(&group::<32>(weights, at)));
    block.scale = f16::from_f32(farthest(&fits.map(|(scale, _)| scale)) / 63.0);
    block.min = f16::from_f32(farthest(&fits.map(|(_, min)| min)) / 63.0);
    let (unit, min_unit) = (block.scale.to_f32(), block.min.to_f32());
    let limits = (0.0, 63.0);
    for (at, (scale, min)) in fits.into_iter().enumerate() {
        let x = group::<32>(weights, at);
        let near = quantise(scale * inverse(unit), limits);
        let near_min = quantise(min * inverse(min_unit), limits);
        let mut best_error = f32::INFINITY;
        for step in [0.0, -1.0, 1.0] {
            for min_step in [0.0, -1.0, 1.0] {
                let steps = quantise(near + step, limits);
                let min_steps = quantise(near_min + min_step, limits);
                let (quants, error) = quants(&x, steps * unit, min_steps * min_unit, 4);
                if error < best_error {
                    best_error = error;
                    (block.scales[at], block.mins[at]) = (steps as i8, min_steps as u8);
                    store(&mut block, at, &quants);
                }
            }
        }
    }
    block
}

#[inline(always)]
fn store<const N: usize>(block: &mut Block, group: usize, quants: &[f32; N]) {
    for (stored, quant) in block.quants[group * N..][..N].iter_mut().zip(quants) {
        *stored = *quant as u8;
    }
}
