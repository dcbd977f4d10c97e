//! Weights of 8 bits with a scale for each output, times activations of 16 bits with a scale for each row.
//!
//! Products of whole numbers are added up exactly, so the same bits come out of every instruction set, of vector units
//! and matrix units alike. An activation counts to 2^-16 of the largest one of its row.

use std::ops::Range;
use std::sync::Mutex;

use super::lanes::{LINE_BYTES, Line};
use super::memory::Zeroed;
use super::{
    Cpu, Finish, Kernel, LANES, Lanes, PAIR_LINES, PAIR_OUTPUTS, Rows, SharedRows, Vector, lock,
};
use crate::weights::int8_row;

/// Inputs of a tile: a line has four of 16 outputs.
pub(super) const TILE_INPUTS: usize = LANES * GROUP;

/// Inputs that lie side by side.
const GROUP: usize = LINE_BYTES / LANES;

/// Lines behind the tiles of a pair of panels: their scales.
const SCALE_LINES: usize = 2;

/// The largest whole number of an activation: both of its bytes hold -127 to 127.
const MAX: f32 = 127.0 * 256.0 + 127.0;

/// Tiles along the inputs whose products are less than 2^31 together, with activations of 16 bits.
const STRETCH_TILES: usize = 512 / TILE_INPUTS;

/// Numbers of 16 bits in a line.
const LINE_NUMBERS: usize = LINE_BYTES / 2;

/// Groups of them.
const LINE_GROUPS: usize = LINE_NUMBERS / GROUP;

/// Rows of one piece of work.
const PIECE_ROWS: usize = 64;

/// Panels of one piece of work.
const PIECE_PANELS: usize = 4;

/// Pairs of panels: for each 64 inputs a tile of either panel, and behind them the scales of the outputs.
#[derive(Debug)]
pub(super) struct Int8Panels {
    lines: Zeroed<Line>,
    k_tiles: usize,
}

impl Int8Panels {
    /// Panels of zeros.
    pub(super) fn new(out_features: usize, in_features: usize) -> std::io::Result<Self> {
        let lines = Zeroed::new_streamed(num_lines(out_features, in_features))?;
        Ok(Self { lines, k_tiles: in_features.div_ceil(TILE_INPUTS) })
    }

    /// All pairs, each [`Self::pair_lines`] lines, to be filled by [`pack_row`].
    pub(super) fn lines_mut(&mut self) -> &mut [Line] {
        &mut self.lines
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
        size_of_val(&*self.lines)
    }

    /// Widens the weights of one output.
    pub(super) fn row(&self, output: usize, out: &mut [f32]) {
        let pair = &self.lines[output / PAIR_OUTPUTS * self.pair_lines()..][..self.pair_lines()];
        let scale = self.scales(output / LANES).0[output % LANES];
        for (k, out) in out.iter_mut().enumerate() {
            let (line, at) = place(output % PAIR_OUTPUTS, k);
            *out = f32::from(pair[line].0[at].cast_signed()) * scale;
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

/// Lines of a matrix.
pub(super) fn num_lines(out_features: usize, in_features: usize) -> usize {
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
    let (scale, numbers) = int8_row(row);
    let scales = pair.len() - SCALE_LINES + output / LANES;
    pair[scales].set_number(output % LANES, scale);
    for (k, number) in numbers.enumerate() {
        let (line, at) = place(output, k);
        pair[line].0[at] = number.cast_unsigned();
    }
}

/// What makes whole numbers of a row, and its scale: what makes them numbers again. That is none if the row has any
/// that is none, and so will all products be.
#[inline(always)]
pub(super) fn row_scale(row: &[f32]) -> (f32, f32) {
    // As whole numbers, so that what is no number is the largest.
    let largest = row.iter().map(|x| x.abs().to_bits()).fold(0, u32::max);
    let largest = f32::from_bits(largest);
    let by = MAX / largest;
    let by = if by.is_finite() { by } else { 0.0 };
    (by, if largest.is_finite() { largest / MAX } else { f32::NAN })
}

/// Numbers as whole ones.
#[inline(always)]
pub(super) fn quantise<const N: usize>(numbers: &[f32; N], by: f32) -> [i32; N] {
    // Adding it leaves the nearest whole number in the low bits of the mantissa.
    const ROUNDER: f32 = 12_582_912.0;
    let mut quantised = [0; N];
    for (quantised, x) in quantised.iter_mut().zip(numbers) {
        *quantised = (x * by + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()).cast_signed();
    }
    quantised
}

/// Rows of activations as whole numbers: a row is its numbers of 16 bits in lines, and then a line with its scale.
#[derive(Debug, Default)]
pub(super) struct QuantisedRows {
    lines: Vec<Line>,
    row_lines: usize,
}

impl QuantisedRows {
    fn fill(&mut self, cpu: &Cpu, (x, num_rows): (Rows<'_>, usize), in_features: usize) {
        self.row_lines = in_features.next_multiple_of(TILE_INPUTS) / LINE_NUMBERS + 1;
        let num_lines = num_rows * self.row_lines;
        if self.lines.len() < num_lines {
            self.lines.resize(num_lines, Line::ZERO);
        }
        let lines = &mut self.lines[..num_lines];
        cpu.threads.share_chunks(lines, self.row_lines, |row, (): &mut (), lines| {
            cpu.simd.run(QuantiseRow { numbers: x.slice(row, 0, in_features), lines });
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
    lines: &'a mut [Line],
}

impl Kernel for QuantiseRow<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let (by, scale) = row_scale(self.numbers);
        let (last, lines) = self.lines.split_last_mut().expect("a line for the scale");
        last.set_number(0, scale);
        let put = |line: &mut Line, numbers: &[f32; LINE_NUMBERS]| {
            let quantised = quantise(numbers, by);
            for (bytes, number) in line.0.as_chunks_mut::<2>().0.iter_mut().zip(quantised) {
                *bytes = (number as i16).to_le_bytes();
            }
        };
        let (chunks, rest) = self.numbers.as_chunks::<LINE_NUMBERS>();
        let (full, last) = lines.split_at_mut(chunks.len());
        for (line, numbers) in full.iter_mut().zip(chunks) {
            put(line, numbers);
        }
        let mut numbers = [0.0; LINE_NUMBERS];
        numbers[..rest.len()].copy_from_slice(rest);
        for line in last {
            put(line, &numbers);
            numbers = [0.0; LINE_NUMBERS];
        }
    }
}

/// `out = x * w` on vector units: `(num_rows, in_features) -> (num_rows, out_features)`.
pub(super) fn matmul(
    (cpu, quantised): (&Cpu, &Mutex<QuantisedRows>),
    (x, num_rows): (Rows<'_>, usize),
    (w, in_features): (&Int8Panels, usize),
    (out, finish): (SharedRows<'_>, Finish<'_>),
) {
    let mut quantised = lock(quantised);
    quantised.fill(cpu, (x, num_rows), in_features);
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
