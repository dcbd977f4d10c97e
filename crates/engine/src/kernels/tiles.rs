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
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::blocks::{BlockPanels, InputPair};
use super::{Cpu, Finish, Kernel, LANES, Lanes, Rows, SharedRows, Vector, run_amx};

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

/// Pieces of work for each thread, where there is enough of it. With few rows weights come from far, and small
/// pieces end at the same time; with many rows the left-hand side is read again for each piece.
const PIECES_PER_THREAD: usize = 8;
const LARGE_PIECES_PER_THREAD: usize = 2;

/// Tiles along the inputs after which other rows take their turn: two rows of tiles stay in the nearest cache.
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
    /// Sums: for 32 rows and a pair of panels four tiles, row by row.
    sums: Vec<Lanes>,
    /// Weights of a stretch.
    decoded: Vec<Line>,
}

impl Left {
    /// Cuts the numbers of `x` in two.
    fn fill(&mut self, cpu: &Cpu, (x, num_rows): (Rows<'_>, usize), in_features: usize) {
        self.k_tiles = in_features.div_ceil(TILE_INPUTS);
        let tile_row_lines = self.k_tiles * PAIR_LINES;
        let num_lines = num_rows.div_ceil(LANES) * tile_row_lines;
        if self.lines.len() < num_lines {
            self.lines.resize(num_lines, Line([0; TILE_INPUTS]));
        }
        let lines = &mut self.lines[..num_lines];
        cpu.threads.share_chunks(lines, tile_row_lines, |tile, (): &mut (), tiles| {
            let first = tile * LANES;
            let rows = first..num_rows.min(first + LANES);
            run_beside_tiles(Cut { x, rows, in_features, tiles });
        });
    }

    /// The tiles from some inputs on, of the 16 rows from `row` on.
    fn tiles(&self, row: usize, k_tile: usize) -> &[Line] {
        &self.lines[(row / LANES * self.k_tiles + k_tile) * PAIR_LINES..]
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

/// `out = x * w`, finished: `(num_rows, in_features) -> (num_rows, num_outputs)`.
pub(super) fn matmul(
    (cpu, tiles): (&Cpu, &Tiles),
    (x, num_rows): (Rows<'_>, usize),
    (weights, in_features): (Weights<'_>, usize),
    (out, finish): (SharedRows<'_>, Finish<'_>),
) {
    let mut left = lock(&tiles.left);
    left.fill(cpu, (x, num_rows), in_features);
    let left = &*left;
    let num_pairs = out.width().div_ceil(PAIR_OUTPUTS);
    // Pieces with the same weights stand side by side: the weights are still in a cache.
    let num_row_pieces = num_rows.div_ceil(PIECE_ROWS);
    let pieces_per_thread =
        if num_rows > PAIR_ROWS { LARGE_PIECES_PER_THREAD } else { PIECES_PER_THREAD };
    let num_pair_pieces = pieces_per_thread * cpu.threads.num_threads();
    let piece_pairs = num_pairs.div_ceil(num_pair_pieces).clamp(1, PIECE_PAIRS);
    let num_pieces = num_row_pieces * num_pairs.div_ceil(piece_pairs);
    cpu.threads.share(num_pieces, num_rows * in_features * out.width(), |piece| {
        let first_row = piece % num_row_pieces * PIECE_ROWS;
        let first_pair = piece / num_row_pieces * piece_pairs;
        let piece = Piece {
            left,
            rows: first_row..(first_row + PIECE_ROWS).min(num_rows),
            weights,
            pairs: first_pair..(first_pair + piece_pairs).min(num_pairs),
            out,
            finish,
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
    out: SharedRows<'a>,
    finish: Finish<'a>,
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
    #[inline(always)]
    fn multiply<V: Vector>(&self, scratch: &mut Scratch) {
        let Self { left, rows, weights, pairs, .. } = self;
        let Scratch { sums, decoded } = scratch;
        let k_tiles = left.k_tiles;
        let num_row_pairs = rows.len().div_ceil(PAIR_ROWS);
        ensure(sums, num_row_pairs * pairs.len() * SUMS, Lanes::ZERO);
        ensure(decoded, pairs.len() * STRETCH * PAIR_LINES, Line([0; TILE_INPUTS]));
        // Few rows don't come back to a weight.
        let stretch = match weights {
            Weights::Tiles(_) if num_row_pairs == 1 => k_tiles,
            _ => STRETCH,
        };
        for first in (0..k_tiles).step_by(stretch) {
            let len = stretch.min(k_tiles - first);
            for row_pair in 0..num_row_pairs {
                let row = rows.start + row_pair * PAIR_ROWS;
                let shape = Shape::new((rows.end - row).min(PAIR_ROWS));
                shape.configure();
                for (index, pair) in pairs.clone().enumerate() {
                    let right = match weights {
                        Weights::Tiles(lines) => {
                            &lines[(pair * k_tiles + first) * PAIR_LINES..][..len * PAIR_LINES]
                        }
                        Weights::Blocks(w) => {
                            let out =
                                &mut decoded[index * STRETCH * PAIR_LINES..][..len * PAIR_LINES];
                            if row_pair == 0 {
                                Decode { w, pair, first, out }.run::<V>();
                            }
                            &*out
                        }
                    };
                    let operands = Operands {
                        left: [
                            left.tiles(row, first),
                            if shape.second_rows > 0 {
                                left.tiles(row + LANES, first)
                            } else {
                                &[]
                            },
                        ],
                        right,
                        ahead: match weights {
                            Weights::Tiles(_) => ahead(row_pair, len),
                            Weights::Blocks(_) => None,
                        },
                        is_first: first == 0,
                    };
                    let sums = &mut sums[(row_pair * pairs.len() + index) * SUMS..][..SUMS];
                    shape.multiply(operands, len, sums);
                }
            }
        }
        release();
        self.finish(sums);
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint columns of the same rows")]
    fn finish(&self, sums: &[Lanes]) {
        let Self { rows, pairs, out, finish, .. } = self;
        for (row_index, row) in rows.clone().enumerate() {
            let (row_pair, tile_row) = (row_index / PAIR_ROWS, row_index % PAIR_ROWS);
            for (index, pair) in pairs.clone().enumerate() {
                let sums = &sums[(row_pair * pairs.len() + index) * SUMS..][..SUMS];
                for half in 0..2 {
                    let column = pair * PAIR_OUTPUTS + half * LANES;
                    if column < out.width() {
                        let sums = &sums[(tile_row / LANES * 2 + half) * LANES + tile_row % LANES];
                        // SAFETY: the rows and columns of this piece are the runner's alone.
                        unsafe { finish.write(*out, row, column, sums) };
                    }
                }
            }
        }
    }
}

/// How far ahead weights are asked for: while the first rows read them, what comes right behind; while the second
/// do, the next stretch.
#[inline(always)]
fn ahead(row_pair: usize, len: usize) -> Option<usize> {
    match row_pair {
        0 => Some(PAIR_LINES * LINE_BYTES),
        1 => Some(len * PAIR_LINES * LINE_BYTES),
        _ => None,
    }
}

fn ensure<T: Copy>(memory: &mut Vec<T>, len: usize, value: T) {
    if memory.len() < len {
        memory.resize(len, value);
    }
}

/// Vectors of sums of 32 rows and a pair of panels.
const SUMS: usize = 4 * LANES;

/// How many rows the two tiles of a left-hand side have.
#[derive(Clone, Copy)]
struct Shape {
    first_rows: usize,
    second_rows: usize,
}

/// What is multiplied.
#[derive(Clone, Copy)]
struct Operands<'a> {
    /// Tiles of the first 16 rows and of the next.
    left: [&'a [Line]; 2],
    /// Tiles of a pair of panels.
    right: &'a [Line],
    /// Bytes ahead of the right-hand side that are asked for meanwhile, where it comes from far.
    ahead: Option<usize>,
    /// Whether there are no sums yet.
    is_first: bool,
}

/// Bytes from a line to the next.
const LINE_BYTES: usize = size_of::<Line>();

/// Asks for sixteen lines of the right-hand side, `ahead` and some bytes ahead of where it is.
macro_rules! ask_ahead {
    ($from:literal) => {
        concat!(
            ask_ahead!($from, 0, 64, 128, 192, 256, 320, 384, 448),
            ask_ahead!($from, 512, 576, 640, 704, 768, 832, 896, 960)
        )
    };
    ($from:literal, $($line:literal),*) => {
        concat!($("prefetcht0 [{right} + {ahead} + ", $from, " + ", $line, "]\n"),*)
    };
}

/// A function that adds the products of `len` pairs of tiles: 16 rows times two panels.
macro_rules! define_multiply_16 {
    ($name:ident, $ahead_0:expr, $ahead_1:expr, $($ahead:ident)?) => {
        /// # Safety
        /// The shape must be configured, and the memory be there: `len` times 32 lines of each operand, four
        /// tiles of sums.
        #[expect(unsafe_code, reason = "instructions of the unit")]
        unsafe fn $name(
            left: *const Line,
            right: *const Line,
            len: usize,
            (sums, is_first): (*mut Lanes, bool),
            $($ahead: usize,)?
        ) {
            // SAFETY: the caller answers for it. The compiler uses no tiles, so they keep what they hold.
            unsafe {
                if is_first {
                    asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem));
                } else {
                    asm!(
                        "tileloadd tmm0, [{sums} + {line}]",
                        "tileloadd tmm1, [{sums} + {line} + 1024]",
                        sums = in(reg) sums, line = in(reg) LINE_BYTES, options(nostack, readonly)
                    );
                }
                asm!(
                    "2:",
                    "tileloadd tmm4, [{right} + {line}]",
                    "tileloadd tmm6, [{left} + {line}]",
                    $ahead_0,
                    "tileloadd tmm5, [{right} + {line} + 1024]",
                    "tdpbf16ps tmm0, tmm6, tmm4",
                    "tdpbf16ps tmm1, tmm6, tmm5",
                    "tileloadd tmm7, [{left} + {line} + 1024]",
                    $ahead_1,
                    "tdpbf16ps tmm0, tmm7, tmm4",
                    "tdpbf16ps tmm1, tmm7, tmm5",
                    "add {left}, 2048",
                    "add {right}, 2048",
                    "dec {len}",
                    "jnz 2b",
                    left = inout(reg) left => _, right = inout(reg) right => _,
                    len = inout(reg) len => _, line = in(reg) LINE_BYTES,
                    $($ahead = in(reg) $ahead,)? options(nostack, readonly)
                );
                asm!(
                    "tilestored [{sums} + {line}], tmm0",
                    "tilestored [{sums} + {line} + 1024], tmm1",
                    sums = in(reg) sums, line = in(reg) LINE_BYTES, options(nostack)
                );
            }
        }
    };
}

/// The same for 17 to 32 rows.
macro_rules! define_multiply_32 {
    ($name:ident, $ahead_0:expr, $ahead_1:expr, $($ahead:ident)?) => {
        /// # Safety
        /// The shape must be configured, and the memory be there: `len` times 32 lines of each operand, four
        /// tiles of sums.
        #[expect(unsafe_code, reason = "instructions of the unit")]
        unsafe fn $name(
            (first, second): (*const Line, *const Line),
            right: *const Line,
            len: usize,
            (sums, is_first): (*mut Lanes, bool),
            $($ahead: usize,)?
        ) {
            // SAFETY: the caller answers for it. The compiler uses no tiles, so they keep what they hold.
            unsafe {
                if is_first {
                    asm!(
                        "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                        options(nostack, nomem)
                    );
                } else {
                    asm!(
                        "tileloadd tmm0, [{sums} + {line}]",
                        "tileloadd tmm1, [{sums} + {line} + 1024]",
                        "tileloadd tmm2, [{sums} + {line} + 2048]",
                        "tileloadd tmm3, [{sums} + {line} + 3072]",
                        sums = in(reg) sums, line = in(reg) LINE_BYTES, options(nostack, readonly)
                    );
                }
                asm!(
                    "2:",
                    "tileloadd tmm4, [{right} + {line}]",
                    "tileloadd tmm6, [{first} + {line}]",
                    "tileloadd tmm7, [{second} + {line}]",
                    "tdpbf16ps tmm0, tmm6, tmm4",
                    "tileloadd tmm5, [{right} + {line} + 1024]",
                    $ahead_0,
                    "tdpbf16ps tmm2, tmm7, tmm4",
                    "tdpbf16ps tmm1, tmm6, tmm5",
                    "tdpbf16ps tmm3, tmm7, tmm5",
                    "tileloadd tmm6, [{first} + {line} + 1024]",
                    "tileloadd tmm7, [{second} + {line} + 1024]",
                    $ahead_1,
                    "tdpbf16ps tmm0, tmm6, tmm4",
                    "tdpbf16ps tmm2, tmm7, tmm4",
                    "tdpbf16ps tmm1, tmm6, tmm5",
                    "tdpbf16ps tmm3, tmm7, tmm5",
                    "add {first}, 2048",
                    "add {second}, 2048",
                    "add {right}, 2048",
                    "dec {len}",
                    "jnz 2b",
                    first = inout(reg) first => _, second = inout(reg) second => _,
                    right = inout(reg) right => _, len = inout(reg) len => _,
                    line = in(reg) LINE_BYTES, $($ahead = in(reg) $ahead,)?
                    options(nostack, readonly)
                );
                asm!(
                    "tilestored [{sums} + {line}], tmm0",
                    "tilestored [{sums} + {line} + 1024], tmm1",
                    "tilestored [{sums} + {line} + 2048], tmm2",
                    "tilestored [{sums} + {line} + 3072], tmm3",
                    sums = in(reg) sums, line = in(reg) LINE_BYTES, options(nostack)
                );
            }
        }
    };
}

define_multiply_16!(multiply_16, "", "",);
define_multiply_16!(multiply_16_streamed, ask_ahead!(0), ask_ahead!(1024), ahead);
define_multiply_32!(multiply_32, "", "",);
define_multiply_32!(multiply_32_streamed, ask_ahead!(0), ask_ahead!(1024), ahead);

/// Decodes a stretch of a pair of panels into tiles.
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

impl Shape {
    fn new(num_rows: usize) -> Self {
        let first_rows = num_rows.min(LANES);
        Self { first_rows, second_rows: num_rows - first_rows }
    }

    /// Tells the unit of this thread how many rows its tiles have: 0 to 3 are sums, 4 and 5 weights, 6 and 7
    /// left-hand sides, which are of the same rows if there are no more than 16.
    #[expect(unsafe_code, reason = "an instruction of the unit")]
    fn configure(self) {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            line_bytes: [0; 16],
            rows: [0; 16],
        };
        let (first, second) = (self.first_rows as u8, self.second_rows as u8);
        let last = if second == 0 { first } else { second };
        let rows = [first, first, second, second, LANES as u8, LANES as u8, first, last];
        for (tile, rows) in rows.into_iter().enumerate().filter(|(_, rows)| *rows > 0) {
            config.rows[tile] = rows;
            config.line_bytes[tile] = LINE_BYTES as u16;
        }
        // SAFETY: 64 bytes are read; who multiplies has seen that the unit is there.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
    }

    /// Adds the products of `len` tiles along the inputs to the sums.
    fn multiply(self, operands: Operands<'_>, len: usize, sums: &mut [Lanes]) {
        let Operands { left: [first, second], right, ahead, is_first } = operands;
        let num_lines = len * PAIR_LINES;
        assert!(first.len() >= num_lines && right.len() >= num_lines && sums.len() >= SUMS);
        assert!(self.second_rows == 0 || second.len() >= num_lines);
        let (first, second, right) = (first.as_ptr(), second.as_ptr(), right.as_ptr());
        let sums = (sums.as_mut_ptr(), is_first);
        #[expect(unsafe_code, reason = "instructions of the unit")]
        // SAFETY: the shape is configured; of each operand `len` times 32 lines are read, the sums are four
        // tiles (asserted). Lines ahead are only asked for, which does no harm where there are none.
        unsafe {
            match (self.second_rows > 0, ahead) {
                (false, None) => multiply_16(first, right, len, sums),
                (false, Some(ahead)) => {
                    multiply_16_streamed(first, right, len, sums, ahead);
                }
                (true, None) => multiply_32((first, second), right, len, sums),
                (true, Some(ahead)) => {
                    multiply_32_streamed((first, second), right, len, sums, ahead);
                }
            }
        }
    }
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    line_bytes: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<Config>() == 64);

/// Gives the tiles back: a thread without them is cheaper to interrupt.
#[expect(unsafe_code, reason = "an instruction of the unit")]
fn release() {
    // SAFETY: who multiplies has seen that the unit is there.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}
