//! Linear layers: weights packed into panels at load, then rows times weights.

use super::lanes::Stored;
use super::product::Finish;
use super::{Bf16Lanes, Cpu, LANES, Lanes, Operand, Product, Rows, SharedRows, Threads};

/// Rows of one piece of work: a panel stays in the nearest cache while they pass.
const PIECE_ROWS: usize = 96;

/// Panels of one piece of work.
const PIECE_PANELS: usize = 4;

/// The weights of a linear layer, `(out_features, in_features)`, as panels of 16 outputs.
///
/// Inside a panel `k` (the input) is the slow index. Bfloat16 stays as it is, half the memory to read
/// for the very same numbers.
#[derive(Debug)]
pub(crate) struct PackedMatrix {
    panels: Panels,
    in_features: usize,
    out_features: usize,
}

#[derive(Debug)]
enum Panels {
    F32(Vec<Lanes>),
    Bf16(Vec<Bf16Lanes>),
}

impl PackedMatrix {
    /// Packs a matrix whose rows (the weights of one output) `decode` writes out.
    ///
    /// With `bf16`, all of them must be bfloat16 numbers.
    pub(crate) fn pack(
        threads: &Threads,
        (out_features, in_features): (usize, usize),
        bf16: bool,
        decode: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let len = out_features.div_ceil(LANES) * in_features;
        let pack_panel =
            |panel: usize, row: &mut Vec<f32>, set: &mut dyn FnMut(usize, usize, f32)| {
                row.resize(in_features, 0.0);
                for lane in 0..LANES.min(out_features - panel * LANES) {
                    decode(panel * LANES + lane, row);
                    row.iter().enumerate().for_each(|(k, weight)| set(k, lane, *weight));
                }
            };
        let panels = if bf16 {
            let mut panels = vec![Bf16Lanes::ZERO; len];
            threads.share_chunks(&mut panels, in_features, |panel, row, lanes| {
                pack_panel(panel, row, &mut |k, lane, weight| {
                    lanes[k].0[lane] = (weight.to_bits() >> 16) as u16;
                });
            });
            Panels::Bf16(panels)
        } else {
            let mut panels = vec![Lanes::ZERO; len];
            threads.share_chunks(&mut panels, in_features, |panel, row, lanes| {
                pack_panel(panel, row, &mut |k, lane, weight| lanes[k].0[lane] = weight);
            });
            Panels::F32(panels)
        };
        Self { panels, in_features, out_features }
    }
}

/// What becomes of the output that was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// It is replaced.
    Store,
    /// It is added to (a residual connection).
    Add,
}

/// Panels that lie one behind the other.
#[derive(Clone, Copy)]
struct Contiguous<'a, S> {
    panels: &'a [S],
    in_features: usize,
}

impl<S: Stored> Operand for Contiguous<'_, S> {
    type Stored = S;

    #[inline(always)]
    fn num_segments(&self) -> usize {
        1
    }

    #[inline(always)]
    fn segment(&self, panel: usize, _segment: usize) -> &[S] {
        &self.panels[panel * self.in_features..][..self.in_features]
    }
}

/// A linear layer with its bias.
#[derive(Debug)]
pub(crate) struct Linear {
    /// `(out_features, in_features)`
    pub(crate) weight: PackedMatrix,
    /// `(out_features)`
    pub(crate) bias: Option<Vec<f32>>,
}

/// `out = x * weight^T + bias`, or added to `out`: `(num_rows, in_features) -> (num_rows, out_features)`.
pub(crate) fn matmul(
    cpu: &Cpu,
    (x, num_rows): (Rows<'_>, usize),
    linear: &Linear,
    (out, epilogue): (SharedRows<'_>, Epilogue),
) {
    let finish = match (epilogue, &linear.bias) {
        (Epilogue::Store, None) => Finish::Store,
        (Epilogue::Add, None) => Finish::Add,
        (Epilogue::Store, Some(bias)) => Finish::StoreBiased(bias),
        (Epilogue::Add, Some(bias)) => Finish::AddBiased(bias),
    };
    let PackedMatrix { panels, in_features, out_features } = &linear.weight;
    assert_eq!(out.width(), *out_features, "width of the output");
    let num_panels = out_features.div_ceil(LANES);
    let num_row_pieces = num_rows.div_ceil(PIECE_ROWS);
    let num_panel_pieces = num_panels.div_ceil(PIECE_PANELS);
    let work = num_rows * in_features * out_features;
    cpu.threads.share(num_row_pieces * num_panel_pieces, work, |piece| {
        let first_row = piece / num_panel_pieces * PIECE_ROWS;
        let first_panel = piece % num_panel_pieces * PIECE_PANELS;
        let rows = first_row..(first_row + PIECE_ROWS).min(num_rows);
        let columns = first_panel..(first_panel + PIECE_PANELS).min(num_panels);
        let in_features = *in_features;
        match panels {
            Panels::F32(panels) => {
                let w = Contiguous { panels, in_features };
                cpu.simd.run(Product { x, rows, w, panels: columns, out, finish });
            }
            Panels::Bf16(panels) => {
                let w = Contiguous { panels, in_features };
                cpu.simd.run(Product { x, rows, w, panels: columns, out, finish });
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Activations, Simd};
    use super::*;

    /// Numbers from -1 to 1 that bfloat16 holds.
    fn number(seed: usize) -> f32 {
        let mixed = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57;
        (mixed as f32 - 64.0) / 64.0
    }

    fn multiply(
        cpu: &Cpu,
        (rows, k, n): (usize, usize, usize),
        bf16: bool,
        bias: bool,
    ) -> Vec<f32> {
        let weight = PackedMatrix::pack(&cpu.threads, (n, k), bf16, |row, out| {
            out.iter_mut().enumerate().for_each(|(i, out)| *out = number(row * k + i));
        });
        let linear = Linear { weight, bias: bias.then(|| (0..n).map(number).collect()) };
        let mut x = Activations::new(rows, k);
        let mut out = Activations::new(rows, n);
        for row in 0..rows {
            x.row_mut(row).iter_mut().enumerate().for_each(|(i, x)| *x = number(7 + row * k + i));
        }
        matmul(cpu, (x.rows(), rows), &linear, (out.shared(), Epilogue::Store));
        matmul(cpu, (x.rows(), rows), &linear, (out.shared(), Epilogue::Add));
        (0..rows).flat_map(|row| out.row(row).to_vec()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn product_agrees_with_f64_and_is_the_same_everywhere(
            rows in 1usize..30, k in 1usize..70, n in 1usize..150, bias: bool,
        ) {
            let mut results = Vec::new();
            for simd in Simd::available() {
                for num_threads in [1, 2] {
                    let cpu = Cpu { simd, threads: Threads::new(num_threads).unwrap() };
                    for bf16 in [false, true] {
                        results.push(multiply(&cpu, (rows, k, n), bf16, bias));
                    }
                }
            }
            for row in 0..rows {
                for column in 0..n {
                    let sum: f64 = (0..k)
                        .map(|i| f64::from(number(7 + row * k + i)) * f64::from(number(column * k + i)))
                        .sum();
                    let want = 2.0 * (sum + if bias { f64::from(number(column)) } else { 0.0 });
                    let got = f64::from(results[0][row * n + column]);
                    prop_assert!((got - want).abs() < 1e-4, "({row}, {column}) is {got}, not {want}");
                }
            }
            for other in &results[1..] {
                let same = other.iter().zip(&results[0]).all(|(a, b)| a.to_bits() == b.to_bits());
                prop_assert!(same, "instruction sets, threads or formats differ");
            }
        }
    }
}
