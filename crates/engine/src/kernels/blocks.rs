//! Weights in block formats: panels of 16 outputs whose bits are interleaved, so that one load gets
//! those of all 16; and their product, which decodes a stretch of a panel at a time.
//!
//! A block of a panel is [`PanelLayout::lines`] lines of 16 bytes, a byte for each output: the block's
//! scales (half precision, two lines), its minima where the format has them, then the groups' own, then
//! the numbers, 8 inputs at a time. Their bits are cut into planes of 4, 2 and 1: a line of a 4-bit plane
//! holds 2 inputs, of a 2-bit plane 4, of a 1-bit plane 8. That is what the file takes too, but for the
//! groups' scales, which get a whole byte.

use std::ops::Range;

use super::lanes::{F16Lanes, I8Lanes, Stored, U8Lanes};
use super::matmul::{PIECE_PANELS, PIECE_ROWS};
use super::memory::Zeroed;
use super::product::{Tiled, for_each_tile};
use super::{Finish, Kernel, LANES, Lanes, Rows, SharedRows, Vector, accumulate};
use crate::quant::{Block, BlockFormat};

/// Inputs whose bits lie together.
const UNIT: usize = 8;

/// Inputs that are decoded at a time: those of all panels of a piece stay in the nearest cache.
const STRETCH: usize = 64;

/// Where things are in a block of a panel, in lines.
#[derive(Clone, Copy, Debug)]
struct PanelLayout {
    min: usize,
    group_scales: usize,
    group_mins: usize,
    quants: usize,
    lines: usize,
}

impl PanelLayout {
    #[inline(always)]
    fn new(format: BlockFormat) -> Self {
        let num_groups =
            if format.has_groups() { format.block_len() / format.group_len() } else { 0 };
        let mins = usize::from(format.has_min());
        let min = 2;
        let group_scales = min + 2 * mins;
        let group_mins = group_scales + num_groups;
        let quants = group_mins + num_groups * mins;
        let lines = quants + format.block_len() / UNIT * format.bits();
        Self { min, group_scales, group_mins, quants, lines }
    }
}

/// Panels of 16 outputs in a block format.
#[derive(Debug)]
pub(super) struct BlockPanels {
    format: BlockFormat,
    lines: Zeroed<U8Lanes>,
    lines_per_panel: usize,
    num_panels: usize,
}

impl BlockPanels {
    /// Panels of zeros.
    pub(super) fn new(
        format: BlockFormat,
        num_panels: usize,
        in_features: usize,
    ) -> std::io::Result<Self> {
        let lines_per_panel = lines_per_panel(format, in_features);
        let lines = Zeroed::new_streamed(num_panels * lines_per_panel)?;
        Ok(Self { format, lines, lines_per_panel, num_panels })
    }

    /// How many there are.
    pub(super) fn num_panels(&self) -> usize {
        self.num_panels
    }

    /// All panels, each [`lines_per_panel`] lines, to be filled by [`pack_row`].
    pub(super) fn lines_mut(&mut self) -> &mut [U8Lanes] {
        &mut self.lines
    }

    /// Memory that it takes.
    pub(super) fn num_bytes(&self) -> usize {
        size_of_val(&*self.lines)
    }

    /// Decodes one lane of a panel.
    #[inline(always)]
    pub(super) fn row<V: Vector>(&self, panel: usize, lane: usize, out: &mut [f32]) {
        let mut decoded = [Lanes::ZERO; STRETCH];
        for (index, out) in out.chunks_mut(STRETCH).enumerate() {
            let start = index * STRETCH;
            self.decode::<V, _>(panel, start..start + out.len(), decoded.as_chunks_mut::<2>().0);
            for (out, decoded) in out.iter_mut().zip(&decoded) {
                *out = decoded.0[lane];
            }
        }
    }

    /// Decodes inputs `range` (whole groups) of a panel.
    #[inline(always)]
    pub(super) fn decode<V: Vector, P: InputPair>(
        &self,
        panel: usize,
        range: Range<usize>,
        out: &mut [P],
    ) {
        let lines = &self.lines[panel * self.lines_per_panel..][..self.lines_per_panel];
        match self.format.bits() {
            2 => decode_panel::<V, P, 2>(self.format, lines, range, out),
            3 => decode_panel::<V, P, 3>(self.format, lines, range, out),
            4 => decode_panel::<V, P, 4>(self.format, lines, range, out),
            5 => decode_panel::<V, P, 5>(self.format, lines, range, out),
            6 => decode_panel::<V, P, 6>(self.format, lines, range, out),
            _ => decode_panel::<V, P, 8>(self.format, lines, range, out),
        }
    }
}

/// Lines of a panel.
pub(super) fn lines_per_panel(format: BlockFormat, in_features: usize) -> usize {
    in_features / format.block_len() * PanelLayout::new(format).lines
}

/// Puts one output's row, as GGUF has it, into its lane of a panel of zeros.
pub(super) fn pack_row(format: BlockFormat, row: &[u8], lane: usize, panel: &mut [U8Lanes]) {
    let layout = PanelLayout::new(format);
    let blocks = row.chunks_exact(format.block_bytes());
    for (bytes, lines) in blocks.zip(panel.chunks_exact_mut(layout.lines)) {
        let block = Block::take_apart(format, bytes);
        put_half(&mut lines[..2], lane, block.scale);
        if format.has_min() {
            put_half(&mut lines[layout.min..][..2], lane, block.min);
        }
        let group_scales = &mut lines[layout.group_scales..layout.group_mins];
        for (line, scale) in group_scales.iter_mut().zip(block.scales) {
            line.0[lane] = scale.cast_unsigned();
        }
        for (line, min) in lines[layout.group_mins..layout.quants].iter_mut().zip(block.mins) {
            line.0[lane] = min;
        }
        let bits = format.bits();
        let units = lines[layout.quants..].chunks_exact_mut(bits);
        for (unit, quants) in units.zip(block.quants.chunks_exact(UNIT)) {
            for (k, quant) in quants.iter().enumerate() {
                let mut line = 0;
                let mut shift = 0;
                for plane in planes(bits) {
                    let per_line = 8 / plane;
                    let part = (u16::from(*quant) >> shift) as u8 & (255 >> (8 - plane));
                    unit[line + k / per_line].0[lane] |= part << (k % per_line * plane);
                    line += plane;
                    shift += plane;
                }
            }
        }
    }
}

/// The widths that numbers of so many bits are cut into, from the lowest bits on.
fn planes(bits: usize) -> impl Iterator<Item = usize> {
    [8, 4, 2, 1].into_iter().filter(move |plane| bits & plane != 0)
}

fn put_half(lines: &mut [U8Lanes], lane: usize, number: half::f16) {
    let half = lane / (LANES / 2);
    let at = lane % (LANES / 2) * 2;
    lines[half].0[at..at + 2].copy_from_slice(&number.to_le_bytes());
}

#[inline(always)]
fn halves(lines: &[U8Lanes]) -> F16Lanes {
    F16Lanes(std::array::from_fn(|lane| {
        let bytes = &lines[lane / 8].0;
        u16::from_le_bytes([bytes[lane % 8 * 2], bytes[lane % 8 * 2 + 1]])
    }))
}

/// Two inputs of 16 outputs, decoded.
pub(super) trait InputPair: Copy {
    /// Writes them.
    fn store<V: Vector>(&mut self, first: V, second: V);
}

impl InputPair for [Lanes; 2] {
    #[inline(always)]
    fn store<V: Vector>(&mut self, first: V, second: V) {
        first.store(&mut self[0]);
        second.store(&mut self[1]);
    }
}

#[inline(always)]
fn decode_panel<V: Vector, P: InputPair, const BITS: usize>(
    format: BlockFormat,
    lines: &[U8Lanes],
    range: Range<usize>,
    out: &mut [P],
) {
    let layout = PanelLayout::new(format);
    let (block_len, group_len) = (format.block_len(), format.group_len());
    let groups = range.start / group_len..range.end / group_len;
    for (index, out) in groups.zip(out.chunks_exact_mut(group_len / 2)) {
        let (block, k) = (index * group_len / block_len, index * group_len % block_len);
        let lines = &lines[block * layout.lines..][..layout.lines];
        let group = k / group_len;
        let mut scale: V = halves(lines).load();
        if format.has_groups() {
            let steps = I8Lanes(lines[layout.group_scales + group].0.map(u8::cast_signed));
            scale = scale.mul(steps.load());
        }
        // One or the other: both products are exact.
        let mut offset = V::zero().fma(f32::from(format.zero()), scale);
        if format.has_min() {
            offset = halves(&lines[layout.min..]).load();
            if format.has_groups() {
                offset = offset.mul(lines[layout.group_mins + group].load());
            }
        }
        let units = lines[layout.quants + k / UNIT * BITS..].chunks_exact(BITS);
        for (unit, out) in units.zip(out.as_chunks_mut::<{ UNIT / 2 }>().0) {
            let unit: &[U8Lanes; BITS] = unit.as_array().expect("chunks of this length");
            for (pair, out) in out.iter_mut().enumerate() {
                let first = quants(unit, 2 * pair).load::<V>().mul(scale).sub(offset);
                let second = quants(unit, 2 * pair + 1).load::<V>().mul(scale).sub(offset);
                out.store(first, second);
            }
        }
    }
}

/// The numbers of 16 outputs for one of the 8 inputs of a unit.
#[inline(always)]
fn quants<const BITS: usize>(unit: &[U8Lanes; BITS], k: usize) -> U8Lanes {
    let part = |line: usize, plane: usize| {
        let per_line = 8 / plane;
        let line = unit[line + k / per_line].0;
        line.map(|byte| byte >> (k % per_line * plane) & (255 >> (8 - plane)))
    };
    let or = |low: [u8; LANES], high: [u8; LANES], shift: usize| {
        std::array::from_fn(|lane| low[lane] | high[lane] << shift)
    };
    U8Lanes(match BITS {
        2 => part(0, 2),
        3 => or(part(0, 2), part(2, 1), 2),
        4 => part(0, 4),
        5 => or(part(0, 4), part(4, 1), 4),
        6 => or(part(0, 4), part(4, 2), 4),
        _ => part(0, 8),
    })
}

/// `out[rows, 16 * panels] = x[rows, k] * w[panels]` for panels in a block format.
///
/// Whoever runs it must be the only one to touch those rows and columns of `out`.
pub(super) struct BlockProduct<'a> {
    /// The left-hand side.
    pub(super) x: Rows<'a>,
    /// At most [`PIECE_ROWS`] rows of it, and of the output.
    pub(super) rows: Range<usize>,
    /// The right-hand side.
    pub(super) w: &'a BlockPanels,
    /// Inputs.
    pub(super) in_features: usize,
    /// At most [`PIECE_PANELS`] panels of it.
    pub(super) panels: Range<usize>,
    /// The output.
    pub(super) out: SharedRows<'a>,
    /// How results are written.
    pub(super) finish: Finish<'a>,
}

impl Kernel for BlockProduct<'_> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint columns of the same rows")]
    fn run<V: Vector>(self) {
        let Self { x, rows, w, in_features, panels, out, finish } = self;
        let mut decoded = [[Lanes::ZERO; STRETCH]; PIECE_PANELS];
        let mut sums = [[Lanes::ZERO; PIECE_PANELS]; PIECE_ROWS];
        for start in (0..in_features).step_by(STRETCH) {
            let len = STRETCH.min(in_features - start);
            for (panel, decoded) in panels.clone().zip(&mut decoded) {
                let decoded = decoded[..len].as_chunks_mut::<2>().0;
                w.decode::<V, _>(panel, start..start + len, decoded);
            }
            let mut stretch = Stretch {
                x,
                first_row: rows.start,
                start,
                len,
                decoded: &decoded,
                sums: &mut sums,
            };
            for_each_tile::<V>(&mut stretch, 0..rows.len(), 0..panels.len());
        }
        for (row, sums) in rows.zip(&sums) {
            for (panel, sums) in panels.clone().zip(sums) {
                // SAFETY: the rows and columns of this product are the runner's alone.
                unsafe { finish.write(out, row, panel * LANES, sums) };
            }
        }
    }
}

/// What some inputs add to the sums.
struct Stretch<'a> {
    x: Rows<'a>,
    first_row: usize,
    start: usize,
    len: usize,
    decoded: &'a [[Lanes; STRETCH]; PIECE_PANELS],
    sums: &'a mut [[Lanes; PIECE_PANELS]; PIECE_ROWS],
}

impl Tiled for Stretch<'_> {
    #[inline(always)]
    fn tile<V: Vector, const R: usize, const P: usize>(&mut self, row: usize, panel: usize) {
        let mut sums: [[V; P]; R] = std::array::from_fn(|r| {
            std::array::from_fn(|p| V::load(&self.sums[row + r][panel + p]))
        });
        let x: [&[f32]; R] =
            std::array::from_fn(|r| self.x.slice(self.first_row + row + r, self.start, self.len));
        let w: [&[Lanes]; P] = std::array::from_fn(|p| &self.decoded[panel + p][..self.len]);
        accumulate(&mut sums, x, w, self.len);
        for (r, sums) in sums.into_iter().enumerate() {
            for (p, sum) in sums.into_iter().enumerate() {
                sum.store(&mut self.sums[row + r][panel + p]);
            }
        }
    }
}
