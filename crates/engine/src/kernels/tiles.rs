//! Products on a matrix unit: AMX, which multiplies tiles of 16 rows by 32 inputs of bfloat16 and adds up in `f32`, or
//! by 64 inputs of 8 bits and adds up in 32.
//!
//! Weights of 16 bits or less are multiplied here where the machine has the unit. A number of the left-hand side is
//! cut into two bfloat16 (16 bits of it in all), and both are multiplied by the same tile of weights: so weights
//! in bfloat16 count exactly, activations to 2^-17, and nothing is rounded by what it stands beside. Every output
//! is the sum over tiles in the order of the inputs, whatever the batch, the chunks and the threads. Whole numbers are
//! cut into two bytes, and their sums are exact (`int8`).
//!
//! Facts on the instructions are from Intel's manual (volume 2, TDPBF16PS and TDPBSSD; volume 1, chapter 18).

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::ops::Range;
use std::sync::{Mutex, OnceLock};

use super::blocks::{BlockPanels, InputPair};
use super::int8::Int8Panels;
use super::lanes::Line;
use super::{
    Cpu, Finish, Gates, Kernel, LANES, Lanes, PAIR_LINES, PAIR_OUTPUTS, Rows, SharedRows, Vector,
    lock, run_amx,
};
pub(super) use left::Left;
use left::{SharedTiles, cut};
pub(super) use unit::Numbers;
use unit::{Ahead, Operands, SUMS, Shape, release};

mod left;
mod unit;

/// Rows of one piece of work, a multiple of [`Numbers::unit_rows`].
const PIECE_ROWS: usize = 256;

/// Most pairs of panels of one piece of work.
const PIECE_PAIRS: usize = 16;

/// Pieces of work for each thread, where there is enough of it: small pieces end at the same time.
const PIECES_PER_THREAD: usize = 8;

/// Inputs after which other outputs take their turn: those of a piece's rows stay in the second cache.
const BLOCK_INPUTS: usize = 896;

/// Tiles along the inputs that are decoded at a time for few rows.
const STRETCH: usize = 8;

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

/// Whether processor and system know tiles, of bfloat16 and of 8 bits. Only to be called where there is xsave.
#[expect(unsafe_code, reason = "reads a register of the processor")]
fn has_unit() -> bool {
    const TILES_WITH_BOTH: u32 = 1 << 24 | 1 << 25 | 1 << 22;
    const TILE_STATE: u64 = 0b11 << 17;
    let features = __cpuid_count(7, 0).edx;
    // SAFETY: the caller has seen that xsave is there.
    let enabled = unsafe { _xgetbv(0) };
    features & TILES_WITH_BOTH == TILES_WITH_BOTH && enabled & TILE_STATE == TILE_STATE
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

/// Memory of one thread.
#[derive(Debug, Default)]
struct Scratch {
    /// Sums: for the rows that are multiplied at a time and a pair of panels four tiles.
    sums: Vec<Lanes>,
    /// Weights of a block of inputs and a pair of panels.
    decoded: Vec<Line>,
}

/// A right-hand side, pairs of panels one behind the other.
#[derive(Clone, Copy, Debug)]
pub(super) enum Weights<'a> {
    /// Tiles as the unit takes them: for each 32 inputs one of each panel.
    Tiles(&'a [Line]),
    /// Blocks, to be decoded and rounded to bfloat16.
    Blocks(&'a BlockPanels),
    /// Tiles of whole numbers, for each 64 inputs one of each panel.
    Int8(&'a Int8Panels),
}

impl Weights<'_> {
    /// What is multiplied.
    #[inline(always)]
    pub(super) fn numbers(&self) -> Numbers {
        if matches!(self, Self::Int8(_)) { Numbers::Int8 } else { Numbers::Bf16 }
    }
}

/// What becomes of sums.
#[derive(Clone, Copy)]
pub(super) enum Output<'a> {
    /// They are finished, and written to rows.
    Rows(SharedRows<'a>, Finish<'a>),
    /// The first half of the outputs are gates, the second half what they let through.
    Gated(Gated<'a>, Gates<'a>),
}

/// Where the products of gates and of what they let through go.
#[derive(Clone, Copy)]
pub(super) enum Gated<'a> {
    /// To rows.
    Rows(SharedRows<'a>),
    /// To the left-hand side of the next layer.
    Tiles(SharedTiles<'a>),
}

/// `out = x * w`: `(num_rows, in_features) -> (num_rows, out_features)`.
pub(super) fn matmul(
    (cpu, tiles): (&Cpu, &Tiles),
    (x, num_rows): (Rows<'_>, usize),
    (weights, in_features): (Weights<'_>, usize),
    (out, finish): (SharedRows<'_>, Finish<'_>),
) {
    let mut left = lock(&tiles.left);
    left.fill(cpu, (x, num_rows), (weights, in_features));
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

/// `out = activation(gate) * up`, where `w` are the gates' weights and then as many of the ups', each whole pairs of
/// panels.
pub(super) fn matmul_gated(
    (cpu, tiles): (&Cpu, &Tiles),
    (x, num_rows): (Rows<'_>, usize),
    (weights, (in_features, out_features)): (Weights<'_>, (usize, usize)),
    (to, gates): (Gated<'_>, Gates<'_>),
) {
    assert!(out_features.is_multiple_of(2 * PAIR_OUTPUTS), "gates and ups in pairs of panels");
    let mut left = lock(&tiles.left);
    left.fill(cpu, (x, num_rows), (weights, in_features));
    let shape = (in_features, out_features);
    let out = Output::Gated(to, gates);
    multiply((cpu, tiles), (&left, num_rows), (weights, shape), out);
}

fn multiply(
    (cpu, tiles): (&Cpu, &Tiles),
    (left, num_rows): (&Left, usize),
    (weights, (in_features, out_features)): (Weights<'_>, (usize, usize)),
    out: Output<'_>,
) {
    // What is written together is computed together.
    let num_stripes = if matches!(out, Output::Gated(..)) { 2 } else { 1 };
    let num_pairs = out_features.div_ceil(PAIR_OUTPUTS) / num_stripes;
    // Pieces with the same weights stand side by side: the weights are still in a cache.
    let num_row_pieces = num_rows.div_ceil(PIECE_ROWS);
    // A left-hand side of several blocks comes from far, again for each piece.
    let is_read_again = num_rows > weights.numbers().unit_rows() && in_features > BLOCK_INPUTS;
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

impl<'a> Piece<'a> {
    /// The weights of a block of inputs stay in a near cache while all rows pass, and what comes next is asked for
    /// meanwhile, so that memory never rests. The left-hand side of a block passes once for every pair of panels.
    #[inline(always)]
    fn multiply<V: Vector>(&self, scratch: &mut Scratch) {
        let Self { left, rows, weights, pairs, stripes: (num_stripes, _), .. } = self;
        let Scratch { sums, decoded } = scratch;
        let numbers = weights.numbers();
        let k_tiles = left.k_tiles();
        let num_units = rows.len().div_ceil(numbers.unit_rows());
        let (block, stretch) = match weights {
            // Few rows don't come back to a weight: memory is read from one end to the other, and what is decoded
            // stays in the nearest cache until it is multiplied.
            Weights::Blocks(_) if num_units == 1 => (k_tiles, STRETCH),
            _ if num_units == 1 => (k_tiles, k_tiles),
            _ => (BLOCK_INPUTS / numbers.tile_inputs(), BLOCK_INPUTS / numbers.tile_inputs()),
        };
        // Of one block nothing is kept but what is finished next.
        let is_one_block = k_tiles <= block;
        let pair_sums = num_units * num_stripes * SUMS;
        ensure(sums, pair_sums * if is_one_block { 1 } else { pairs.len() }, Lanes::ZERO);
        let mut configured = None;
        for first in (0..k_tiles).step_by(block) {
            let end = k_tiles.min(first + block);
            for (index, pair) in pairs.clone().enumerate() {
                let index = if is_one_block { 0 } else { index };
                let sums = &mut sums[index * pair_sums..][..pair_sums];
                for stripe in 0..*num_stripes {
                    for start in (first..end).step_by(stretch) {
                        let inputs = start..end.min(start + stretch);
                        let scratch = (&mut *decoded, &mut configured);
                        self.add_products::<V>((pair, stripe), inputs, scratch, sums);
                    }
                }
            }
        }
        release();
    }

    /// Adds what some inputs (tiles of them) give of a pair of panels, to the sums of all rows, and writes what is
    /// summed up then: of some rows while the unit is busy with the next.
    #[inline(always)]
    fn add_products<V: Vector>(
        &self,
        (pair, stripe): (usize, usize),
        inputs: Range<usize>,
        (decoded, configured): (&mut Vec<Line>, &mut Option<Shape>),
        sums: &mut [Lanes],
    ) {
        let Self { left, rows, weights, stripes: (num_stripes, distance), .. } = self;
        let numbers = weights.numbers();
        let (first, len) = (inputs.start, inputs.len());
        let is_last_stripe = stripe + 1 == *num_stripes;
        let tiles = |lines: &'a [Line], pair_lines: usize| {
            let at = |pair: usize| pair * pair_lines + first * PAIR_LINES;
            // What is needed afterwards.
            let next = if is_last_stripe { pair + 1 } else { pair + (stripe + 1) * distance };
            let next = lines.as_ptr().wrapping_add(at(next));
            (&lines[at(pair + stripe * distance)..][..len * PAIR_LINES], Some(next))
        };
        let (right, next) = match weights {
            Weights::Tiles(lines) => tiles(lines, left.k_tiles() * PAIR_LINES),
            Weights::Int8(panels) => tiles(panels.lines(), panels.pair_lines()),
            Weights::Blocks(w) => {
                ensure(decoded, len * PAIR_LINES, Line::ZERO);
                let out = &mut decoded[..len * PAIR_LINES];
                Decode { w, pair: pair + stripe * distance, first, out }.run::<V>();
                (&*out, None)
            }
        };
        let is_last = is_last_stripe && inputs.end == left.k_tiles();
        let unit_sums = num_stripes * SUMS;
        let num_units = sums.len() / unit_sums;
        for unit in 0..num_units {
            let row = rows.start + unit * numbers.unit_rows();
            let shape = Shape::new(numbers, (rows.end - row).min(numbers.unit_rows()));
            if *configured != Some(shape) {
                shape.configure();
                *configured = Some(shape);
            }
            let second = if shape.has_second() { left.tiles(row + LANES, first) } else { &[] };
            let operands = Operands {
                left: [left.tiles(row, first), second],
                right,
                ahead: next.map(|next| ahead(right, next, (unit, num_units))),
                is_first: first == 0,
            };
            shape.multiply(operands, len, &mut sums[unit * unit_sums + stripe * SUMS..][..SUMS]);
            if is_last && unit > 0 {
                self.finish::<V>(pair, unit - 1, &sums[(unit - 1) * unit_sums..][..unit_sums]);
            }
        }
        if is_last {
            let unit = num_units - 1;
            self.finish::<V>(pair, unit, &sums[unit * unit_sums..][..unit_sums]);
        }
    }

    /// Writes what has been summed up of some rows and a pair of panels, and of the pair that belongs to it.
    #[inline(always)]
    #[expect(
        unsafe_code,
        reason = "several threads write disjoint columns of rows, and disjoint tiles"
    )]
    fn finish<V: Vector>(&self, pair: usize, unit: usize, sums: &[Lanes]) {
        let unit_rows = self.weights.numbers().unit_rows();
        let first_row = self.rows.start + unit * unit_rows;
        let rows = first_row..self.rows.end.min(first_row + unit_rows);
        let first_column = pair * PAIR_OUTPUTS;
        match self.out {
            Output::Rows(out, finish) => {
                for half in 0..2 {
                    let column = first_column + half * LANES;
                    if column >= out.width() {
                        continue;
                    }
                    let scale = self.scale(2 * pair + half);
                    for (index, row) in rows.clone().enumerate() {
                        let mut lanes = Lanes::ZERO;
                        self.sum::<V>(sums, (row, index), half, scale).store(&mut lanes);
                        // SAFETY: the rows and columns of this piece are the runner's alone.
                        unsafe { finish.write(out, row, column, &lanes) };
                    }
                }
            }
            Output::Gated(to, through) => {
                let (gates, ups) = sums.split_at(SUMS);
                let scales = [0, self.stripes.1].map(|distance| {
                    [0, 1].map(|half| self.scale::<V>(2 * (pair + distance) + half))
                });
                for (index, row) in rows.enumerate() {
                    let mut gated = [Lanes::ZERO; 2];
                    for half in 0..2 {
                        let (mut gate, mut up) = (Lanes::ZERO, Lanes::ZERO);
                        let at = (row, index);
                        self.sum::<V>(gates, at, half, scales[0][half]).store(&mut gate);
                        self.sum::<V>(ups, at, half, scales[1][half]).store(&mut up);
                        gated[half] = through.apply::<V>(first_column + half * LANES, gate, up);
                    }
                    match to {
                        Gated::Rows(out) => {
                            // SAFETY: the rows and columns of this piece are the runner's alone.
                            let out = unsafe { out.slice_mut(row, first_column, PAIR_OUTPUTS) };
                            out[..LANES].copy_from_slice(&gated[0].0);
                            out[LANES..].copy_from_slice(&gated[1].0);
                        }
                        // SAFETY: the rows of this piece are whole tiles, its pairs of panels are its alone.
                        Gated::Tiles(tiles) => unsafe {
                            let [low, high] = &gated;
                            cut([&low.0, &high.0], row % LANES, tiles.tile_mut(row, pair));
                        },
                    }
                }
            }
        }
    }

    /// The scales of a panel, where they are not in the weights.
    #[inline(always)]
    fn scale<V: Vector>(&self, panel: usize) -> V {
        match self.weights {
            Weights::Int8(panels) => V::load(&panels.scales(panel)),
            Weights::Tiles(_) | Weights::Blocks(_) => V::zero(),
        }
    }

    /// What has been summed up of a row, the `index`th of those that were multiplied together, and of half a pair of
    /// panels, whose scales these are.
    #[inline(always)]
    fn sum<V: Vector>(
        &self,
        sums: &[Lanes],
        (row, index): (usize, usize),
        half: usize,
        scale: V,
    ) -> V {
        let at = |tile: usize| &sums[tile * LANES + index % LANES];
        match self.weights.numbers() {
            Numbers::Bf16 => V::load(at(index / LANES * 2 + half)),
            // Tiles of both panels' sums of the upper bytes, then of the lower ones.
            Numbers::Int8 => {
                V::join(at(half), at(2 + half)).mul(V::splat(self.left.scale(row))).mul(scale)
            }
        }
    }
}

/// What is asked for while some rows pass: of few rows what comes right behind, of more each its share of the next
/// weights.
#[inline(always)]
fn ahead(right: &[Line], next: *const Line, (unit, num_units): (usize, usize)) -> Ahead {
    if num_units == 1 {
        let from = right.as_ptr().wrapping_add(PAIR_LINES);
        return Ahead { from, lines_per_tile: PAIR_LINES };
    }
    let lines_per_tile = PAIR_LINES.div_ceil(num_units).next_power_of_two().max(4);
    let share = right.len() / PAIR_LINES * lines_per_tile;
    Ahead { from: next.wrapping_add(unit * share), lines_per_tile }
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
                    let start = (first + index) * Numbers::Bf16.tile_inputs();
                    w.decode::<V, _>(panel, start..start + Numbers::Bf16.tile_inputs(), lines);
                } else {
                    lines.fill(Line::ZERO);
                }
            }
        }
    }
}
