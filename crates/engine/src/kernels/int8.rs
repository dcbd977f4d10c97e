//! Weights of 8 bits with a scale for each output and each input, times activations of up to 16 bits with a scale for
//! each row.
//!
//! Products of whole numbers are added up exactly, so the same bits come out of every instruction set, of vector units
//! and matrix units alike. An input's scale brings its weights nearer to the size of all others' and is multiplied into
//! its activations. A row's scale is such that most activations have room in 8 bits; the large ones have 16, so that they
//! don't make the others coarse.

#[cfg(target_arch = "x86_64")]
mod vnni;

use std::ops::Range;
use std::sync::Mutex;

#[cfg(target_arch = "x86_64")]
use super::Gates;
use super::lanes::{LINE_BYTES, Line};
use super::memory::Zeroed;
use super::{
    Cpu, Finish, Kernel, LANES, Lanes, PAIR_LINES, PAIR_OUTPUTS, Rows, SharedRows, Threads, Vector,
    lock,
};
use crate::weights::INT8_SCALE_BYTES;

/// Inputs of a tile: a line has four of 16 outputs.
pub(super) const TILE_INPUTS: usize = LANES * GROUP;

/// Inputs that lie side by side.
const GROUP: usize = LINE_BYTES / LANES;

/// Lines behind the tiles of a pair of panels: their scales.
const SCALE_LINES: usize = 2;

/// The largest whole number of an activation: neither of its bytes is above 127.
const MAX: f32 = 127.0 * 256.0 + 127.0;

/// How much larger than its row's mean an activation is that still has room in the lower byte. Of normal distributions 1 in
/// 700 is larger, of what comes out of gates 1 in 25: those have bits in the upper one.
const MEANS_OF_A_BYTE: f32 = 4.0;

/// Tiles along the inputs whose products are less than 2^31 together, with activations of 16 bits.
const STRETCH_TILES: usize = 512 / TILE_INPUTS;

/// Numbers of 16 bits in a line.
const LINE_NUMBERS: usize = LINE_BYTES / 2;

/// Groups of them.
const LINE_GROUPS: usize = LINE_NUMBERS / GROUP;

/// Rows whose squares are added up together.
const COLUMN_PIECE_ROWS: usize = 256;

/// The smallest scale of an input, where the average is 1.
const SMALLEST_COLUMN: f32 = 1.0 / 1024.0;

/// Rows of one piece of work.
const PIECE_ROWS: usize = 64;

/// Panels of one piece of work.
const PIECE_PANELS: usize = 4;

/// The scales of a matrix' inputs, filled up to whole tiles.
#[derive(Debug)]
pub(crate) struct Int8Columns(Vec<f32>);

impl Int8Columns {
    /// The square roots of the columns' root mean squares, so that columns are brought half of the way to one size:
    /// inputs that are large where their weights are would be rounded more coarsely otherwise. `read(row, numbers)` gives
    /// rows.
    pub(crate) fn of(
        threads: &Threads,
        (num_rows, row_len): (usize, usize),
        read: impl Fn(usize, &mut [f32]) + Send + Sync,
    ) -> Self {
        // Added up piece by piece: the same whatever the number of threads.
        let mut sums = vec![0.0; num_rows.div_ceil(COLUMN_PIECE_ROWS) * row_len];
        threads.share_chunks(&mut sums, row_len.max(1), |piece, row: &mut Vec<f32>, sums| {
            row.resize(row_len, 0.0);
            let first = piece * COLUMN_PIECE_ROWS;
            for index in first..num_rows.min(first + COLUMN_PIECE_ROWS) {
                read(index, row);
                for (sum, x) in sums.iter_mut().zip(&*row) {
                    *sum += f64::from(*x) * f64::from(*x);
                }
            }
        });
        let mut squares = vec![0.0; row_len];
        for sums in sums.chunks_exact(row_len.max(1)) {
            squares.iter_mut().zip(sums).for_each(|(square, sum)| *square += sum);
        }
        let mean = squares.iter().sum::<f64>() / row_len as f64;
        let scale = |square: &f64| ((square / mean).sqrt().sqrt() as f32).max(SMALLEST_COLUMN);
        // Of zeros alone, any scale will do.
        let mut scales: Vec<_> = squares.iter().map(scale).collect();
        scales.resize(row_len.next_multiple_of(TILE_INPUTS), 1.0);
        Self(scales)
    }

    /// Rounds a row: its scale, and then its numbers. The largest one gets 127: among a thousand numbers or so a smaller
    /// scale, which cuts some off, costs more than it gives.
    pub(crate) fn encode(&self, numbers: &[f32], bytes: &mut [u8]) {
        let scaled = |(x, column): (&f32, &f32)| x / column;
        let numbers = numbers.iter().zip(&self.0).map(scaled);
        let largest = numbers.clone().fold(0.0, |largest: f32, x| largest.max(x.abs()));
        let scale = largest / 127.0;
        let by = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let (first, rest) = bytes.split_at_mut(INT8_SCALE_BYTES);
        first.copy_from_slice(&scale.to_le_bytes());
        for (byte, number) in rest.iter_mut().zip(numbers) {
            *byte = nearest(number * by) as u8;
        }
    }

    /// Widens a row.
    pub(crate) fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        let (scale, numbers) = split_row(bytes);
        for ((out, number), column) in out.iter_mut().zip(numbers).zip(&self.0) {
            *out = f32::from(number.cast_signed()) * scale * column;
        }
    }

    /// Memory of those of so many inputs.
    pub(crate) fn num_bytes(row_len: usize) -> usize {
        row_len.next_multiple_of(TILE_INPUTS) * size_of::<f32>()
    }

    /// Those of the inputs from `first` on.
    #[inline(always)]
    pub(super) fn chunk<const N: usize>(&self, first: usize) -> &[f32; N] {
        self.0[first..].first_chunk().expect("whole tiles of inputs")
    }
}

/// The scale and the numbers of a row.
fn split_row(bytes: &[u8]) -> (f32, &[u8]) {
    let (scale, numbers) = bytes.split_first_chunk().expect("a row begins with its scale");
    (f32::from_le_bytes(*scale), numbers)
}

/// Pairs of panels: for each 64 inputs a tile of either panel, and behind them the scales of the outputs.
#[derive(Debug)]
pub(super) struct Int8Panels {
    lines: Zeroed<Line>,
    k_tiles: usize,
    columns: Int8Columns,
}

impl Int8Panels {
    /// Panels of zeros.
    pub(super) fn new(out_features: usize, columns: Int8Columns) -> std::io::Result<Self> {
        let in_features = columns.0.len();
        let lines = Zeroed::new_streamed(num_lines(out_features, in_features))?;
        Ok(Self { lines, k_tiles: in_features / TILE_INPUTS, columns })
    }

    /// The scales of the inputs, and the pairs of panels, each [`Self::pair_lines`] lines, to be filled by
    /// [`pack_row`].
    pub(super) fn parts_mut(&mut self) -> (&Int8Columns, &mut [Line]) {
        (&self.columns, &mut self.lines)
    }

    /// The scales of the inputs.
    #[inline(always)]
    pub(super) fn columns(&self) -> &Int8Columns {
        &self.columns
    }

    /// All pairs.
    pub(super) fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Lines from a pair to the next.
    #[inline(always)]
    pub(super) fn pair_lines(&self) -> usize {
        self.k_tiles * PAIR_LINES + SCALE_LINES
    }

    /// Memory that it takes.
    pub(super) fn num_bytes(&self) -> usize {
        size_of_val(&*self.lines) + Int8Columns::num_bytes(self.columns.0.len())
    }

    /// Widens the weights of one output.
    pub(super) fn row(&self, output: usize, out: &mut [f32]) {
        let pair = &self.lines[output / PAIR_OUTPUTS * self.pair_lines()..][..self.pair_lines()];
        let scale = self.scales(output / LANES).0[output % LANES];
        for (k, out) in out.iter_mut().enumerate() {
            let (line, at) = place(output % PAIR_OUTPUTS, k);
            *out = f32::from(pair[line].0[at].cast_signed()) * scale * self.columns.0[k];
        }
    }

    /// The scales of a panel.
    #[inline(always)]
    pub(super) fn scales(&self, panel: usize) -> Lanes {
        let line = panel / 2 * self.pair_lines() + self.k_tiles * PAIR_LINES + panel % 2;
        let line = &self.lines[line];
        Lanes(std::array::from_fn(|lane| line.number(lane)))
    }

    /// Lines of the tile of a panel.
    #[inline(always)]
    fn tile(&self, panel: usize, k_tile: usize) -> &[Line; LANES] {
        let first = panel / 2 * self.pair_lines() + k_tile * PAIR_LINES + panel % 2 * LANES;
        self.lines[first..].first_chunk().expect("a tile of the matrix")
    }
}

/// Memory that a matrix takes.
pub(super) fn packed_bytes(out_features: usize, in_features: usize) -> usize {
    num_lines(out_features, in_features) * size_of::<Line>() + Int8Columns::num_bytes(in_features)
}

/// Lines of a matrix.
fn num_lines(out_features: usize, in_features: usize) -> usize {
    let pair_lines = in_features.div_ceil(TILE_INPUTS) * PAIR_LINES + SCALE_LINES;
    out_features.div_ceil(PAIR_OUTPUTS) * pair_lines
}

/// Where a weight is in its pair of panels: its line, and its place there.
fn place(output: usize, k: usize) -> (usize, usize) {
    let tile = k / TILE_INPUTS * 2 + output / LANES;
    (tile * LANES + k % TILE_INPUTS / GROUP, output % LANES * GROUP + k % GROUP)
}

/// Puts one output's row, a scale and then numbers, into a pair of panels of zeros.
pub(super) fn pack_row(row: &[u8], output: usize, pair: &mut [Line]) {
    let (scale, numbers) = split_row(row);
    let scales = pair.len() - SCALE_LINES + output / LANES;
    pair[scales].set_number(output % LANES, scale);
    for (k, number) in numbers.iter().enumerate() {
        let (line, at) = place(output, k);
        pair[line].0[at] = *number;
    }
}

/// What makes whole numbers of a row, after its columns' scales, and its scale: what makes them numbers again. That is
/// none if the row has any that is none, and so will all products be.
#[inline(always)]
pub(super) fn row_scale(row: &[f32], columns: &Int8Columns) -> (f32, f32) {
    let share = 1.0 / row.len() as f32;
    let mut largest = [0; LANES];
    let mut means = [0.0; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for (index, chunk) in chunks.iter().enumerate() {
        let columns = columns.chunk::<LANES>(index * LANES);
        let sizes: [f32; LANES] = std::array::from_fn(|lane| (chunk[lane] * columns[lane]).abs());
        for lane in 0..LANES {
            // As whole numbers, so that what is no number is the largest.
            largest[lane] = largest[lane].max(sizes[lane].to_bits());
        }
        for lane in 0..LANES {
            // The sum of very large numbers would be none.
            means[lane] += sizes[lane] * share;
        }
    }
    let columns = &columns.0[chunks.len() * LANES..];
    for (lane, (x, column)) in rest.iter().zip(columns).enumerate() {
        let size = (x * column).abs();
        largest[lane] = largest[lane].max(size.to_bits());
        means[lane] += size * share;
    }
    let largest = f32::from_bits(largest.into_iter().fold(0, u32::max));
    let mean = means.into_iter().sum::<f32>();
    let scale = (mean * (MEANS_OF_A_BYTE / 127.0)).max(largest / MAX);
    let by = 1.0 / scale;
    let by = if by.is_finite() { by } else { 0.0 };
    (by, if largest.is_finite() { scale } else { f32::NAN })
}

/// Numbers as whole ones.
#[inline(always)]
pub(super) fn quantise<const N: usize>(
    numbers: &[f32; N],
    columns: &[f32; N],
    by: f32,
) -> [i32; N] {
    let mut quantised = [0; N];
    for ((quantised, x), column) in quantised.iter_mut().zip(numbers).zip(columns) {
        *quantised = nearest(x * column * by);
    }
    quantised
}

/// The nearest whole number, of numbers below 2^22.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    // Adding it leaves the nearest whole number in the low bits of the mantissa.
    const ROUNDER: f32 = 12_582_912.0;
    (x + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()).cast_signed()
}

/// Rows of activations as whole numbers: a row is its numbers of 16 bits in lines, and then a line with its scale.
#[derive(Debug, Default)]
struct QuantisedRows {
    lines: Vec<Line>,
    row_lines: usize,
}

impl QuantisedRows {
    fn fill(&mut self, cpu: &Cpu, (x, num_rows): (Rows<'_>, usize), w: (&Int8Panels, usize)) {
        let (Int8Panels { columns, k_tiles, .. }, in_features) = w;
        self.row_lines = k_tiles * TILE_INPUTS / LINE_NUMBERS + 1;
        let num_lines = num_rows * self.row_lines;
        if self.lines.len() < num_lines {
            self.lines.resize(num_lines, Line::ZERO);
        }
        let lines = &mut self.lines[..num_lines];
        cpu.threads.share_chunks(lines, self.row_lines, |row, (): &mut (), lines| {
            cpu.simd.run(QuantiseRow { numbers: x.slice(row, 0, in_features), columns, lines });
        });
    }

    /// The numbers of a row, 32 in a line, and its scale.
    #[inline(always)]
    fn row(&self, row: usize) -> (&[Line], f32) {
        let lines = &self.lines[row * self.row_lines..][..self.row_lines];
        let (scale, numbers) = lines.split_last().expect("a row has a line with its scale");
        (numbers, scale.number(0))
    }
}

struct QuantiseRow<'a> {
    numbers: &'a [f32],
    columns: &'a Int8Columns,
    lines: &'a mut [Line],
}

impl Kernel for QuantiseRow<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let (by, scale) = row_scale(self.numbers, self.columns);
        let (last, lines) = self.lines.split_last_mut().expect("a line for the scale");
        last.set_number(0, scale);
        for (index, line) in lines.iter_mut().enumerate() {
            let first = index * LINE_NUMBERS;
            let mut numbers = [0.0; LINE_NUMBERS];
            let len = self.numbers.len().saturating_sub(first).min(LINE_NUMBERS);
            numbers[..len].copy_from_slice(&self.numbers[self.numbers.len().min(first)..][..len]);
            let quantised = quantise(&numbers, self.columns.chunk(first), by);
            for (bytes, number) in line.0.as_chunks_mut::<2>().0.iter_mut().zip(quantised) {
                *bytes = (number as i16).to_le_bytes();
            }
        }
    }
}

/// Left-hand sides as vector units take them: memory that is used again.
#[derive(Debug, Default)]
pub(super) struct Quantised {
    rows: Mutex<QuantisedRows>,
    #[cfg(target_arch = "x86_64")]
    byte_rows: Mutex<vnni::ByteRows>,
}

/// `out = x * w` on vector units: `(num_rows, in_features) -> (num_rows, out_features)`.
pub(super) fn matmul(
    cpu: &Cpu,
    (x, num_rows): (Rows<'_>, usize),
    (w, in_features): (&Int8Panels, usize),
    (out, finish): (SharedRows<'_>, Finish<'_>),
) {
    #[cfg(target_arch = "x86_64")]
    if cpu.simd.multiplies_bytes() {
        let rows = &mut *lock(&cpu.quantised.byte_rows);
        let shape = (in_features, out.width());
        vnni::matmul((cpu, rows), (x, num_rows), (w, shape), vnni::Output::Rows(out, finish));
        return;
    }
    let mut quantised = lock(&cpu.quantised.rows);
    quantised.fill(cpu, (x, num_rows), (w, in_features));
    let x = &*quantised;
    let num_panels = out.width().div_ceil(LANES);
    let num_row_pieces = num_rows.div_ceil(PIECE_ROWS);
    let num_panel_pieces = num_panels.div_ceil(PIECE_PANELS);
    let work = num_rows * in_features * out.width();
    cpu.threads.share(num_row_pieces * num_panel_pieces, work, |piece| {
        let first_row = piece % num_row_pieces * PIECE_ROWS;
        let first_panel = piece / num_row_pieces * PIECE_PANELS;
        let rows = first_row..(first_row + PIECE_ROWS).min(num_rows);
        let panels = first_panel..(first_panel + PIECE_PANELS).min(num_panels);
        cpu.simd.run(Int8Product { x, rows, w, panels, out, finish });
    });
}

/// `out = gates(x * w)`, where `w` is gates and behind them ups, both whole pairs of panels:
/// `(num_rows, in_features) -> (num_rows, out_features / 2)`. Only where `cpu` multiplies bytes.
#[cfg(target_arch = "x86_64")]
pub(super) fn matmul_gated(
    cpu: &Cpu,
    (x, num_rows): (Rows<'_>, usize),
    (w, in_features): (&Int8Panels, usize),
    (out, gates): (SharedRows<'_>, Gates<'_>),
) {
    let rows = &mut *lock(&cpu.quantised.byte_rows);
    let shape = (in_features, 2 * out.width());
    vnni::matmul((cpu, rows), (x, num_rows), (w, shape), vnni::Output::Gated(out, gates));
}

/// `out[rows, 16 * panels] = x[rows, k] * w[panels]`.
///
/// Whoever runs it must be the only one to touch those rows and columns of `out`.
struct Int8Product<'a> {
    x: &'a QuantisedRows,
    rows: Range<usize>,
    w: &'a Int8Panels,
    panels: Range<usize>,
    out: SharedRows<'a>,
    finish: Finish<'a>,
}

impl Kernel for Int8Product<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        for panel in self.panels.clone() {
            let mut row = self.rows.start;
            while row < self.rows.end {
                match self.rows.end - row {
                    4.. if V::MAX_SUMS >= 4 => row += self.rows::<V, 4>(row, panel),
                    2.. if V::MAX_SUMS >= 2 => row += self.rows::<V, 2>(row, panel),
                    _ => row += self.rows::<V, 1>(row, panel),
                }
            }
        }
    }
}

impl Int8Product<'_> {
    /// Multiplies `R` rows, and says how many that were.
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint columns of the same rows")]
    fn rows<V: Vector, const R: usize>(&self, row: usize, panel: usize) -> usize {
        let rows: [(&[Line], f32); R] = std::array::from_fn(|r| self.x.row(row + r));
        let mut upper = [[0; LANES]; R];
        let mut lower = [[0; LANES]; R];
        for first in (0..self.w.k_tiles).step_by(STRETCH_TILES) {
            let mut sums = [V::zero_sums(); R];
            for k_tile in first..self.w.k_tiles.min(first + STRETCH_TILES) {
                let tile = self.w.tile(panel, k_tile);
                for (k, weights) in tile.iter().enumerate() {
                    for r in 0..R {
                        let at = k_tile * LANES + k;
                        let inputs = rows[r].0[at / LINE_GROUPS].group(at % LINE_GROUPS);
                        sums[r] = V::add_products(sums[r], inputs, weights);
                    }
                }
            }
            for r in 0..R {
                for (lane, sum) in V::read_sums(sums[r]).into_iter().enumerate() {
                    upper[r][lane] += sum >> 8;
                    lower[r][lane] += sum & 255;
                }
            }
        }
        let scales = V::load(&self.w.scales(panel));
        for r in 0..R {
            let bits = |sums: [i32; LANES]| Lanes(sums.map(|sum| f32::from_bits(sum as u32)));
            let sum = V::join(&bits(upper[r]), &bits(lower[r]));
            let mut sums = Lanes::ZERO;
            sum.mul(V::splat(rows[r].1)).mul(scales).store(&mut sums);
            // SAFETY: the rows and columns of this product are the runner's alone.
            unsafe { self.finish.write(self.out, row + r, panel * LANES, &sums) };
        }
        R
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Activations, Epilogue, Linear, PackedMatrix, RowSource, Simd, matmul};
    use super::*;
    use crate::weights::Format;

    fn multiply(simd: Simd, weights: &[f32], x: &[f32]) -> Vec<f32> {
        let cpu = Cpu::new(simd, Threads::new(1).unwrap());
        let write = |row: usize, bytes: &mut [u8]| {
            Format::F32.encode(&weights[row * x.len()..][..x.len()], bytes);
        };
        let num_rows = weights.len() / x.len();
        let source = RowSource { format: Format::Int8, num_rows, write: &write };
        let weight = PackedMatrix::pack(&cpu, x.len(), &[source]).unwrap();
        let mut rows = Activations::new(1, x.len());
        rows.row_mut(0).copy_from_slice(x);
        let mut out = Activations::new(1, num_rows);
        let linear = Linear { weight, bias: None };
        matmul(&cpu, (rows.rows(), 1), &linear, (out.shared(), Epilogue::Store));
        out.row(0).to_vec()
    }

    #[test]
    fn the_largest_sums_fit() {
        // As many inputs as there may be, and as many of the largest: more of a row can't be so far above its mean.
        let len = Format::Int8.max_row_len();
        let weights: Vec<f32> = (0..3 * len).map(|i| [1.0, -1.0, 0.5][i / len]).collect();
        let x: Vec<f32> = (0..len).map(|k| if k.is_multiple_of(4) { 3.0 } else { 0.0 }).collect();
        for simd in Simd::available() {
            let out = multiply(simd, &weights, &x);
            let want = [3.0, -3.0, 1.5].map(|x| x * len as f32 / 4.0);
            for (out, want) in out.iter().zip(want) {
                assert!((out / want - 1.0).abs() < 1e-5, "{}: {out}, {want}", simd.name());
            }
        }
    }

    #[test]
    fn small_activations_count_beside_large_ones() {
        let mut x = vec![1.0; 256];
        x[7] = 1000.0;
        let weights: Vec<f32> = (0..256).map(|k| if k == 7 { 0.0 } else { 1.0 }).collect();
        for simd in Simd::available() {
            let out = multiply(simd, &weights, &x)[0];
            assert!((out - 255.0).abs() < 255.0 * 0.02, "{}: {out}", simd.name());
        }
    }

    #[test]
    fn activations_are_off_by_half_a_step_at_most_and_large_ones_keep_their_size() {
        let columns = Int8Columns((0..128).map(|k| 0.5 + k as f32 / 64.0).collect());
        for largest in [1.0, 100.0, 1e5] {
            let mut row: Vec<f32> =
                (0..100).map(|k| ((k * 37) % 100) as f32 / 50.0 - 1.0).collect();
            row[33] = largest;
            let (by, scale) = row_scale(&row, &columns);
            let scaled: Vec<f32> = row.iter().zip(&columns.0).map(|(x, c)| x * c).collect();
            let mean = scaled.iter().map(|x| x.abs()).sum::<f32>() / 100.0;
            // Beyond 256 times what fits a byte, the largest is what counts.
            let step = (4.0 * mean / 127.0).max(scaled[33] / MAX);
            assert!((scale / step - 1.0).abs() < 1e-5, "{scale}, {step}");
            for (k, (x, scaled)) in row.iter().zip(scaled).enumerate() {
                let [number] = quantise(&[*x], columns.chunk(k), by);
                let off = (number as f32 * scale - scaled).abs();
                assert!(off <= 0.501 * step, "{largest}: {off} of {step}");
            }
        }
    }

    #[test]
    fn rows_of_zeros_and_of_what_is_no_number() {
        for simd in Simd::available() {
            let with =
                |x: f32| multiply(simd, &[1.0; 80], &[[1.0; 79].as_slice(), &[x]].concat())[0];
            assert_eq!(multiply(simd, &[0.0; 80], &[1.0; 80])[0], 0.0);
            assert_eq!(multiply(simd, &[1.0; 80], &[0.0; 80])[0], 0.0);
            assert_eq!(multiply(simd, &[1.0; 80], &[1e-42; 80])[0], 0.0);
            assert!((with(1.0) - 80.0).abs() < 80.0 * 0.01);
            for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(with(x).is_nan(), "{}: {x}", simd.name());
            }
        }
    }

    #[test]
    fn columns_of_several_sizes_lose_less() {
        let (rows, len) = (40, 96);
        let size = |k: usize| if k.is_multiple_of(8) { 8.0 } else { 0.5 };
        let weight = |i: usize| ((i * 7919 + 13) % 101) as f32 / 50.0 - 1.0;
        let read = |row: usize, out: &mut [f32]| {
            for (k, out) in out.iter_mut().enumerate() {
                *out = weight(row * len + k) * size(k);
            }
        };
        let columns = Int8Columns::of(&Threads::new(2).unwrap(), (rows, len), read);
        let flat = Int8Columns(vec![1.0; 128]);
        let error = |columns: &Int8Columns| {
            let (mut row, mut decoded) = (vec![0.0; len], vec![0.0; len]);
            let mut bytes = vec![0; Format::Int8.num_bytes(len)];
            let mut error = 0.0;
            for index in 0..rows {
                read(index, &mut row);
                columns.encode(&row, &mut bytes);
                columns.decode(&bytes, &mut decoded);
                error += row.iter().zip(&decoded).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
            }
            error
        };
        assert!(error(&columns) < 0.5 * error(&flat), "{} {}", error(&columns), error(&flat));
    }
}
