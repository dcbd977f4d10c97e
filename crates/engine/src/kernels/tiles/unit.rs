//! The instructions of the unit: what a thread tells it, and the one inner loop.

use std::arch::asm;

use super::{LANES, Lanes, Line, PAIR_LINES};

/// Vectors of sums of the rows that are multiplied at a time and a pair of panels.
pub(super) const SUMS: usize = 4 * LANES;

/// Bytes from a line to the next.
const LINE_BYTES: usize = size_of::<Line>();

/// What is in the tiles. The left-hand side is in two parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernels) enum Numbers {
    /// bfloat16; products of both parts are added up together, in `f32`.
    Bf16,
    /// Whole numbers of 8 bits; products of each part are added up by themselves, in 32 bits.
    Int8,
}

impl Numbers {
    /// Inputs of a tile.
    #[inline(always)]
    pub(in crate::kernels) fn tile_inputs(self) -> usize {
        LINE_BYTES / if self == Self::Bf16 { 2 } else { 1 }
    }

    /// Rows that are multiplied at a time.
    #[inline(always)]
    pub(in crate::kernels) fn unit_rows(self) -> usize {
        if self == Self::Bf16 { 2 * LANES } else { LANES }
    }
}

/// What is multiplied at a time: how many rows the two tiles of a left-hand side have.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    numbers: Numbers,
    first_rows: usize,
    second_rows: usize,
}

/// What is multiplied.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    /// Tiles of the first 16 rows and of the next.
    pub(super) left: [&'a [Line]; 2],
    /// Tiles of a pair of panels.
    pub(super) right: &'a [Line],
    /// What is asked for meanwhile, where weights come from far.
    pub(super) ahead: Option<Ahead>,
    /// Whether there are no sums yet.
    pub(super) is_first: bool,
}

/// Lines of weights that are needed soon.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// The first of them. Nothing is read: it may lie behind the end.
    pub(super) from: *const Line,
    /// How many are asked for with each tile along the inputs: 4, 8, 16 or 32.
    pub(super) lines_per_tile: usize,
}

/// Asks for lines behind `{next}`.
macro_rules! ask {
    ($($line:literal),*) => { concat!($("prefetcht1 [{next} + 64 * ", $line, "]\n"),*) };
}

/// Up to 16 rows of bfloat16: both parts add to the same two tiles.
macro_rules! bf16_16 {
    ($ask_0:expr, $ask_1:expr) => {
        concat!(
            "tileloadd tmm4, [{right} + {line}]\n",
            "tileloadd tmm6, [{first} + {line}]\n",
            $ask_0,
            "tileloadd tmm5, [{right} + {line} + 1024]\n",
            "tdpbf16ps tmm0, tmm6, tmm4\n",
            "tdpbf16ps tmm1, tmm6, tmm5\n",
            "tileloadd tmm7, [{first} + {line} + 1024]\n",
            $ask_1,
            "tdpbf16ps tmm0, tmm7, tmm4\n",
            "tdpbf16ps tmm1, tmm7, tmm5\n",
        )
    };
}

/// 17 to 32 rows of bfloat16: both parts add to the same four tiles.
macro_rules! bf16_32 {
    ($ask_0:expr, $ask_1:expr) => {
        concat!(
            "tileloadd tmm4, [{right} + {line}]\n",
            "tileloadd tmm6, [{first} + {line}]\n",
            "tileloadd tmm7, [{second} + {line}]\n",
            $ask_0,
            "tdpbf16ps tmm0, tmm6, tmm4\n",
            "tileloadd tmm5, [{right} + {line} + 1024]\n",
            "tdpbf16ps tmm2, tmm7, tmm4\n",
            "tdpbf16ps tmm1, tmm6, tmm5\n",
            "tdpbf16ps tmm3, tmm7, tmm5\n",
            "tileloadd tmm6, [{first} + {line} + 1024]\n",
            "tileloadd tmm7, [{second} + {line} + 1024]\n",
            $ask_1,
            "tdpbf16ps tmm0, tmm6, tmm4\n",
            "tdpbf16ps tmm2, tmm7, tmm4\n",
            "tdpbf16ps tmm1, tmm6, tmm5\n",
            "tdpbf16ps tmm3, tmm7, tmm5\n",
        )
    };
}

/// Up to 16 rows of whole numbers: each part has two tiles of its own.
macro_rules! int8_16 {
    ($ask_0:expr, $ask_1:expr) => {
        concat!(
            "tileloadd tmm4, [{right} + {line}]\n",
            "tileloadd tmm6, [{first} + {line}]\n",
            $ask_0,
            "tileloadd tmm5, [{right} + {line} + 1024]\n",
            "tdpbssd tmm0, tmm6, tmm4\n",
            "tileloadd tmm7, [{first} + {line} + 1024]\n",
            $ask_1,
            "tdpbssd tmm1, tmm6, tmm5\n",
            "tdpbssd tmm2, tmm7, tmm4\n",
            "tdpbssd tmm3, tmm7, tmm5\n",
        )
    };
}

/// Adds the products of `len` pairs of tiles to tiles of sums: the two tiles of rows of the left-hand side, the
/// right-hand side, `len`, the sums with whether there are none yet, and the lines to be asked for.
///
/// # Safety
/// The shape must be configured, and the memory be there: `len` times 32 lines of each operand (a second tile
/// of rows is read only by shapes that have one), four tiles of sums.
type Multiply = unsafe fn([*const Line; 2], *const Line, usize, (*mut Lanes, bool), *const Line);

/// One such function, and how many lines it asks for with each tile.
macro_rules! multiply {
    ($zero:expr, $load:expr, $step:expr, $store:expr, $asked:literal) => {{
        #[expect(unsafe_code, reason = "instructions of the unit")]
        unsafe fn multiply(
            [first, second]: [*const Line; 2],
            right: *const Line,
            len: usize,
            (sums, is_first): (*mut Lanes, bool),
            next: *const Line,
        ) {
            // SAFETY: the caller answers for it. The compiler uses no tiles, so they keep what they hold.
            unsafe {
                if is_first {
                    asm!($zero, options(nostack, nomem));
                } else {
                    asm!(
                        $load,
                        sums = in(reg) sums, line = in(reg) LINE_BYTES, options(nostack, readonly)
                    );
                }
                asm!(
                    "2:",
                    $step,
                    "add {first}, 2048",
                    "add {second}, 2048",
                    "add {right}, 2048",
                    concat!("add {next}, 64 * ", $asked),
                    "dec {len}",
                    "jnz 2b",
                    first = inout(reg) first => _, second = inout(reg) second => _,
                    right = inout(reg) right => _, len = inout(reg) len => _,
                    next = inout(reg) next => _, line = in(reg) LINE_BYTES,
                    options(nostack, readonly)
                );
                asm!(
                    $store,
                    sums = in(reg) sums, line = in(reg) LINE_BYTES, options(nostack)
                );
            }
        }
        multiply
    }};
}

/// A function that gives the one that asks for so many lines with each tile.
macro_rules! define_multiply {
    ($name:ident, $step:ident, $zero:expr, $load:expr, $store:expr) => {
        fn $name(lines_asked: usize) -> Multiply {
            match lines_asked {
                0 => multiply!($zero, $load, $step!("", ""), $store, "0"),
                4 => multiply!($zero, $load, $step!(ask!(0, 1), ask!(2, 3)), $store, "4"),
                8 => {
                    multiply!($zero, $load, $step!(ask!(0, 1, 2, 3), ask!(4, 5, 6, 7)), $store, "8")
                }
                16 => multiply!(
                    $zero,
                    $load,
                    $step!(ask!(0, 1, 2, 3, 4, 5, 6, 7), ask!(8, 9, 10, 11, 12, 13, 14, 15)),
                    $store,
                    "16"
                ),
                _ => multiply!(
                    $zero,
                    $load,
                    $step!(
                        ask!(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                        ask!(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31)
                    ),
                    $store,
                    "32"
                ),
            }
        }
    };
}

/// Two tiles of sums.
macro_rules! two {
    (zero) => {
        "tilezero tmm0\ntilezero tmm1"
    };
    (load) => {
        "tileloadd tmm0, [{sums} + {line}]\ntileloadd tmm1, [{sums} + {line} + 1024]"
    };
    (store) => {
        "tilestored [{sums} + {line}], tmm0\ntilestored [{sums} + {line} + 1024], tmm1"
    };
}

/// Four tiles of sums.
macro_rules! four {
    (zero) => {
        concat!(two!(zero), "\ntilezero tmm2\ntilezero tmm3")
    };
    (load) => {
        concat!(
            two!(load),
            "\ntileloadd tmm2, [{sums} + {line} + 2048]\ntileloadd tmm3, [{sums} + {line} + 3072]"
        )
    };
    (store) => {
        concat!(
            two!(store),
            "\ntilestored [{sums} + {line} + 2048], tmm2\ntilestored [{sums} + {line} + 3072], tmm3"
        )
    };
}

define_multiply!(multiply_bf16_16, bf16_16, two!(zero), two!(load), two!(store));
define_multiply!(multiply_bf16_32, bf16_32, four!(zero), four!(load), four!(store));
define_multiply!(multiply_int8_16, int8_16, four!(zero), four!(load), four!(store));

impl Shape {
    /// For so many rows, at most [`Numbers::unit_rows`].
    pub(super) fn new(numbers: Numbers, num_rows: usize) -> Self {
        let first_rows = num_rows.min(LANES);
        Self { numbers, first_rows, second_rows: num_rows - first_rows }
    }

    /// Whether there are more than 16 rows.
    pub(super) fn has_second(self) -> bool {
        self.second_rows > 0
    }

    /// Tells the unit of this thread how many rows its tiles have: 0 to 3 are sums, 4 and 5 weights, 6 and 7
    /// left-hand sides, which are both parts of the same rows if there are no more than 16.
    #[expect(unsafe_code, reason = "an instruction of the unit")]
    pub(super) fn configure(self) {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            line_bytes: [0; 16],
            rows: [0; 16],
        };
        let first = self.first_rows as u8;
        let last = if self.has_second() { self.second_rows as u8 } else { first };
        let last_sums = if self.num_sums() == SUMS { last } else { 0 };
        let rows = [first, first, last_sums, last_sums, LANES as u8, LANES as u8, first, last];
        for (tile, rows) in rows.into_iter().enumerate().filter(|(_, rows)| *rows > 0) {
            config.rows[tile] = rows;
            config.line_bytes[tile] = LINE_BYTES as u16;
        }
        // SAFETY: 64 bytes are read; who multiplies has seen that the unit is there.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
    }

    /// Adds the products of `len` tiles along the inputs to the sums.
    pub(super) fn multiply(self, operands: Operands<'_>, len: usize, sums: &mut [Lanes]) {
        let Operands { left: [first, second], right, ahead, is_first } = operands;
        let num_lines = len * PAIR_LINES;
        assert!(first.len() >= num_lines && right.len() >= num_lines && sums.len() >= SUMS);
        assert!(!self.has_second() || second.len() >= num_lines);
        let (next, lines) =
            ahead.map_or((right.as_ptr(), 0), |ahead| (ahead.from, ahead.lines_per_tile));
        let multiply = match (self.numbers, self.has_second()) {
            (Numbers::Bf16, false) => multiply_bf16_16(lines),
            (Numbers::Bf16, true) => multiply_bf16_32(lines),
            (Numbers::Int8, _) => multiply_int8_16(lines),
        };
        let left = [first.as_ptr(), second.as_ptr()];
        let sums = (sums.as_mut_ptr(), is_first);
        #[expect(unsafe_code, reason = "instructions of the unit")]
        // SAFETY: the shape is configured; of each operand `len` times 32 lines are read, the sums are four
        // tiles (asserted). Lines ahead are only asked for, which does no harm where there are none.
        unsafe {
            multiply(left, right.as_ptr(), len, sums, next);
        }
    }

    /// Vectors of sums.
    fn num_sums(self) -> usize {
        if self.numbers == Numbers::Int8 || self.has_second() { SUMS } else { SUMS / 2 }
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
pub(super) fn release() {
    // SAFETY: who multiplies has seen that the unit is there.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}
