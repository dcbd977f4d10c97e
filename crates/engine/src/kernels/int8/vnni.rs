//! Products of whole numbers with instructions for bytes: AVX-512 VNNI, four inputs of 16 outputs at a time.
//!
//! Most activations have nothing in their upper byte. So all lower bytes are multiplied, and of the upper ones those
//! groups of four that have anything: half of the work, and the same sums.
//!
//! The instruction multiplies bytes without a sign by bytes with one. Weights are made the former by adding 128, and
//! sums begin with what takes that off again.

use std::arch::x86_64::{
    __m512i, _MM_HINT_T1, _mm_prefetch, _mm_storeu_si128, _mm512_add_epi32, _mm512_cvtepi32_epi8,
    _mm512_cvtps_epi32, _mm512_dpbusd_epi32, _mm512_load_si512, _mm512_loadu_ps,
    _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_reduce_add_epi32, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_srai_epi32, _mm512_store_si512,
    _mm512_test_epi32_mask, _mm512_xor_si512,
};
use std::ops::Range;

use super::super::lanes::{Avx512, Line};
use super::super::{
    Cpu, Finish, Gates, Kernel, LANES, Lanes, PAIR_LINES, PAIR_OUTPUTS, Rows, SharedRows, Vector,
};
use super::{GROUP, Int8Columns, Int8Panels, TILE_INPUTS, row_scale};

/// Most rows that are multiplied at a time: as many as there are registers for the sums of two panels.
const BLOCK_ROWS: usize = 12;

/// Rows from which the products take longer than reading the weights.
const MANY_ROWS: usize = BLOCK_ROWS;

/// Rows of one piece of work.
const PIECE_ROWS: usize = 8 * BLOCK_ROWS;

/// Most pairs of panels of one piece of work.
const PIECE_PAIRS: usize = 4;

/// Pieces of work for each thread, where there is enough of it: small pieces end at the same time.
const PIECES_PER_THREAD: usize = 8;

/// Rows of activations, each in two bytes a number.
#[derive(Debug, Default)]
pub(super) struct ByteRows(Vec<ByteRow>);

#[derive(Debug, Default)]
struct ByteRow {
    /// The lower bytes, filled up to whole tiles.
    lower: Vec<Line>,
    /// The upper bytes that are not zero, in order.
    upper: Vec<UpperGroup>,
    /// The sums of both.
    lower_sum: i32,
    upper_sum: i32,
    /// What makes them numbers.
    scale: f32,
}

/// The upper bytes of four inputs.
#[derive(Clone, Copy, Debug)]
struct UpperGroup {
    /// The line of the first panel's weights in a pair of panels.
    line: u32,
    bytes: [u8; GROUP],
}

impl ByteRows {
    /// Makes whole numbers of rows, and returns them.
    fn fill(
        &mut self,
        cpu: &Cpu,
        (x, num_rows): (Rows<'_>, usize),
        (w, in_features): (&Int8Panels, usize),
    ) -> &[ByteRow] {
        if self.0.len() < num_rows {
            self.0.resize_with(num_rows, ByteRow::default);
        }
        let rows = &mut self.0[..num_rows];
        cpu.threads.share_chunks(rows, 1, |index, (): &mut (), row| {
            let numbers = x.slice(index, 0, in_features);
            cpu.simd.run(SplitRow { numbers, w, row: &mut row[0] });
        });
        rows
    }
}

/// Makes whole numbers of a row, and cuts them into bytes.
struct SplitRow<'a> {
    numbers: &'a [f32],
    w: &'a Int8Panels,
    row: &'a mut ByteRow,
}

impl Kernel for SplitRow<'_> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "calls into a function compiled for more than the baseline")]
    fn run<V: Vector>(self) {
        let Self { numbers, w, row } = self;
        let (by, scale) = row_scale(numbers, &w.columns);
        row.scale = scale;
        row.upper.clear();
        row.lower.resize(w.k_tiles, Line::ZERO);
        // SAFETY: rows come here only where the machine has these instructions.
        unsafe { split_row(numbers, &w.columns, by, row) }
    }
}

/// # Safety
/// The machine must have these instructions.
#[expect(unsafe_code, reason = "vector instructions")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn split_row(numbers: &[f32], columns: &Int8Columns, by: f32, row: &mut ByteRow) {
    let (ones, by) = (_mm512_set1_epi8(1), _mm512_set1_ps(by));
    let mut lower_sums = _mm512_setzero_si512();
    let mut upper_sums = _mm512_setzero_si512();
    for (tile, line) in row.lower.iter_mut().enumerate() {
        let first = tile * TILE_INPUTS;
        let columns: &[f32; TILE_INPUTS] = columns.chunk(first);
        let mut upper_line = Line::ZERO;
        let mut is_upper = 0u64;
        for at in (0..TILE_INPUTS).step_by(LANES) {
            let rest = &numbers[numbers.len().min(first + at)..];
            let lanes = !(u32::MAX << rest.len().min(LANES)) as u16;
            // SAFETY: so many numbers are read, as many columns, and 16 bytes of either line are written.
            unsafe {
                let number = _mm512_maskz_loadu_ps(lanes, rest.as_ptr());
                let number = _mm512_mul_ps(number, _mm512_loadu_ps(columns[at..].as_ptr()));
                let number = _mm512_cvtps_epi32(_mm512_mul_ps(number, by));
                // Both from -128 to 127: the lower one to the nearest multiple of 256.
                let upper =
                    _mm512_srai_epi32::<8>(_mm512_add_epi32(number, _mm512_set1_epi32(128)));
                let to = line.0[at..].as_mut_ptr();
                _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(number));
                let to = upper_line.0[at..].as_mut_ptr();
                _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(upper));
                is_upper |= u64::from(_mm512_test_epi32_mask(upper, upper)) << at;
            }
        }
        // SAFETY: whole lines, which are aligned.
        unsafe {
            let [lower, upper] =
                [&*line, &upper_line].map(|line| _mm512_load_si512((&raw const *line).cast()));
            lower_sums = _mm512_dpbusd_epi32(lower_sums, ones, lower);
            upper_sums = _mm512_dpbusd_epi32(upper_sums, ones, upper);
        }
        // The first bit of each four says whether there is any.
        is_upper |= is_upper >> 2;
        is_upper = (is_upper | is_upper >> 1) & 0x1111_1111_1111_1111;
        while is_upper != 0 {
            let group = is_upper.trailing_zeros() as usize / GROUP;
            let bytes = upper_line.0.as_chunks().0[group];
            row.upper.push(UpperGroup { line: (tile * PAIR_LINES + group) as u32, bytes });
            is_upper &= is_upper - 1;
        }
    }
    row.lower_sum = _mm512_reduce_add_epi32(lower_sums);
    row.upper_sum = _mm512_reduce_add_epi32(upper_sums);
}

/// Where sums go.
#[derive(Clone, Copy)]
pub(in crate::kernels) enum Output<'a> {
    /// Into rows of all outputs.
    Rows(SharedRows<'a>, Finish<'a>),
    /// Into rows of half as many, of gates and ups.
    Gated(SharedRows<'a>, Gates<'a>),
}

/// `out = x * w`: `(num_rows, in_features) -> (num_rows, out_features)`. Only where `cpu` has the instructions.
pub(super) fn matmul(
    (cpu, rows): (&Cpu, &mut ByteRows),
    (x, num_rows): (Rows<'_>, usize),
    (w, (in_features, out_features)): (&Int8Panels, (usize, usize)),
    out: Output<'_>,
) {
    let x = rows.fill(cpu, (x, num_rows), (w, in_features));
    // What is written together is computed together.
    let num_stripes = if matches!(out, Output::Gated(..)) { 2 } else { 1 };
    let num_pairs = out_features.div_ceil(PAIR_OUTPUTS) / num_stripes;
    // Pieces with the same weights stand side by side: the weights are still in a cache.
    let num_row_pieces = num_rows.div_ceil(PIECE_ROWS);
    let num_pieces = PIECES_PER_THREAD * cpu.threads.num_threads();
    let piece_pairs = (num_pairs * num_row_pieces).div_ceil(num_pieces).clamp(1, PIECE_PAIRS);
    let num_pieces = num_row_pieces * num_pairs.div_ceil(piece_pairs);
    cpu.threads.share(num_pieces, num_rows * in_features * out_features, |piece| {
        let first_row = piece % num_row_pieces * PIECE_ROWS;
        let first_pair = piece / num_row_pieces * piece_pairs;
        let piece = Piece {
            x,
            rows: first_row..(first_row + PIECE_ROWS).min(num_rows),
            w,
            pairs: first_pair..(first_pair + piece_pairs).min(num_pairs),
            stripes: (num_stripes, num_pairs),
            out,
        };
        #[expect(unsafe_code, reason = "calls into a function compiled for more than the baseline")]
        // SAFETY: the caller has seen that the machine has these instructions, and no other piece has these rows and
        // columns.
        unsafe {
            piece.multiply();
        }
    });
}

/// The sums of some rows with some panels: whole numbers at first, as bits, and then what they stand for.
type Sums = [[Lanes; 2 * PIECE_PAIRS]; BLOCK_ROWS];

/// Some rows times some pairs of panels.
struct Piece<'a> {
    x: &'a [ByteRow],
    rows: Range<usize>,
    w: &'a Int8Panels,
    pairs: Range<usize>,
    /// How many ranges of pairs there are, and how far each is from the one before.
    stripes: (usize, usize),
    out: Output<'a>,
}

#[expect(unsafe_code, reason = "vector instructions, and several threads write disjoint columns")]
impl Piece<'_> {
    /// A block of rows passes all pairs before the next one does.
    ///
    /// # Safety
    /// The machine must have these instructions; nobody else may touch those rows and columns of the output.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn multiply(&self) {
        let mut sums = [[[Lanes::ZERO; 2 * PIECE_PAIRS]; BLOCK_ROWS]; 2];
        let (num_stripes, distance) = self.stripes;
        let mut row = self.rows.start;
        while row < self.rows.end {
            let num_rows = match self.rows.end - row {
                BLOCK_ROWS.. => BLOCK_ROWS,
                left => 1 << left.ilog2(),
            };
            let x = &self.x[row..row + num_rows];
            for (stripe, sums) in sums.iter_mut().enumerate().take(num_stripes) {
                let pairs =
                    self.pairs.start + stripe * distance..self.pairs.end + stripe * distance;
                let lines = self.pair_lines(&pairs);
                let ahead = self.ahead(&pairs, row - self.rows.start);
                // SAFETY: the caller answers for it.
                unsafe {
                    match num_rows {
                        1 => multiply_lower::<1>(x, lines, ahead, sums),
                        2 => multiply_lower::<2>(x, lines, ahead, sums),
                        4 => multiply_lower::<4>(x, lines, ahead, sums),
                        8 => multiply_lower::<8>(x, lines, ahead, sums),
                        _ => multiply_lower::<BLOCK_ROWS>(x, lines, ahead, sums),
                    }
                    for (x, sums) in x.iter().zip(sums) {
                        match pairs.len() {
                            4 => add_upper::<8>(x, lines, sums),
                            3 => add_upper::<6>(x, lines, sums),
                            2 => add_upper::<4>(x, lines, sums),
                            _ => add_upper::<2>(x, lines, sums),
                        }
                        for (index, sums) in sums.iter_mut().enumerate().take(2 * pairs.len()) {
                            let scales = Avx512::load(&self.w.scales(2 * pairs.start + index));
                            let scaled = Avx512::load(sums).mul(Avx512::splat(x.scale)).mul(scales);
                            scaled.store(sums);
                        }
                    }
                }
            }
            let [sums, ups] = &sums;
            for (index, (sums, ups)) in sums.iter().zip(ups).enumerate().take(num_rows) {
                // SAFETY: the caller answers for it.
                unsafe { self.finish(row + index, [sums, ups]) };
            }
            row += num_rows;
        }
    }

    /// The weights of pairs of panels.
    fn pair_lines(&self, pairs: &Range<usize>) -> Pairs<'_> {
        let distance = self.w.pair_lines();
        let lines = &self.w.lines[pairs.start * distance..pairs.end * distance];
        Pairs { lines, distance, k_tiles: self.w.k_tiles, len: pairs.len() }
    }

    /// What is asked for while a block passes: its share of the weights behind these, if they are what comes next.
    fn ahead(&self, pairs: &Range<usize>, first_row: usize) -> Ahead {
        let num_blocks = self.rows.len().div_ceil(BLOCK_ROWS);
        // A block alone reads from end to end, which the processor sees; after other rows than the last these pairs come
        // once more.
        if num_blocks == 1 || self.rows.end < self.x.len() {
            return Ahead { from: std::ptr::null(), lines_per_tile: 0 };
        }
        let lines_per_tile = PAIR_LINES.div_ceil(num_blocks);
        let share = pairs.len() * self.w.k_tiles * lines_per_tile;
        let next = self.w.lines.as_ptr().wrapping_add(pairs.end * self.w.pair_lines());
        Ahead { from: next.wrapping_add(first_row / BLOCK_ROWS * share), lines_per_tile }
    }

    /// Writes what has been summed up of a row.
    ///
    /// # Safety
    /// Nobody else may touch the columns of these pairs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn finish(&self, row: usize, [sums, ups]: [&[Lanes; 2 * PIECE_PAIRS]; 2]) {
        for index in 0..2 * self.pairs.len() {
            let column = self.pairs.start * PAIR_OUTPUTS + index * LANES;
            match self.out {
                // SAFETY: the caller answers for it.
                Output::Rows(out, finish) if column < out.width() => unsafe {
                    finish.write(out, row, column, &sums[index]);
                },
                // Panels are filled up to pairs.
                Output::Rows(..) => {}
                Output::Gated(out, gates) => {
                    let gated = gates.apply::<Avx512>(column, sums[index], ups[index]);
                    // SAFETY: the caller answers for it.
                    unsafe { Finish::Store.write(out, row, column, &gated) };
                }
            }
        }
    }
}

/// The weights of some pairs of panels.
#[derive(Clone, Copy)]
struct Pairs<'a> {
    lines: &'a [Line],
    /// Lines from a pair to the next.
    distance: usize,
    k_tiles: usize,
    len: usize,
}

/// Memory that is asked for.
#[derive(Clone, Copy)]
struct Ahead {
    from: *const Line,
    /// Lines for each tile of a pair that is multiplied.
    lines_per_tile: usize,
}

/// The sums of the lower bytes of `R` rows.
///
/// # Safety
/// The machine must have these instructions.
#[expect(unsafe_code, reason = "vector instructions, on memory whose length is checked once")]
#[expect(clippy::needless_range_loop, reason = "what is in registers is named by its number")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn multiply_lower<const R: usize>(
    x: &[ByteRow],
    pairs: Pairs<'_>,
    mut ahead: Ahead,
    sums: &mut Sums,
) {
    assert!(pairs.lines.len() >= pairs.len * pairs.distance && pairs.len <= PIECE_PAIRS);
    let mut bytes = [std::ptr::null(); R];
    let mut first = [_mm512_setzero_si512(); R];
    for r in 0..R {
        assert_eq!(x[r].lower.len(), pairs.k_tiles, "inputs of a row");
        bytes[r] = x[r].lower.as_ptr().cast::<i32>();
        first[r] = _mm512_set1_epi32(x[r].lower_sum.wrapping_mul(-128));
    }
    for pair in 0..pairs.len {
        let mut lower = [first, first];
        for tile in 0..pairs.k_tiles {
            for _ in 0..ahead.lines_per_tile {
                _mm_prefetch::<_MM_HINT_T1>(ahead.from.cast());
                ahead.from = ahead.from.wrapping_add(1);
            }
            // SAFETY: there are so many pairs and tiles, of 16 lines of either panel, and a row has a line for each tile
            // (asserted).
            unsafe {
                let lines = pairs.lines.as_ptr().add(pair * pairs.distance + tile * PAIR_LINES);
                let at = tile * LANES;
                if R < MANY_ROWS {
                    // Weights in the order of memory, which is read twice as fast so.
                    for p in 0..2 {
                        for group in 0..LANES {
                            let weights = without_sign(lines.add(p * LANES + group));
                            for r in 0..R {
                                let inputs = _mm512_set1_epi32(*bytes[r].add(at + group));
                                lower[p][r] = _mm512_dpbusd_epi32(lower[p][r], weights, inputs);
                            }
                        }
                    }
                } else {
                    // Inputs spread out once for both panels: an instruction that spreads its own takes half as long again.
                    for group in 0..LANES {
                        let weights = [
                            without_sign(lines.add(group)),
                            without_sign(lines.add(LANES + group)),
                        ];
                        for r in 0..R {
                            let inputs = _mm512_set1_epi32(*bytes[r].add(at + group));
                            for p in 0..2 {
                                lower[p][r] = _mm512_dpbusd_epi32(lower[p][r], weights[p], inputs);
                            }
                        }
                    }
                }
            }
        }
        for r in 0..R {
            for p in 0..2 {
                let to: *mut Lanes = &raw mut sums[r][2 * pair + p];
                // SAFETY: 16 numbers of 32 bits, aligned to 64 bytes.
                unsafe { _mm512_store_si512(to.cast(), lower[p][r]) };
            }
        }
    }
}

/// Adds a row's upper bytes with `P` panels to the sums of the lower ones, and makes numbers of them.
///
/// # Safety
/// The machine must have these instructions, the row have been multiplied with these pairs already.
#[expect(unsafe_code, reason = "vector instructions, on memory whose length has been checked")]
#[expect(clippy::needless_range_loop, reason = "what is in registers is named by its number")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn add_upper<const P: usize>(
    x: &ByteRow,
    pairs: Pairs<'_>,
    sums: &mut [Lanes; 2 * PIECE_PAIRS],
) {
    let mut upper = [_mm512_set1_epi32(x.upper_sum.wrapping_mul(-128)); P];
    for group in &x.upper {
        let inputs = _mm512_set1_epi32(i32::from_le_bytes(group.bytes));
        for p in 0..P {
            // SAFETY: the groups are those of a row that has a line for each tile of a pair.
            unsafe {
                let line = p / 2 * pairs.distance + group.line as usize + p % 2 * LANES;
                let weights = without_sign(pairs.lines.as_ptr().add(line));
                upper[p] = _mm512_dpbusd_epi32(upper[p], weights, inputs);
            }
        }
    }
    for p in 0..P {
        let mut bits = Lanes::ZERO;
        // SAFETY: 16 numbers of 32 bits, aligned to 64 bytes.
        unsafe { _mm512_store_si512((&raw mut bits).cast(), upper[p]) };
        Avx512::join(&bits, &sums[p]).store(&mut sums[p]);
    }
}

/// 64 weights, and 128 more each.
///
/// # Safety
/// There must be a line.
#[expect(unsafe_code, reason = "vector instructions")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn without_sign(line: *const Line) -> __m512i {
    // SAFETY: the caller answers for the line, which is aligned.
    unsafe { _mm512_xor_si512(_mm512_load_si512(line.cast()), _mm512_set1_epi8(-128)) }
}
