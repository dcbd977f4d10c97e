//! The one inner loop: rows times panels of 16 columns, summed over `k` in order.
//!
//! The linear layers, the scores of attention and its weighted sum of values are all this product
//! over different memory ([`Operand`]).

use std::ops::Range;

use super::lanes::Stored;
use super::{Kernel, LANES, Lanes, Rows, SharedRows, Vector};

/// The right-hand side of a product: panels of 16 columns, `k` long, in one or several segments.
pub(crate) trait Operand: Copy {
    /// Memory of 16 columns at one `k`.
    type Stored: Stored;

    /// Segments of each panel, in the order of `k`.
    fn num_segments(&self) -> usize;

    /// One segment of a panel. Segment `s` begins at `k = s * segment_len`.
    fn segment(&self, panel: usize, segment: usize) -> &[Self::Stored];

    /// Called before a panel is read: has fetched what is read soon.
    #[inline(always)]
    fn fetch_ahead(&self, _panel: usize) {}
}

/// Has memory fetched: into the nearest cache, or the one behind it.
#[inline(always)]
#[expect(unsafe_code, reason = "a hint to the processor")]
pub(crate) fn fetch<S, const NEAREST: bool>(data: &[S]) {
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(data)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        let at = data.as_ptr().cast::<i8>().wrapping_add(line);
        // SAFETY: a prefetch reads nothing, whatever the address.
        unsafe {
            if NEAREST { _mm_prefetch::<_MM_HINT_T0>(at) } else { _mm_prefetch::<_MM_HINT_T1>(at) }
        }
    }
}

/// What happens to a sum before it is written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Finish<'a> {
    /// It replaces what was there.
    Store,
    /// It is added to what was there.
    Add,
    /// The bias of its column is added, then it replaces what was there.
    StoreBiased(&'a [f32]),
    /// The bias of its column is added, then what was there.
    AddBiased(&'a [f32]),
}

impl<'a> Finish<'a> {
    /// The same for the columns from `first` on.
    pub(crate) fn at_column(self, first: usize) -> Self {
        match self {
            Self::Store | Self::Add => self,
            Self::StoreBiased(bias) => Self::StoreBiased(&bias[first..]),
            Self::AddBiased(bias) => Self::AddBiased(&bias[first..]),
        }
    }

    /// Writes the sums of 16 columns, as many of them as there are.
    ///
    /// # Safety
    /// Nobody else may hold these columns of this row meanwhile.
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint columns of the same rows")]
    pub(crate) unsafe fn write(self, out: SharedRows<'_>, row: usize, column: usize, sums: &Lanes) {
        let len = LANES.min(out.width() - column);
        // SAFETY: the caller answers for it.
        let out = unsafe { out.slice_mut(row, column, len) };
        // A length that the compiler knows spares a call for each vector.
        match out.first_chunk_mut::<LANES>() {
            Some(out) => self.put(out, column, &sums.0),
            None => self.put(out, column, &sums.0[..len]),
        }
    }

    #[inline(always)]
    fn put(self, out: &mut [f32], column: usize, sums: &[f32]) {
        match self {
            Self::Store => out.copy_from_slice(sums),
            Self::Add => {
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out += sum;
                }
            }
            Self::StoreBiased(bias) => {
                let bias = &bias[column..][..sums.len()];
                for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
                    *out = sum + bias;
                }
            }
            Self::AddBiased(bias) => {
                let bias = &bias[column..][..sums.len()];
                for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
                    *out += sum + bias;
                }
            }
        }
    }
}

/// Something that is computed in tiles of some rows by some panels.
pub(crate) trait Tiled {
    /// Computes `R` rows by `P` panels.
    fn tile<V: Vector, const R: usize, const P: usize>(&mut self, row: usize, panel: usize);
}

/// Computes all tiles: as many sums at a time as registers hold, enough of them to hide the latency of
/// an addition.
#[inline(always)]
pub(crate) fn for_each_tile<V: Vector>(
    tiled: &mut impl Tiled,
    rows: Range<usize>,
    panels: Range<usize>,
) {
    let mut row = rows.start;
    while row < rows.end {
        let num_rows = (rows.end - row).min(V::MAX_ROWS);
        let panels = panels.clone();
        match (V::MAX_ROWS, num_rows) {
            (1, _) => tile_row::<V, 1, 1>(tiled, row, panels),
            (_, 1) => tile_row::<V, 1, 4>(tiled, row, panels),
            (8, 2) => tile_row::<V, 2, 4>(tiled, row, panels),
            (8, 3) => tile_row::<V, 3, 4>(tiled, row, panels),
            (8, 4) => tile_row::<V, 4, 4>(tiled, row, panels),
            (8, 5) => tile_row::<V, 5, 2>(tiled, row, panels),
            (8, 6) => tile_row::<V, 6, 2>(tiled, row, panels),
            (8, 7) => tile_row::<V, 7, 2>(tiled, row, panels),
            (8, _) => tile_row::<V, 8, 2>(tiled, row, panels),
            (_, 2) => tile_row::<V, 2, 2>(tiled, row, panels),
            (_, 3) => tile_row::<V, 3, 2>(tiled, row, panels),
            (_, 4) => tile_row::<V, 4, 1>(tiled, row, panels),
            (_, 5) => tile_row::<V, 5, 1>(tiled, row, panels),
            (_, _) => tile_row::<V, 6, 1>(tiled, row, panels),
        }
        row += num_rows;
    }
}

/// `R` rows by all panels, `P` at a time.
#[inline(always)]
fn tile_row<V: Vector, const R: usize, const P: usize>(
    tiled: &mut impl Tiled,
    row: usize,
    panels: Range<usize>,
) {
    let mut panel = panels.start;
    while panel + P <= panels.end {
        tiled.tile::<V, R, P>(row, panel);
        panel += P;
    }
    while panel < panels.end {
        tiled.tile::<V, R, 1>(row, panel);
        panel += 1;
    }
}

/// `out[rows, 16 * panels] = x[rows, k] * w[panels]`.
///
/// Whoever runs it must be the only one to touch those rows and columns of `out`.
#[derive(Clone)]
pub(crate) struct Product<'a, W> {
    /// The left-hand side.
    pub(crate) x: Rows<'a>,
    /// Rows of it, and of the output.
    pub(crate) rows: Range<usize>,
    /// The right-hand side.
    pub(crate) w: W,
    /// Panels of it.
    pub(crate) panels: Range<usize>,
    /// The output.
    pub(crate) out: SharedRows<'a>,
    /// How results are written.
    pub(crate) finish: Finish<'a>,
}

impl<W: Operand> Kernel for Product<'_, W> {
    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let (rows, panels) = (self.rows.clone(), self.panels.clone());
        for_each_tile::<V>(&mut self, rows, panels);
    }
}

impl<W: Operand> Tiled for Product<'_, W> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint columns of the same rows")]
    #[expect(clippy::needless_range_loop, reason = "closures are not inlined into large functions")]
    fn tile<V: Vector, const R: usize, const P: usize>(&mut self, row: usize, panel: usize) {
        let mut sums = [[V::zero(); P]; R];
        let mut k = 0;
        for p in 0..P {
            self.w.fetch_ahead(panel + p);
        }
        for s in 0..self.w.num_segments() {
            let len = self.w.segment(panel, s).len();
            let mut x: [&[f32]; R] = [&[]; R];
            for r in 0..R {
                x[r] = self.x.slice(row + r, k, len);
            }
            let mut w: [&[W::Stored]; P] = [&[]; P];
            for p in 0..P {
                w[p] = self.w.segment(panel + p, s);
            }
            accumulate(&mut sums, x, w, len);
            k += len;
        }
        for r in 0..R {
            for p in 0..P {
                let mut lanes = Lanes::ZERO;
                sums[r][p].store(&mut lanes);
                // SAFETY: the rows and columns of this product are the runner's alone; tiles are disjoint.
                unsafe { self.finish.write(self.out, row + r, (panel + p) * LANES, &lanes) };
            }
        }
    }
}

/// `sums[r][p] += x[r][k] * w[p][k]` for each `k < len` in order.
#[inline(always)]
#[expect(unsafe_code, reason = "a check of each load takes as long as the load")]
pub(crate) fn accumulate<V: Vector, S: Stored, const R: usize, const P: usize>(
    sums: &mut [[V; P]; R],
    x: [&[f32]; R],
    w: [&[S]; P],
    len: usize,
) {
    // Plain loops: what takes closures is not inlined into functions of this size.
    let mut is_inside = true;
    let (mut x_at, mut w_at) = ([std::ptr::null(); R], [std::ptr::null(); P]);
    for r in 0..R {
        is_inside &= len <= x[r].len();
        x_at[r] = x[r].as_ptr();
    }
    for p in 0..P {
        is_inside &= len <= w[p].len();
        w_at[p] = w[p].as_ptr();
    }
    assert!(is_inside, "{len} products of less");
    let mut acc = *sums;
    for k in 0..len {
        let mut columns = [V::zero(); P];
        for p in 0..P {
            // SAFETY: `k` is less than the length of each slice (asserted).
            columns[p] = unsafe { (*w_at[p].add(k)).load() };
        }
        for r in 0..R {
            // SAFETY: as above.
            let x = unsafe { *x_at[r].add(k) };
            for p in 0..P {
                acc[r][p] = acc[r][p].fma(x, columns[p]);
            }
        }
    }
    *sums = acc;
}
