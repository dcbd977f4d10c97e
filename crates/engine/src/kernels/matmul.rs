//! Linear layers: rows times packed weights.

use super::blocks::BlockProduct;
use super::int8;
use super::lanes::Stored;
use super::packed::{PackedMatrix, Panels};
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{Cpu, Finish, LANES, Operand, Product, Rows, SharedRows};

/// Rows of one piece of work: a panel stays in the nearest cache while they pass.
pub(super) const PIECE_ROWS: usize = 96;

/// Panels of one piece of work.
pub(super) const PIECE_PANELS: usize = 4;

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
pub(crate) struct Linear<M = PackedMatrix, V = Vec<f32>> {
    /// `(out_features, in_features)`
    pub(crate) weight: M,
    /// `(out_features)`
    pub(crate) bias: Option<V>,
}

impl Linear {
    /// How its sums are written.
    pub(super) fn finish(&self, epilogue: Epilogue) -> Finish<'_> {
        match (epilogue, &self.bias) {
            (Epilogue::Store, None) => Finish::Store,
            (Epilogue::Add, None) => Finish::Add,
            (Epilogue::Store, Some(bias)) => Finish::StoreBiased(bias),
            (Epilogue::Add, Some(bias)) => Finish::AddBiased(bias),
        }
    }
}

/// `out = x * weight^T + bias`, or added to `out`: `(num_rows, in_features) -> (num_rows, out_features)`.
pub(crate) fn matmul(
    cpu: &Cpu,
    (x, num_rows): (Rows<'_>, usize),
    linear: &Linear,
    (out, epilogue): (SharedRows<'_>, Epilogue),
) {
    let finish = linear.finish(epilogue);
    let PackedMatrix { parts, in_features, out_features } = &linear.weight;
    assert_eq!(out.width(), *out_features, "width of the output");
    for part in parts {
        let finish = finish.at_column(part.first_output);
        let out = out.columns(part.first_output, part.num_outputs);
        #[cfg(target_arch = "x86_64")]
        if let (Some(tiles), Some(weights)) = (&cpu.tiles, part.on_tiles()) {
            let weights = (weights, *in_features);
            tiles::matmul((cpu, tiles), (x, num_rows), weights, (out, finish));
            continue;
        }
        if let Panels::Int8(panels) = &part.panels {
            let weights = (panels, *in_features);
            int8::matmul(cpu, (x, num_rows), weights, (out, finish));
            continue;
        }
        let num_panels = part.num_outputs.div_ceil(LANES);
        let num_row_pieces = num_rows.div_ceil(PIECE_ROWS);
        let num_panel_pieces = num_panels.div_ceil(PIECE_PANELS);
        let work = num_rows * in_features * part.num_outputs;
        cpu.threads.share(num_row_pieces * num_panel_pieces, work, |piece| {
            let first_row = piece / num_panel_pieces * PIECE_ROWS;
            let first_panel = piece % num_panel_pieces * PIECE_PANELS;
            let rows = first_row..(first_row + PIECE_ROWS).min(num_rows);
            let panels = first_panel..(first_panel + PIECE_PANELS).min(num_panels);
            let in_features = *in_features;
            match &part.panels {
                Panels::F32(lanes) => {
                    let w = Contiguous { panels: lanes, in_features };
                    cpu.simd.run(Product { x, rows, w, panels, out, finish });
                }
                Panels::F16(lanes) => {
                    let w = Contiguous { panels: lanes, in_features };
                    cpu.simd.run(Product { x, rows, w, panels, out, finish });
                }
                Panels::Bf16(lanes) => {
                    let w = Contiguous { panels: lanes, in_features };
                    cpu.simd.run(Product { x, rows, w, panels, out, finish });
                }
                #[cfg(target_arch = "x86_64")]
                Panels::Tiles(_) => unreachable!("packed for a machine with a matrix unit"),
                Panels::Int8(_) => unreachable!("multiplied above"),
                Panels::Block(w) => {
                    cpu.simd.run(BlockProduct { x, rows, w, in_features, panels, out, finish });
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use proptest::prelude::*;

    use super::super::{Activations, Int8Columns, RowSource, Simd, Threads};
    use super::*;
    use crate::quant::BlockFormat;
    use crate::weights::Format;

    /// Numbers from -1 to 1 that bfloat16 and half precision hold.
    fn number(seed: usize) -> f32 {
        let mixed = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57;
        (mixed as f32 - 64.0) / 64.0
    }

    /// A row's bytes in a format; of blocks any bytes will do, with scales about 1.
    fn row_bytes(format: Format, row: usize, bytes: &mut [u8]) {
        let Format::Block(block) = format.given() else {
            let len = bytes.len() / format.given().num_bytes(1);
            let numbers: Vec<f32> = (0..len).map(|k| number(row * 1000 + k)).collect();
            format.given().encode(&numbers, bytes);
            return;
        };
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = ((row * 7919 + i) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7];
        }
        let halves: &[usize] = match block {
            BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K | BlockFormat::Q5K => &[0, 2],
            BlockFormat::Q2K => &[80, 82],
            BlockFormat::Q3K => &[108],
            BlockFormat::Q6K => &[208],
            _ => &[0],
        };
        for (index, bytes) in bytes.chunks_mut(block.block_bytes()).enumerate() {
            for at in halves {
                let half = half::f16::from_f32(number(row + index + at) / 256.0);
                bytes[*at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
        }
    }

    /// A matrix of several formats, one behind the other.
    fn pack(cpu: &Cpu, in_features: usize, parts: &[(Format, usize)]) -> PackedMatrix {
        let writes: Vec<_> = parts
            .iter()
            .map(|(format, _)| |row: usize, bytes: &mut [u8]| row_bytes(*format, row, bytes))
            .collect();
        let sources: Vec<_> = parts
            .iter()
            .zip(&writes)
            .map(|((format, num_rows), write)| RowSource {
                format: *format,
                num_rows: *num_rows,
                write,
            })
            .collect();
        PackedMatrix::pack(cpu, in_features, &sources).unwrap()
    }

    /// What outputs multiply: their weights, and what they take a row of inputs for.
    struct Decoded {
        weights: Vec<f32>,
        columns: Option<Rc<Int8Columns>>,
    }

    impl Decoded {
        /// The sum of the products with a row, and of their sizes.
        fn products(&self, row: &[f32]) -> (f64, f64) {
            let row = match &self.columns {
                Some(columns) => whole_numbers(row, columns),
                None => row.to_vec(),
            };
            let products =
                row.into_iter().zip(&self.weights).map(|(x, w)| f64::from(x) * f64::from(*w));
            products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
        }
    }

    /// A row as it is beside weights that are whole numbers.
    fn whole_numbers(row: &[f32], columns: &Int8Columns) -> Vec<f32> {
        let (by, scale) = int8::row_scale(row, columns);
        let rounded = |(k, x): (usize, &f32)| {
            let column: &[f32; 1] = columns.chunk(k);
            let [number] = int8::quantise(&[*x], column, by);
            number as f32 * scale / column[0]
        };
        row.iter().enumerate().map(rounded).collect()
    }

    fn decoded(in_features: usize, parts: &[(Format, usize)]) -> Vec<Decoded> {
        let given = |format: Format, row: usize| {
            let mut bytes = vec![0; format.given().num_bytes(in_features)];
            row_bytes(format, row, &mut bytes);
            let mut out = vec![0.0; in_features];
            format.given().decode(&bytes, &mut out);
            out
        };
        let mut decoded = Vec::new();
        for parts in parts.chunk_by(|(a, _), (b, _)| a == b) {
            let rows = parts.iter().flat_map(|(format, len)| (0..*len).map(|i| given(*format, i)));
            let mut rows: Vec<_> = rows.collect();
            let mut shared = None;
            if parts[0].0 == Format::Int8 {
                let threads = Threads::new(1).unwrap();
                let read = |row: usize, out: &mut [f32]| out.copy_from_slice(&rows[row]);
                let columns = Int8Columns::of(&threads, (rows.len(), in_features), read);
                let mut bytes = vec![0; Format::Int8.num_bytes(in_features)];
                for row in &mut rows {
                    columns.encode(row, &mut bytes);
                    columns.decode(&bytes, row);
                }
                shared = Some(Rc::new(columns));
            }
            let outputs = rows.into_iter();
            decoded.extend(outputs.map(|weights| Decoded { weights, columns: shared.clone() }));
        }
        decoded
    }

    fn multiply(cpu: &Cpu, rows: usize, linear: &Linear) -> Vec<f32> {
        let (k, n) = (linear.weight.in_features, linear.weight.out_features);
        let mut x = Activations::new(rows, k);
        let mut out = Activations::new(rows, n);
        for row in 0..rows {
            x.row_mut(row).iter_mut().enumerate().for_each(|(i, x)| *x = number(7 + row * k + i));
        }
        matmul(cpu, (x.rows(), rows), linear, (out.shared(), Epilogue::Store));
        matmul(cpu, (x.rows(), rows), linear, (out.shared(), Epilogue::Add));
        (0..rows).flat_map(|row| out.row(row).to_vec()).collect()
    }

    fn formats() -> Vec<Format> {
        let blocks = BlockFormat::ALL.map(Format::Block);
        [Format::F32, Format::F16, Format::Bf16, Format::Int8].into_iter().chain(blocks).collect()
    }

    /// What products may be off by, as a share of the sum of their sizes.
    fn error_bound(simd: Simd, k: usize, parts: &[(Format, usize)]) -> f64 {
        let has = |is: fn(&Format) -> bool| parts.iter().any(|(format, _)| is(format));
        // On tiles the left-hand side counts to 2^-17, a decoded weight to 2^-9.
        let unit = simd.has_matrix_unit();
        let rounding = [
            (unit && has(|format| matches!(format, Format::Block(_))), -9),
            (unit && has(|format| *format == Format::Bf16), -17),
        ];
        let rounds = rounding.iter().find(|(rounds, _)| *rounds);
        let rounding = rounds.map_or(0.0, |(_, bits)| f64::powi(2.0, *bits));
        2.0 * rounding + 1e-6 * (k as f64).sqrt()
    }

    /// Checks one matrix everywhere against `f64`, and every output of it against what it decodes to.
    fn check(rows: usize, k: usize, parts: &[(Format, usize)], bias: bool) {
        let weights = decoded(k, parts);
        let mut results: Vec<(Simd, Vec<f32>)> = Vec::new();
        for simd in Simd::available() {
            for num_threads in [1, 2] {
                let cpu = Cpu::new(simd, Threads::new(num_threads).unwrap());
                let weight = pack(&cpu, k, parts);
                let mut row = vec![0.0; k];
                for (output, want) in weights.iter().enumerate() {
                    weight.row(simd, output, &mut row);
                    assert_eq!(row, want.weights, "{}: output {output} of {parts:?}", simd.name());
                }
                let bias = bias.then(|| (0..weights.len()).map(number).collect());
                results.push((simd, multiply(&cpu, rows, &Linear { weight, bias })));
            }
        }
        // Everything is the same to the bit, but for what a matrix unit rounds in its own way.
        let rounds_alike = |(format, _): &(Format, usize)| {
            matches!(format, Format::F32 | Format::F16 | Format::Int8)
        };
        let is_exact = parts.iter().all(rounds_alike);
        let is_alike = |a: Simd, b: Simd| is_exact || a.has_matrix_unit() == b.has_matrix_unit();
        for chunk in results.chunk_by(|(a, _), (b, _)| is_alike(*a, *b)) {
            let (simd, first) = &chunk[0];
            for (other, result) in &chunk[1..] {
                let same = result.iter().zip(first).all(|(a, b)| a.to_bits() == b.to_bits());
                let (simd, other) = (simd.name(), other.name());
                assert!(same, "{simd} and {other}, or threads, differ for {parts:?}");
            }
            let share = error_bound(*simd, k, parts);
            for row in 0..rows {
                let x: Vec<f32> = (0..k).map(|i| number(7 + row * k + i)).collect();
                for (column, weights) in weights.iter().enumerate() {
                    let (sum, size) = weights.products(&x);
                    let want = 2.0 * (sum + if bias { f64::from(number(column)) } else { 0.0 });
                    let got = f64::from(first[row * weights_len(parts) + column]);
                    let bound = share * (size + 1.0);
                    let name = simd.name();
                    assert!(
                        (got - want).abs() < bound,
                        "{name}: ({row}, {column}) is {got}, not {want}"
                    );
                }
            }
        }
    }

    fn weights_len(parts: &[(Format, usize)]) -> usize {
        parts.iter().map(|(_, len)| len).sum()
    }

    #[test]
    fn every_format_multiplies_as_what_it_decodes_to() {
        for format in formats() {
            for (rows, k, n) in [(1, 256, 16), (3, 512, 70), (9, 256, 33), (100, 1024, 70)] {
                check(rows, k, &[(format, n)], rows % 2 == 1);
            }
        }
    }

    /// A row's products don't depend on the rows beside it: 1, 16, 17, 32, 33 and 300 rows take different ways.
    #[test]
    fn a_row_is_multiplied_alike_whatever_stands_beside_it() {
        // More inputs than a matrix unit takes in one block, and several pairs of panels.
        let (k, n) = (1024, 150);
        let block = Format::Block(BlockFormat::Q8_0);
        for format in [Format::F32, Format::F16, Format::Bf16, Format::Int8, block] {
            for simd in Simd::available() {
                let cpu = Cpu::new(simd, Threads::new(2).unwrap());
                let linear = Linear { weight: pack(&cpu, k, &[(format, n)]), bias: None };
                let all = multiply(&cpu, 300, &linear);
                for rows in [1, 15, 16, 17, 32, 33, 100, 257] {
                    let some = multiply(&cpu, rows, &linear);
                    let same = some.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{}: {rows} rows of {format}", simd.name());
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn product_agrees_with_f64_and_is_the_same_everywhere(
            rows in 1usize..30, k in 1usize..70, n in 1usize..150, bias: bool,
        ) {
            check(rows, k, &[(Format::F32, n), (Format::Bf16, n / 2), (Format::F16, 3)], bias);
        }

        #[test]
        fn a_matrix_of_several_formats_is_one_matrix(
            rows in 1usize..12,
            parts in proptest::collection::vec((proptest::sample::select(formats()), 1usize..40), 1..4),
        ) {
            check(rows, 256, &parts, true);
        }
    }
}
