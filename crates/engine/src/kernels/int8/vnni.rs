//! Products of whole numbers with instructions for bytes: AVX-512 VNNI, four inputs of 16 outputs at a time.
//!
//! Most activations have nothing in their upper byte. So all lower bytes are multiplied, and of the upper ones those
//! groups of four that have anything: half of the work, and the same sums.
//!
//! The instruction multiplies bytes without a sign by bytes with one. Weights are made the former by adding 128, and
//! sums begin with what takes that off again.

use std::arch::x86_64::{
    __m512i, _mm512_add_epi32, _mm512_dpbusd_epi32, _mm512_load_si512, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_setzero_si512, _mm512_store_si512, _mm512_xor_si512,
};
use std::ops::Range;

use super::super::lanes::{Avx512, Line};
use super::super::{
    Cpu, Finish, Kernel, LANES, Lanes, PAIR_LINES, PAIR_OUTPUTS, Rows, SharedRows, Vector,
};
use super::{GROUP, Int8Columns, Int8Panels, quantise, row_scale};

/// Rows of one piece of work: whole blocks of the most rows that are multiplied at a time.
const PIECE_ROWS: usize = 96;

/// Pairs of panels of one piece of work.
const PIECE_PAIRS: usize = 2;

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
    bytes: [i8; GROUP],
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
            row[0].lower.resize(w.k_tiles, Line::ZERO);
            let numbers = x.slice(index, 0, in_features);
            cpu.simd.run(SplitRow { numbers, columns: &w.columns, row: &mut row[0] });
        });
        rows
    }
}

/// Makes whole numbers of a row, and cuts them into bytes.
struct SplitRow<'a> {
    numbers: &'a [f32],
    columns: &'a Int8Columns,
    row: &'a mut ByteRow,
}

impl Kernel for SplitRow<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { numbers, columns, row } = self;
        let (by, scale) = row_scale(numbers, columns);
        row.scale = scale;
        row.upper.clear();
        let mut lower_sums = [0; LANES];
        let mut upper_sum = 0;
        let (chunks, rest) = numbers.as_chunks::<LANES>();
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let out = row.lower.iter_mut().flat_map(|line| line.0.as_chunks_mut::<LANES>().0);
        for (index, out) in out.enumerate() {
            let chunk = match chunks.get(index) {
                Some(chunk) => chunk,
                None if index == chunks.len() => &last,
                None => &[0.0; LANES],
            };
            let quantised = quantise(chunk, columns.chunk(index * LANES), by);
            let mut upper = [0; LANES];
            let mut any = 0;
            for lane in 0..LANES {
                // Both from -128 to 127: the lower one to the nearest multiple of 256.
                let number = quantised[lane];
                out[lane] = number as u8;
                lower_sums[lane] += i32::from(number as i8);
                upper[lane] = (number + 128) >> 8;
                any |= upper[lane];
            }
            if any == 0 {
                continue;
            }
            for (group, bytes) in upper.as_chunks::<GROUP>().0.iter().enumerate() {
                if *bytes != [0; GROUP] {
                    let group = index * (LANES / GROUP) + group;
                    let line = group / LANES * PAIR_LINES + group % LANES;
                    let bytes = bytes.map(|byte| byte as i8);
                    row.upper.push(UpperGroup { line: line as u32, bytes });
                    upper_sum += bytes.into_iter().map(i32::from).sum::<i32>();
                }
            }
        }
        row.lower_sum = lower_sums.into_iter().sum();
        row.upper_sum = upper_sum;
    }
}

/// `out = x * w`: `(num_rows, in_features) -> (num_rows, out_features)`. Only where `cpu` has the instructions.
pub(super) fn matmul(
    (cpu, rows): (&Cpu, &mut ByteRows),
    (x, num_rows): (Rows<'_>, usize),
    (w, in_features): (&Int8Panels, usize),
    (out, finish): (SharedRows<'_>, Finish<'_>),
) {
    let x = rows.fill(cpu, (x, num_rows), (w, in_features));
    let num_pairs = out.width().div_ceil(PAIR_OUTPUTS);
    let num_row_pieces = num_rows.div_ceil(PIECE_ROWS);
    let num_pair_pieces = num_pairs.div_ceil(PIECE_PAIRS);
    let work = num_rows * in_features * out.width();
    cpu.threads.share(num_row_pieces * num_pair_pieces, work, |piece| {
        let first_row = piece % num_row_pieces * PIECE_ROWS;
        let first_pair = piece / num_row_pieces * PIECE_PAIRS;
        let rows = first_row..(first_row + PIECE_ROWS).min(num_rows);
        let pairs = first_pair..(first_pair + PIECE_PAIRS).min(num_pairs);
        #[expect(unsafe_code, reason = "calls into a function compiled for more than the baseline")]
        // SAFETY: the caller has seen that the machine has these instructions, and no other piece has these rows and columns.
        unsafe {
            multiply(x, rows, (w, pairs), (out, finish));
        }
    });
}

/// # Safety
/// The machine must have these instructions; nobody else may touch those rows and columns of `out`.
#[expect(unsafe_code, reason = "vector instructions")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn multiply(
    x: &[ByteRow],
    rows: Range<usize>,
    (w, pairs): (&Int8Panels, Range<usize>),
    to: (SharedRows<'_>, Finish<'_>),
) {
    for pair in pairs {
        let mut row = rows.start;
        while row < rows.end {
            // SAFETY: the caller answers for it.
            row += unsafe {
                match rows.end - row {
                    12.. => multiply_rows::<12>(x, row, (w, pair), to),
                    8.. => multiply_rows::<8>(x, row, (w, pair), to),
                    4.. => multiply_rows::<4>(x, row, (w, pair), to),
                    2.. => multiply_rows::<2>(x, row, (w, pair), to),
                    _ => multiply_rows::<1>(x, row, (w, pair), to),
                }
            };
        }
    }
}

/// Multiplies `R` rows with a pair of panels, and says how many rows that were.
///
/// # Safety
/// As [`multiply`].
#[expect(unsafe_code, reason = "vector instructions, on memory whose length is checked once")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn multiply_rows<const R: usize>(
    x: &[ByteRow],
    row: usize,
    (w, pair): (&Int8Panels, usize),
    (out, finish): (SharedRows<'_>, Finish<'_>),
) -> usize {
    let x: &[ByteRow; R] = x[row..].first_chunk().expect("rows of the left-hand side");
    let lines = &w.lines[pair * w.pair_lines()..][..w.k_tiles * PAIR_LINES];
    let mut bytes = [std::ptr::null(); R];
    let mut lower = [[_mm512_setzero_si512(); 2]; R];
    for r in 0..R {
        assert!(x[r].lower.len() * PAIR_LINES == lines.len(), "inputs of a row");
        bytes[r] = x[r].lower.as_ptr().cast::<i32>();
        lower[r] = [_mm512_set1_epi32(x[r].lower_sum.wrapping_mul(-128)); 2];
    }
    // Weights in the order of memory, which is read twice as fast so.
    for tile in 0..w.k_tiles {
        for p in 0..2 {
            for group in 0..LANES {
                // SAFETY: a tile has 16 lines of either panel, and a row a line for each tile (asserted).
                unsafe {
                    let line = lines.as_ptr().add(tile * PAIR_LINES + p * LANES + group);
                    let weights = without_sign(line);
                    for r in 0..R {
                        let inputs = _mm512_set1_epi32(*bytes[r].add(tile * LANES + group));
                        lower[r][p] = _mm512_dpbusd_epi32(lower[r][p], weights, inputs);
                    }
                }
            }
        }
    }
    for r in 0..R {
        // SAFETY: groups are those of a row as long as the matrix is wide; the caller answers for the output.
        unsafe {
            let upper = multiply_upper(&x[r], lines);
            for p in 0..2 {
                let column = pair * PAIR_OUTPUTS + p * LANES;
                if column < out.width() {
                    let sum = join(upper[p], lower[r][p]);
                    let scales = Avx512::load(&w.scales(2 * pair + p));
                    let mut sums = Lanes::ZERO;
                    sum.mul(Avx512::splat(x[r].scale)).mul(scales).store(&mut sums);
                    finish.write(out, row + r, column, &sums);
                }
            }
        }
    }
    R
}

/// The sums of a row's upper bytes with a pair of panels.
///
/// # Safety
/// As [`multiply`].
#[expect(unsafe_code, reason = "vector instructions")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn multiply_upper(x: &ByteRow, lines: &[Line]) -> [__m512i; 2] {
    // Of two groups at a time: a sum waits for the one before it.
    let mut sums = [[_mm512_setzero_si512(); 2]; 2];
    sums[0] = [_mm512_set1_epi32(x.upper_sum.wrapping_mul(-128)); 2];
    let (twos, one) = x.upper.as_chunks::<2>();
    let add = |sums: &mut [__m512i; 2], group: &UpperGroup| {
        let lines: &[Line] = &lines[group.line as usize..][..=LANES];
        // SAFETY: both lines are there.
        unsafe {
            let inputs = _mm512_set1_epi32(std::mem::transmute::<[i8; GROUP], i32>(group.bytes));
            sums[0] = _mm512_dpbusd_epi32(sums[0], without_sign(&raw const lines[0]), inputs);
            sums[1] = _mm512_dpbusd_epi32(sums[1], without_sign(&raw const lines[LANES]), inputs);
        }
    };
    for [first, second] in twos {
        add(&mut sums[0], first);
        add(&mut sums[1], second);
    }
    for group in one {
        add(&mut sums[0], group);
    }
    let [first, second] = sums;
    [_mm512_add_epi32(first[0], second[0]), _mm512_add_epi32(first[1], second[1])]
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

/// `256 * upper + lower`, as [`Vector::join`] has it.
#[expect(unsafe_code, reason = "vector instructions")]
#[inline]
#[target_feature(enable = "avx512f")]
fn join(upper: __m512i, lower: __m512i) -> Avx512 {
    let mut bits = [Lanes::ZERO; 2];
    for (sums, bits) in [upper, lower].into_iter().zip(&mut bits) {
        // SAFETY: 16 numbers of 32 bits, aligned to 64 bytes.
        unsafe { _mm512_store_si512(bits.0.as_mut_ptr().cast(), sums) };
    }
    Avx512::join(&bits[0], &bits[1])
}
