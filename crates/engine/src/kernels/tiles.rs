//! Products on a matrix unit: AMX, which multiplies tiles of 16 rows by 32 inputs of bfloat16 and adds up in `f32`.
//!
//! Weights of 16 bits or less are multiplied here where the machine has the unit. A number of the left-hand side is
//! cut into two bfloat16 (16 bits of it in all), and both are multiplied by the same tile of weights: so weights
//! in bfloat16 count exactly, activations to 2^-17, and nothing is rounded by what it stands beside. Every output
//! is the sum over tiles in the order of the inputs, whatever the batch, the chunks and the threads.
//!
//! Facts on the instructions are from Intel's manual (volume 2, TDPBF16PS; volume 1, chapter 18).

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid_count, __m512i, _mm512_castsi512_ps, _mm512_castsi512_si256, _mm512_cvtepu16_epi32,
    _mm512_cvtne2ps_pbh, _mm512_extracti64x4_epi64, _mm512_loadu_ps, _mm512_slli_epi32,
    _mm512_store_si512, _mm512_sub_ps, _xgetbv,
};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::blocks::{BlockPanels, InputPair};
use super::elementwise::activate;
use super::{Cpu, Finish, Kernel, LANES, Lanes, Rows, SharedRows, Vector, run_amx};
use crate::config::Activation;
use unit::{Ahead, Operands, SUMS, Shape, release};

mod unit;

/// Inputs of a tile.
pub(super) const TILE_INPUTS: usize = 32;

/// Outputs of a pair of panels, whose tiles lie side by side.
pub(super) const PAIR_OUTPUTS: usize = 2 * LANES;

/// Lines of two tiles: of a pair of panels, or of the two parts of 16 rows.
pub(super) const PAIR_LINES: usize = 2 * LANES;

/// Rows that are multiplied at a time: two tiles of them.
const PAIR_ROWS: usize = 2 * LANES;

/// Rows of one piece of work, a multiple of [`PAIR_ROWS`].
const PIECE_ROWS: usize = 256;

/// Most pairs of panels of one piece of work.
const PIECE_PAIRS: usize = 16;

/// Pieces of work for each thread, where there is enough of it: small pieces end at the same time.
const PIECES_PER_THREAD: usize = 8;

/// Tiles along the inputs after which other outputs take their turn: those of a piece's rows stay in the second
/// cache.
const BLOCK: usize = 28;

/// Tiles along the inputs that are decoded at a time for few rows.
const STRETCH: usize = 8;

/// A line of a tile: of the left-hand side 32 inputs of a row, of the right-hand side 2 inputs of 16 outputs.
pub(super) use super::lanes::Bf16Pairs as Line;

impl InputPair for Line {
    #[inline(always)]
    fn store<V: Vector>(&mut self, first: V, second: V) {
        V::store_bf16_pairs(first, second, self);
    }
}

/// Whether this machine has the unit, and the system lets this process use it.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let has_vectors = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("xsave");
        // The call that asks is Linux's, by its number.
        cfg!(target_os = "linux") && has_vectors && has_unit() && ask_permission()
    })
}

/// Whether processor and system know tiles. Only to be called where there is xsave.
#[expect(unsafe_code, reason = "reads a register of the processor")]
fn has_unit() -> bool {
    const TILES_AND_BF16: u32 = 1 << 24 | 1 << 22;
    const TILE_STATE: u64 = 0b11 << 17;
    let features = __cpuid_count(7, 0).edx;
    // SAFETY: the caller has seen that xsave is there.
    let enabled = unsafe { _xgetbv(0) };
    features & TILES_AND_BF16 == TILES_AND_BF16 && enabled & TILE_STATE == TILE_STATE
}

/// Asks Linux for the tiles' registers, which a process doesn't have by itself (arch_prctl).
#[expect(unsafe_code, reason = "a system call")]
fn ask_permission() -> bool {
    const ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: the call changes nothing but which registers this process may use.
    unsafe {
        asm!(
            "syscall", inlateout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") TILE_DATA,
            out("rcx") _, out("r11") _, options(nostack)
        );
    }
    result == 0
}

/// What products on the unit need: memory, made once.
#[derive(Debug)]
pub(super) struct Tiles {
    left: Mutex<Left>,
    threads: Vec<Mutex<Scratch>>,
}

impl Tiles {
    pub(super) fn new(num_threads: usize) -> Self {
        let threads = (0..num_threads).map(|_| Mutex::default()).collect();
        Self { left: Mutex::default(), threads }
    }
}

/// Runs a kernel of this module, which is compiled for machines with the unit alone.
#[expect(unsafe_code, reason = "calls into a function compiled for more than the baseline")]
fn run_beside_tiles(kernel: impl Kernel) {
    // SAFETY: products come here only where `is_available` has seen these instructions.
    unsafe { run_amx(kernel) }
}

/// A left-hand side: a tile of 16 rows and 32 inputs is 16 lines of the numbers' first parts, then 16 of
/// their second. Tiles of the same rows lie one behind the other.
#[derive(Debug, Default)]
pub(super) struct Left {
    lines: Vec<Line>,
    k_tiles: usize,
}

/// Memory of one thread.
#[derive(Debug, Default)]
struct Scratch {
    /// Sums: for 32 rows and a pair of panels four tiles, pair of rows by pair of rows.
    sums: Vec<Lanes>,
    /// Weights of a block of inputs and a pair of panels.
    decoded: Vec<Line>,
}

impl Left {
    /// Lines for some rows, to be written.
    fn lines_mut(&mut self, num_rows: usize, in_features: usize) -> &mut [Line] {
        self.k_tiles = in_features.div_ceil(TILE_INPUTS);
        let num_lines = num_rows.div_ceil(LANES) * self.k_tiles * PAIR_LINES;
        ensure(&mut self.lines, num_lines, Line([0; TILE_INPUTS]));
        &mut self.lines[..num_lines]
    }

    /// Cuts the numbers of `x` in two.
    fn fill(&mut self, cpu: &Cpu, (x, num_rows): (Rows<'_>, usize), in_features: usize) {
        let lines = self.lines_mut(num_rows, in_features);
        let tile_row_lines = in_features.div_ceil(TILE_INPUTS) * PAIR_LINES;
        cpu.threads.share_chunks(lines, tile_row_lines, |tile, (): &mut (), tiles| {
            let first = tile * LANES;
            let rows = first..num_rows.min(first + LANES);
            run_beside_tiles(Cut { x, rows, in_features, tiles });
        });
    }

    /// Room for some rows, to be written tile by tile from several threads.
    fn shared(&mut self, num_rows: usize, in_features: usize) -> SharedTiles<'_> {
        let lines = self.lines_mut(num_rows, in_features);
        let tiles = lines.as_chunks_mut::<PAIR_LINES>().0;
        let (data, len) = (tiles.as_mut_ptr(), tiles.len());
        SharedTiles { data, len, k_tiles: self.k_tiles, borrowed: PhantomData }
    }

    /// The tiles from some inputs on, of the 16 rows from `row` on.
    fn tiles(&self, row: usize, k_tile: usize) -> &[Line] {
        &self.lines[(row / LANES * self.k_tiles + k_tile) * PAIR_LINES..]
    }
}

/// A left-hand side that several threads write at once, each its own tiles.
#[derive(Clone, Copy)]
pub(super) struct SharedTiles<'a> {
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
    unsafe fn tile_mut(&self, row: usize, k_tile: usize) -> &'a mut [Line; PAIR_LINES] {
        let index = row / LANES * self.k_tiles + k_tile;
        assert!(k_tile < self.k_tiles && index < self.len, "outside of the tiles");
        // SAFETY: inside the borrowed memory (asserted); the caller answers for exclusiveness.
        unsafe { &mut *self.data.add(index) }
    }
}

/// Cuts up to 16 rows of numbers into a row of tiles.
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
            cut_row(self.x.slice(row, 0, self.in_features), index, self.tiles);
        }
    }
}

#[inline(always)]
fn cut_row(numbers: &[f32], row: usize, tiles: &mut [Line]) {
    let (chunks, rest) = numbers.as_chunks::<TILE_INPUTS>();
    let (full, last) = tiles.as_chunks_mut::<PAIR_LINES>().0.split_at_mut(chunks.len());
    for (numbers, tile) in chunks.iter().zip(full) {
        cut(numbers, row, tile);
    }
    if let Some(tile) = last.first_mut() {
        let mut numbers = [0.0; TILE_INPUTS];
        numbers[..rest.len()].copy_from_slice(rest);
        cut(&numbers, row, tile);
    }
}

#[inline(always)]
#[expect(unsafe_code, reason = "vector instructions")]
fn cut(numbers: &[f32; TILE_INPUTS], row: usize, tile: &mut [Line; PAIR_LINES]) {
    // SAFETY: there are tiles only where `is_available` has seen these instructions; 32 numbers are
    // read, and two lines written.
    unsafe { cut_with_vectors(numbers, &raw mut tile[row], &raw mut tile[LANES + row]) }
}

/// # Safety
/// The machine must have these instructions, and both lines be there to be written.
#[expect(unsafe_code, reason = "vector instructions")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn cut_with_vectors(numbers: &[f32; TILE_INPUTS], first: *mut Line, second: *mut Line) {
    // SAFETY: the caller answers for the lines; 32 numbers are there.
    unsafe {
        let low = _mm512_loadu_ps(numbers.as_ptr());
        let high = _mm512_loadu_ps(numbers.as_ptr().add(LANES));
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

/// A right-hand side, pairs of panels one behind the other.
#[derive(Clone, Copy, Debug)]
pub(super) enum Weights<'a> {
    /// Tiles as the unit takes them: for each 32 inputs one of each panel.
    Tiles(&'a [Line]),
    /// Blocks, to be decoded and rounded to bfloat16.
    Blocks(&'a BlockPanels),
}

/// What becomes of sums.
#[derive(Clone, Copy)]
pub(super) enum Output<'a> {
    /// They are finished, and written to rows.
    Rows(SharedRows<'a>, Finish<'a>),
    /// The first half of the outputs are gates, the second half what they let through; the product is the left-hand
    /// side of the next layer.
    Gated { tiles: SharedTiles<'a>, activation: Activation, bias: Option<&'a [f32]> },
}

/// `out = x * w`: `(num_rows, in_features) -> (num_rows, out_features)`.
pub(super) fn matmul(
    (cpu, tiles): (&Cpu, &Tiles),
    (x, num_rows): (Rows<'_>, usize),
    (weights, in_features): (Weights<'_>, usize),
    (out, finish): (SharedRows<'_>, Finish<'_>),
) {
    let mut left = lock(&tiles.left);
    left.fill(cpu, (x, num_rows), in_features);
    let shape = (in_features, out.width());
    multiply((cpu, tiles), (&left, num_rows), (weights, shape), Output::Rows(out, finish));
}

/// The same of a left-hand side that is in tiles already.
pub(super) fn matmul_tiles(
    (cpu, tiles): (&Cpu, &Tiles),
    (x, num_rows): (&Left, usize),
    (weights, in_features): (Weights<'_>, usize),
    (out, finish): (SharedRows<'_>, Finish<'_>),
) {
    let shape = (in_features, out.width());
    multiply((cpu, tiles), (x, num_rows), (weights, shape), Output::Rows(out, finish));
}

/// `out = activation(gate) * up`, in tiles, where `w` are the gates' weights and then as many of the ups', each
/// whole pairs of panels.
pub(super) fn matmul_gated(
    (cpu, tiles): (&Cpu, &Tiles),
    (x, num_rows): (Rows<'_>, usize),
    (weights, (in_features, out_features)): (Weights<'_>, (usize, usize)),
    (out, activation, bias): (&mut Left, Activation, Option<&[f32]>),
) {
    assert!(out_features.is_multiple_of(2 * PAIR_OUTPUTS), "gates and ups in pairs of panels");
    let mut left = lock(&tiles.left);
    left.fill(cpu, (x, num_rows), in_features);
    let out = out.shared(num_rows, out_features / 2);
    let shape = (in_features, out_features);
    let out = Output::Gated { tiles: out, activation, bias };
    multiply((cpu, tiles), (&left, num_rows), (weights, shape), out);
}

fn multiply(
    (cpu, tiles): (&Cpu, &Tiles),
    (left, num_rows): (&Left, usize),
    (weights, (in_features, out_features)): (Weights<'_>, (usize, usize)),
    out: Output<'_>,
) {
    // What is written together is computed together.
    let num_stripes = if matches!(out, Output::Gated { .. }) { 2 } else { 1 };
    let num_pairs = out_features.div_ceil(PAIR_OUTPUTS) / num_stripes;
    // Pieces with the same weights stand side by side: the weights are still in a cache.
    let num_row_pieces = num_rows.div_ceil(PIECE_ROWS);
    // A left-hand side of several blocks comes from far, again for each piece.
    let is_read_again = num_rows > PAIR_ROWS && left.k_tiles > BLOCK;
    let pieces_per_thread = if is_read_again { 1 } else { PIECES_PER_THREAD };
    let num_pair_pieces = pieces_per_thread * cpu.threads.num_threads();
    let piece_pairs = num_pairs.div_ceil(num_pair_pieces).clamp(1, PIECE_PAIRS);
    let num_pieces = num_row_pieces * num_pairs.div_ceil(piece_pairs);
    cpu.threads.share(num_pieces, num_rows * in_features * out_features, |piece| {
        let first_row = piece % num_row_pieces * PIECE_ROWS;
        let first_pair = piece / num_row_pieces * piece_pairs;
        let piece = Piece {
            left,
            rows: first_row..(first_row + PIECE_ROWS).min(num_rows),
            weights,
            pairs: first_pair..(first_pair + piece_pairs).min(num_pairs),
            stripes: (num_stripes, num_pairs),
            out,
        };
        let mut scratch = lock(&tiles.threads[cpu.threads.current()]);
        run_beside_tiles(Multiply { piece, scratch: &mut scratch });
    });
}

/// What a thread that panicked leaves is written before it is read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Some rows times some pairs of panels.
struct Piece<'a> {
    left: &'a Left,
    rows: Range<usize>,
    weights: Weights<'a>,
    pairs: Range<usize>,
    /// How many ranges of pairs there are, and how far each is from the one before.
    stripes: (usize, usize),
    out: Output<'a>,
}

/// A piece with the memory that it takes.
struct Multiply<'a> {
    piece: Piece<'a>,
    scratch: &'a mut Scratch,
}

impl Kernel for Multiply<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        self.piece.multiply::<V>(self.scratch);
    }
}

impl Piece<'_> {
    /// The weights of a block of inputs stay in a near cache while all rows pass, and what comes next is asked for
    /// meanwhile, so that memory never rests. The left-hand side of a block passes once for every pair of panels.
    #[inline(always)]
    fn multiply<V: Vector>(&self, scratch: &mut Scratch) {
        let Self { left, rows, weights, pairs, stripes: (num_stripes, distance), .. } = self;
        let Scratch { sums, decoded } = scratch;
        let k_tiles = left.k_tiles;
        let num_row_pairs = rows.len().div_ceil(PAIR_ROWS);
        let (block, stretch) = match weights {
            // Few rows don't come back to a weight: memory is read from one end to the other, and what is decoded
            // stays in the nearest cache until it is multiplied.
            Weights::Tiles(_) if num_row_pairs == 1 => (k_tiles, k_tiles),
            Weights::Blocks(_) if num_row_pairs == 1 => (k_tiles, STRETCH),
            _ => (BLOCK, BLOCK),
        };
        // Of one block nothing is kept but what is finished next.
        let is_one_block = k_tiles <= block;
        let stripe_sums = num_row_pairs * SUMS;
        let unit_sums = num_stripes * stripe_sums;
        ensure(sums, unit_sums * if is_one_block { 1 } else { pairs.len() }, Lanes::ZERO);
        let mut configured = None;
        for first in (0..k_tiles).step_by(block) {
            let end = k_tiles.min(first + block);
            for (index, pair) in pairs.clone().enumerate() {
                let unit = if is_one_block { 0 } else { index };
                let sums = &mut sums[unit * unit_sums..][..unit_sums];
                for (stripe, sums) in sums.chunks_exact_mut(stripe_sums).enumerate() {
                    let last = stripe + 1 == *num_stripes;
                    let next = if last { pair + 1 } else { pair + (stripe + 1) * distance };
                    let pairs = (pair + stripe * distance, next);
                    for start in (first..end).step_by(stretch) {
                        let inputs = start..end.min(start + stretch);
                        self.add_products::<V>(pairs, inputs, (decoded, &mut configured), sums);
                    }
                }
                if end == k_tiles {
                    self.finish(pair, sums);
                }
            }
        }
        release();
    }

    /// Adds what some inputs (tiles of them) give of a pair of panels, to the sums of all rows. The next pair's are
    /// needed afterwards.
    #[inline(always)]
    fn add_products<V: Vector>(
        &self,
        (pair, next): (usize, usize),
        inputs: Range<usize>,
        (decoded, configured): (&mut Vec<Line>, &mut Option<Shape>),
        sums: &mut [Lanes],
    ) {
        let Self { left, rows, weights, .. } = self;
        let (first, len) = (inputs.start, inputs.len());
        let (right, next) = match weights {
            Weights::Tiles(lines) => {
                let at = |pair: usize| (pair * left.k_tiles + first) * PAIR_LINES;
                let next = lines.as_ptr().wrapping_add(at(next));
                (&lines[at(pair)..][..len * PAIR_LINES], Some(next))
            }
            Weights::Blocks(w) => {
                ensure(decoded, len * PAIR_LINES, Line([0; TILE_INPUTS]));
                let out = &mut decoded[..len * PAIR_LINES];
                Decode { w, pair, first, out }.run::<V>();
                (&*out, None)
            }
        };
        let num_row_pairs = sums.len() / SUMS;
        for (row_pair, sums) in sums.chunks_exact_mut(SUMS).enumerate() {
            let row = rows.start + row_pair * PAIR_ROWS;
            let shape = Shape::new((rows.end - row).min(PAIR_ROWS));
            if *configured != Some(shape) {
                shape.configure();
                *configured = Some(shape);
            }
            let second = if shape.has_second() { left.tiles(row + LANES, first) } else { &[] };
            let operands = Operands {
                left: [left.tiles(row, first), second],
                right,
                ahead: next.map(|next| ahead(right, next, (row_pair, num_row_pairs))),
                is_first: first == 0,
            };
            shape.multiply(operands, len, sums);
        }
    }

    /// Writes what has been summed up of a pair of panels, and of the pairs that belong to it.
    #[inline(always)]
    fn finish(&self, pair: usize, sums: &[Lanes]) {
        match self.out {
            Output::Rows(out, finish) => self.write(pair, sums, (out, finish)),
            Output::Gated { tiles, activation, bias } => {
                self.gate(pair, sums, tiles, (activation, bias));
            }
        }
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint columns of the same rows")]
    fn write(&self, pair: usize, sums: &[Lanes], (out, finish): (SharedRows<'_>, Finish<'_>)) {
        for (index, row) in self.rows.clone().enumerate() {
            for (half, sums) in sums_of(sums, index).into_iter().enumerate() {
                let column = pair * PAIR_OUTPUTS + half * LANES;
                if column < out.width() {
                    // SAFETY: the rows and columns of this piece are the runner's alone.
                    unsafe { finish.write(out, row, column, sums) };
                }
            }
        }
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint tiles")]
    fn gate(
        &self,
        pair: usize,
        sums: &[Lanes],
        tiles: SharedTiles<'_>,
        (activation, bias): (Activation, Option<&[f32]>),
    ) {
        let (gates, ups) = sums.split_at(sums.len() / 2);
        for (index, row) in self.rows.clone().enumerate() {
            let (gate, up) = (sums_of(gates, index), sums_of(ups, index));
            let mut gated = [0.0; TILE_INPUTS];
            for half in 0..2 {
                let (mut gate, mut up) = (*gate[half], *up[half]);
                if let Some(bias) = bias {
                    let column = pair * PAIR_OUTPUTS + half * LANES;
                    add(&mut gate, &bias[column..]);
                    add(&mut up, &bias[bias.len() / 2 + column..]);
                }
                activate(activation, &mut gate.0);
                for lane in 0..LANES {
                    gated[half * LANES + lane] = gate.0[lane] * up.0[lane];
                }
            }
            // SAFETY: the rows of this piece are whole tiles, and its pairs of panels are its alone.
            let tile = unsafe { tiles.tile_mut(row, pair) };
            cut(&gated, row % LANES, tile);
        }
    }
}

/// The two vectors of a row, of sums of some rows and a pair of panels.
#[inline(always)]
fn sums_of(sums: &[Lanes], row: usize) -> [&Lanes; 2] {
    let sums = &sums[row / PAIR_ROWS * SUMS..][..SUMS];
    let row = row % PAIR_ROWS;
    [0, 1].map(|half| &sums[(row / LANES * 2 + half) * LANES + row % LANES])
}

/// What is asked for while some rows pass: of one pair of tiles of rows what comes right behind, of several each
/// its share of the next weights.
#[inline(always)]
fn ahead(right: &[Line], next: *const Line, (row_pair, num_row_pairs): (usize, usize)) -> Ahead {
    if num_row_pairs == 1 {
        let from = right.as_ptr().wrapping_add(PAIR_LINES);
        return Ahead { from, lines_per_tile: PAIR_LINES };
    }
    let lines_per_tile = PAIR_LINES.div_ceil(num_row_pairs).next_power_of_two().max(4);
    let share = right.len() / PAIR_LINES * lines_per_tile;
    Ahead { from: next.wrapping_add(row_pair * share), lines_per_tile }
}

#[inline(always)]
fn add(lanes: &mut Lanes, numbers: &[f32]) {
    for (lane, number) in lanes.0.iter_mut().zip(numbers) {
        *lane += number;
    }
}

fn ensure<T: Copy>(memory: &mut Vec<T>, len: usize, value: T) {
    if memory.len() < len {
        memory.resize(len, value);
    }
}

/// Decodes some inputs of a pair of panels into tiles.
struct Decode<'a> {
    w: &'a BlockPanels,
    pair: usize,
    /// The first tile along the inputs.
    first: usize,
    /// 32 lines for each tile along the inputs.
    out: &'a mut [Line],
}

impl Kernel for Decode<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { w, pair, first, out } = self;
        for half in 0..2 {
            let panel = 2 * pair + half;
            for (index, lines) in out.as_chunks_mut::<PAIR_LINES>().0.iter_mut().enumerate() {
                let lines = &mut lines[half * LANES..][..LANES];
                if panel < w.num_panels() {
                    let start = (first + index) * TILE_INPUTS;
                    w.decode::<V, _>(panel, start..start + TILE_INPUTS, lines);
                } else {
                    lines.fill(Line([0; TILE_INPUTS]));
                }
            }
        }
    }
}
