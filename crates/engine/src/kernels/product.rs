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

/// `out[rows, 16 * panels] = x[rows, k] * w[panels]`.
///
/// Whoever runs it must be the only one to touch those rows and columns of `out`.
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
    fn run<V: Vector>(self) {
        let max_rows = if V::WIDE { 8 } else { 6 };
        let mut row = self.rows.start;
        while row < self.rows.end {
            let num_rows = (self.rows.end - row).min(max_rows);
            // Rows by panels of a tile: as many sums as registers hold, enough of them to hide the
            // latency of an addition.
            match (V::WIDE, num_rows) {
                (_, 1) => self.block::<V, 1, 4>(row),
                (true, 2) => self.block::<V, 2, 4>(row),
                (true, 3) => self.block::<V, 3, 4>(row),
                (true, 4) => self.block::<V, 4, 4>(row),
                (true, 5) => self.block::<V, 5, 2>(row),
                (true, 6) => self.block::<V, 6, 2>(row),
                (true, 7) => self.block::<V, 7, 2>(row),
                (true, _) => self.block::<V, 8, 2>(row),
                (false, 2) => self.block::<V, 2, 2>(row),
                (false, 3) => self.block::<V, 3, 2>(row),
                (false, 4) => self.block::<V, 4, 1>(row),
                (false, 5) => self.block::<V, 5, 1>(row),
                (false, _) => self.block::<V, 6, 1>(row),
            }
            row += num_rows;
        }
    }
}

impl<W: Operand> Product<'_, W> {
    /// `R` rows by all panels, `P` at a time.
    #[inline(always)]
    fn block<V: Vector, const R: usize, const P: usize>(&self, row: usize) {
        let mut panel = self.panels.start;
        while panel + P <= self.panels.end {
            self.tile::<V, R, P>(row, panel);
            panel += P;
        }
        while panel < self.panels.end {
            self.tile::<V, R, 1>(row, panel);
            panel += 1;
        }
    }

    /// `R` rows by `P` panels.
    #[inline(always)]
    fn tile<V: Vector, const R: usize, const P: usize>(&self, row: usize, panel: usize) {
        let mut sums = [[V::zero(); P]; R];
        let mut k = 0;
        for s in 0..self.w.num_segments() {
            let len = self.w.segment(panel, s).len();
            let x: [&[f32]; R] = std::array::from_fn(|r| self.x.slice(row + r, k, len));
            let w: [&[W::Stored]; P] =
                std::array::from_fn(|p| &self.w.segment(panel + p, s)[..len]);
            accumulate(&mut sums, x, w, len);
            k += len;
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (p, sum) in sums.into_iter().enumerate() {
                let mut lanes = Lanes::ZERO;
                sum.store(&mut lanes);
                self.write(row + r, (panel + p) * LANES, &lanes);
            }
        }
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint columns of the same rows")]
    fn write(&self, row: usize, column: usize, sums: &Lanes) {
        let len = LANES.min(self.out.width() - column);
        // SAFETY: the rows and columns of this product are the runner's alone; tiles are disjoint.
        let out = unsafe { self.out.slice_mut(row, column, len) };
        match self.finish {
            Finish::Store => out.copy_from_slice(&sums.0[..len]),
            Finish::Add => {
                for (out, sum) in out.iter_mut().zip(sums.0) {
                    *out += sum;
                }
            }
            Finish::StoreBiased(bias) => {
                for ((out, sum), bias) in out.iter_mut().zip(sums.0).zip(&bias[column..]) {
                    *out = sum + bias;
                }
            }
            Finish::AddBiased(bias) => {
                for ((out, sum), bias) in out.iter_mut().zip(sums.0).zip(&bias[column..]) {
                    *out += sum + bias;
                }
            }
        }
    }
}

/// `sums[r][p] += x[r][k] * w[p][k]` for each `k` in order.
#[inline(always)]
pub(crate) fn accumulate<V: Vector, S: Stored, const R: usize, const P: usize>(
    sums: &mut [[V; P]; R],
    x: [&[f32]; R],
    w: [&[S]; P],
    len: usize,
) {
    let x: [&[f32]; R] = std::array::from_fn(|r| &x[r][..len]);
    let w: [&[S]; P] = std::array::from_fn(|p| &w[p][..len]);
    let mut acc = *sums;
    for k in 0..len {
        let mut columns = [V::zero(); P];
        for p in 0..P {
            columns[p] = w[p][k].load();
        }
        for r in 0..R {
            let x = x[r][k];
            for p in 0..P {
                acc[r][p] = acc[r][p].fma(x, columns[p]);
            }
        }
    }
    *sums = acc;
}
