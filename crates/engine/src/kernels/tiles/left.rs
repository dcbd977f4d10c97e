//! Left-hand sides of products on tiles: rows of `f32`, cut into two parts of fewer bits.

use std::arch::x86_64::{
    __m512i, _mm512_castsi512_ps, _mm512_castsi512_si256, _mm512_cvtepu16_epi32,
    _mm512_cvtne2ps_pbh, _mm512_extracti64x4_epi64, _mm512_loadu_ps, _mm512_slli_epi32,
    _mm512_store_si512, _mm512_sub_ps,
};
use std::marker::PhantomData;
use std::ops::Range;

use super::super::int8::{self, Int8Columns, quantise, row_scale};
use super::super::lanes::Line;
use super::super::{Cpu, Kernel, LANES, PAIR_LINES, Rows, Vector};
use super::{Numbers, Weights, run_beside_tiles};

/// A left-hand side: a tile of 16 rows is 16 lines of the numbers' first parts, then 16 of their second. Tiles of
/// the same rows lie one behind the other; behind them, where numbers are whole, is a line with the rows' scales.
#[derive(Debug, Default)]
pub(in crate::kernels) struct Left {
    lines: Vec<Line>,
    k_tiles: usize,
    /// Lines of 16 rows.
    row_lines: usize,
}

impl Left {
    /// Tiles along the inputs.
    #[inline(always)]
    pub(super) fn k_tiles(&self) -> usize {
        self.k_tiles
    }

    /// Lines for some rows, to be written.
    fn lines_mut(&mut self, numbers: Numbers, num_rows: usize, in_features: usize) -> &mut [Line] {
        self.k_tiles = in_features.div_ceil(numbers.tile_inputs());
        self.row_lines = self.k_tiles * PAIR_LINES + usize::from(numbers == Numbers::Int8);
        let num_lines = num_rows.div_ceil(LANES) * self.row_lines;
        if self.lines.len() < num_lines {
            self.lines.resize(num_lines, Line::ZERO);
        }
        &mut self.lines[..num_lines]
    }

    /// Cuts the numbers of `x` in two.
    pub(super) fn fill(
        &mut self,
        cpu: &Cpu,
        (x, num_rows): (Rows<'_>, usize),
        (weights, in_features): (Weights<'_>, usize),
    ) {
        self.lines_mut(weights.numbers(), num_rows, in_features);
        let Self { lines, row_lines, .. } = self;
        let lines = &mut lines[..num_rows.div_ceil(LANES) * *row_lines];
        cpu.threads.share_chunks(lines, *row_lines, |tile, (): &mut (), tiles| {
            let first = tile * LANES;
            let rows = first..num_rows.min(first + LANES);
            match weights {
                Weights::Tiles(_) | Weights::Blocks(_) => {
                    run_beside_tiles(Cut { x, rows, in_features, tiles });
                }
                Weights::Int8(panels) => {
                    let columns = panels.columns();
                    run_beside_tiles(Quantise { x, rows, in_features, columns, tiles });
                }
            }
        });
    }

    /// Room for some rows of bfloat16, to be written tile by tile from several threads.
    pub(in crate::kernels) fn shared(
        &mut self,
        num_rows: usize,
        in_features: usize,
    ) -> SharedTiles<'_> {
        let lines = self.lines_mut(Numbers::Bf16, num_rows, in_features);
        let tiles = lines.as_chunks_mut::<PAIR_LINES>().0;
        let (data, len) = (tiles.as_mut_ptr(), tiles.len());
        SharedTiles { data, len, k_tiles: self.k_tiles, borrowed: PhantomData }
    }

    /// The tiles from some inputs on, of the 16 rows from `row` on.
    #[inline(always)]
    pub(super) fn tiles(&self, row: usize, k_tile: usize) -> &[Line] {
        &self.lines[row / LANES * self.row_lines + k_tile * PAIR_LINES..]
    }

    /// The scale of a row of whole numbers.
    #[inline(always)]
    pub(super) fn scale(&self, row: usize) -> f32 {
        self.lines[(row / LANES + 1) * self.row_lines - 1].number(row % LANES)
    }
}

/// A left-hand side that several threads write at once, each its own tiles.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct SharedTiles<'a> {
    data: *mut [Line; PAIR_LINES],
    len: usize,
    k_tiles: usize,
    borrowed: PhantomData<&'a mut [Line]>,
}

#[expect(unsafe_code, reason = "several threads write disjoint tiles")]
// SAFETY: the memory is borrowed exclusively for `'a`; who takes a tile answers for there being no other.
unsafe impl Send for SharedTiles<'_> {}

#[expect(unsafe_code, reason = "several threads write disjoint tiles")]
// SAFETY: as for `Send`.
unsafe impl Sync for SharedTiles<'_> {}

impl<'a> SharedTiles<'a> {
    /// The tile of 16 rows, of which `row` is one, and of 32 inputs.
    ///
    /// # Safety
    /// Nobody else may hold it meanwhile.
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint tiles")]
    pub(super) unsafe fn tile_mut(&self, row: usize, k_tile: usize) -> &'a mut [Line; PAIR_LINES] {
        let index = row / LANES * self.k_tiles + k_tile;
        assert!(k_tile < self.k_tiles && index < self.len, "outside of the tiles");
        // SAFETY: inside the borrowed memory (asserted); the caller answers for exclusiveness.
        unsafe { &mut *self.data.add(index) }
    }
}

/// Calls `put(tile, its index, numbers)` for every tile of a row, the last filled up with zeros.
#[inline(always)]
fn for_each_tile<const N: usize>(
    row: &[f32],
    tiles: &mut [Line],
    mut put: impl FnMut(&mut [Line; PAIR_LINES], usize, &[f32; N]),
) {
    let (chunks, rest) = row.as_chunks::<N>();
    let (full, last) = tiles.as_chunks_mut::<PAIR_LINES>().0.split_at_mut(chunks.len());
    for (index, (numbers, tile)) in chunks.iter().zip(full).enumerate() {
        put(tile, index, numbers);
    }
    if let Some(tile) = last.first_mut() {
        let mut numbers = [0.0; N];
        numbers[..rest.len()].copy_from_slice(rest);
        put(tile, chunks.len(), &numbers);
    }
}

/// Cuts up to 16 rows of numbers into bfloat16.
struct Cut<'a> {
    x: Rows<'a>,
    rows: Range<usize>,
    in_features: usize,
    tiles: &'a mut [Line],
}

impl Kernel for Cut<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        for (index, row) in self.rows.enumerate() {
            let row = self.x.slice(row, 0, self.in_features);
            for_each_tile::<{ 2 * LANES }>(row, self.tiles, |tile, _, numbers| {
                let (low, high) = numbers.split_at(LANES);
                cut([low, high].map(|half| half.as_array().expect("half of them")), index, tile);
            });
        }
    }
}

/// Cuts 32 numbers of a row: to the nearest bfloat16, and what is left of them to the nearest.
#[inline(always)]
#[expect(unsafe_code, reason = "vector instructions")]
pub(super) fn cut(halves: [&[f32; LANES]; 2], row: usize, tile: &mut [Line; PAIR_LINES]) {
    // SAFETY: there are tiles only where `is_available` has seen these instructions; two lines are written.
    unsafe { cut_with_vectors(halves, &raw mut tile[row], &raw mut tile[LANES + row]) }
}

/// # Safety
/// The machine must have these instructions, and both lines be there to be written.
#[expect(unsafe_code, reason = "vector instructions")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn cut_with_vectors([low, high]: [&[f32; LANES]; 2], first: *mut Line, second: *mut Line) {
    // SAFETY: the caller answers for the lines; 16 numbers are there twice.
    unsafe {
        let (low, high) = (_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr()));
        let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
        let widen =
            |half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
        let low_rest = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(rounded)));
        let high_rest = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64::<1>(rounded)));
        let rest: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high_rest, low_rest));
        _mm512_store_si512(first.cast(), rounded);
        _mm512_store_si512(second.cast(), rest);
    }
}

/// Makes whole numbers of up to 16 rows, and cuts them into bytes.
struct Quantise<'a> {
    x: Rows<'a>,
    rows: Range<usize>,
    in_features: usize,
    columns: &'a Int8Columns,
    tiles: &'a mut [Line],
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let (scales, tiles) = self.tiles.split_last_mut().expect("a line for the scales");
        for (index, row) in self.rows.enumerate() {
            let row = self.x.slice(row, 0, self.in_features);
            let (by, scale) = row_scale(row, self.columns);
            scales.set_number(index, scale);
            for_each_tile::<{ int8::TILE_INPUTS }>(row, tiles, |tile, k_tile, numbers| {
                let columns = self.columns.chunk(k_tile * int8::TILE_INPUTS);
                let (upper, lower) = tile.split_at_mut(LANES);
                let bytes = upper[index].0.iter_mut().zip(&mut lower[index].0);
                for ((upper, lower), number) in bytes.zip(quantise(numbers, columns, by)) {
                    // Both from -128 to 127: the lower one to the nearest multiple of 256.
                    *lower = number as u8;
                    *upper = ((number + 128) >> 8) as u8;
                }
            });
        }
    }
}
