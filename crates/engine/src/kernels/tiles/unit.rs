//! The instructions of the unit: what a thread tells it, and the one inner loop.

use std::arch::asm;

use super::{LANES, Lanes, Line, PAIR_LINES};

/// Vectors of sums of 32 rows and a pair of panels.
pub(super) const SUMS: usize = 4 * LANES;

/// Bytes from a line to the next.
const LINE_BYTES: usize = size_of::<Line>();

/// How many rows the two tiles of a left-hand side have.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
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

/// A function that adds the products of `len` pairs of tiles: 16 rows times two panels.
macro_rules! define_multiply_16 {
    ($name:ident, $ask_0:expr, $ask_1:expr, $step:literal) => {
        /// # Safety
        /// The shape must be configured, and the memory be there: `len` times 32 lines of each operand, four
        /// tiles of sums.
        #[expect(unsafe_code, reason = "instructions of the unit")]
        unsafe fn $name(
            left: *const Line,
            right: *const Line,
            len: usize,
            (sums, is_first): (*mut Lanes, bool),
            next: *const Line,
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
                    $ask_0,
                    "tileloadd tmm5, [{right} + {line} + 1024]",
                    "tdpbf16ps tmm0, tmm6, tmm4",
                    "tdpbf16ps tmm1, tmm6, tmm5",
                    "tileloadd tmm7, [{left} + {line} + 1024]",
                    $ask_1,
                    "tdpbf16ps tmm0, tmm7, tmm4",
                    "tdpbf16ps tmm1, tmm7, tmm5",
                    "add {left}, 2048",
                    "add {right}, 2048",
                    concat!("add {next}, 64 * ", $step),
                    "dec {len}",
                    "jnz 2b",
                    left = inout(reg) left => _, right = inout(reg) right => _,
                    len = inout(reg) len => _, next = inout(reg) next => _,
                    line = in(reg) LINE_BYTES, options(nostack, readonly)
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
    ($name:ident, $ask_0:expr, $ask_1:expr, $step:literal) => {
        /// # Safety
        /// The shape must be configured, and the memory be there: `len` times 32 lines of each operand, four
        /// tiles of sums.
        #[expect(unsafe_code, reason = "instructions of the unit")]
        unsafe fn $name(
            (first, second): (*const Line, *const Line),
            right: *const Line,
            len: usize,
            (sums, is_first): (*mut Lanes, bool),
            next: *const Line,
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
                    $ask_0,
                    "tdpbf16ps tmm0, tmm6, tmm4",
                    "tileloadd tmm5, [{right} + {line} + 1024]",
                    "tdpbf16ps tmm2, tmm7, tmm4",
                    "tdpbf16ps tmm1, tmm6, tmm5",
                    "tdpbf16ps tmm3, tmm7, tmm5",
                    "tileloadd tmm6, [{first} + {line} + 1024]",
                    "tileloadd tmm7, [{second} + {line} + 1024]",
                    $ask_1,
                    "tdpbf16ps tmm0, tmm6, tmm4",
                    "tdpbf16ps tmm2, tmm7, tmm4",
                    "tdpbf16ps tmm1, tmm6, tmm5",
                    "tdpbf16ps tmm3, tmm7, tmm5",
                    "add {first}, 2048",
                    "add {second}, 2048",
                    "add {right}, 2048",
                    concat!("add {next}, 64 * ", $step),
                    "dec {len}",
                    "jnz 2b",
                    first = inout(reg) first => _, second = inout(reg) second => _,
                    right = inout(reg) right => _, len = inout(reg) len => _,
                    next = inout(reg) next => _, line = in(reg) LINE_BYTES,
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

/// Both functions, asking for so many lines with each tile.
macro_rules! define_multiply {
    ($name_16:ident, $name_32:ident, $ask_0:expr, $ask_1:expr, $step:literal) => {
        define_multiply_16!($name_16, $ask_0, $ask_1, $step);
        define_multiply_32!($name_32, $ask_0, $ask_1, $step);
    };
}

define_multiply!(multiply_16, multiply_32, "", "", "0");
define_multiply!(multiply_16_ask_4, multiply_32_ask_4, ask!(0, 1), ask!(2, 3), "4");
define_multiply!(multiply_16_ask_8, multiply_32_ask_8, ask!(0, 1, 2, 3), ask!(4, 5, 6, 7), "8");
define_multiply!(
    multiply_16_ask_16,
    multiply_32_ask_16,
    ask!(0, 1, 2, 3, 4, 5, 6, 7),
    ask!(8, 9, 10, 11, 12, 13, 14, 15),
    "16"
);
define_multiply!(
    multiply_16_ask_32,
    multiply_32_ask_32,
    ask!(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    ask!(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31),
    "32"
);

impl Shape {
    pub(super) fn new(num_rows: usize) -> Self {
        let first_rows = num_rows.min(LANES);
        Self { first_rows, second_rows: num_rows - first_rows }
    }

    /// Whether there are more than 16 rows.
    pub(super) fn has_second(self) -> bool {
        self.second_rows > 0
    }

    /// Tells the unit of this thread how many rows its tiles have: 0 to 3 are sums, 4 and 5 weights, 6 and 7
    /// left-hand sides, which are of the same rows if there are no more than 16.
    #[expect(unsafe_code, reason = "an instruction of the unit")]
    pub(super) fn configure(self) {
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
    pub(super) fn multiply(self, operands: Operands<'_>, len: usize, sums: &mut [Lanes]) {
        let Operands { left: [first, second], right, ahead, is_first } = operands;
        let num_lines = len * PAIR_LINES;
        assert!(first.len() >= num_lines && right.len() >= num_lines && sums.len() >= SUMS);
        assert!(self.second_rows == 0 || second.len() >= num_lines);
        let sums = (sums.as_mut_ptr(), is_first);
        let (next, lines) =
            ahead.map_or((right.as_ptr(), 0), |ahead| (ahead.from, ahead.lines_per_tile));
        let (first, second, right) = (first.as_ptr(), second.as_ptr(), right.as_ptr());
        #[expect(unsafe_code, reason = "instructions of the unit")]
        // SAFETY: the shape is configured; of each operand `len` times 32 lines are read, the sums are four
        // tiles (asserted). Lines ahead are only asked for, which does no harm where there are none.
        unsafe {
            if self.second_rows == 0 {
                let multiply = match lines {
                    0 => multiply_16,
                    4 => multiply_16_ask_4,
                    8 => multiply_16_ask_8,
                    16 => multiply_16_ask_16,
                    _ => multiply_16_ask_32,
                };
                multiply(first, right, len, sums, next);
            } else {
                let multiply = match lines {
                    0 => multiply_32,
                    4 => multiply_32_ask_4,
                    8 => multiply_32_ask_8,
                    16 => multiply_32_ask_16,
                    _ => multiply_32_ask_32,
                };
                multiply((first, second), right, len, sums, next);
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
pub(super) fn release() {
    // SAFETY: who multiplies has seen that the unit is there.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}
