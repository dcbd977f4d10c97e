//! Row-major matrices of activations: owned, read and written from several threads.

use std::marker::PhantomData;

use super::{LANES, Lanes};

/// Numbers between the ends of rows: rows whose width is a power of two would otherwise share cache sets.
const ROW_PADDING: usize = LANES;

/// A matrix of activations, `(num_rows, width)`. Made once and reused step after step. Rows begin with a cache line, so
/// that no vector lies across two.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    lanes: Vec<Lanes>,
    width: usize,
    /// Numbers from a row to the next, whole lanes.
    stride: usize,
}

impl Activations {
    /// A matrix of zeros.
    pub(crate) fn new(num_rows: usize, width: usize) -> Self {
        let stride = width.next_multiple_of(LANES) + ROW_PADDING;
        Self { lanes: vec![Lanes::ZERO; num_rows * stride / LANES], width, stride }
    }

    /// Grows to `num_rows` at least; what was in it is undefined afterwards.
    pub(crate) fn ensure_rows(&mut self, num_rows: usize) {
        let num_lanes = num_rows * self.stride / LANES;
        if self.lanes.len() < num_lanes {
            self.lanes.resize(num_lanes, Lanes::ZERO);
        }
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "lanes as numbers")]
    fn data(&self) -> &[f32] {
        // SAFETY: lanes are numbers without gaps.
        unsafe { std::slice::from_raw_parts(self.lanes.as_ptr().cast(), self.lanes.len() * LANES) }
    }

    #[inline(always)]
    #[expect(unsafe_code, reason = "lanes as numbers")]
    fn data_mut(&mut self) -> &mut [f32] {
        let len = self.lanes.len() * LANES;
        // SAFETY: lanes are numbers without gaps.
        unsafe { std::slice::from_raw_parts_mut(self.lanes.as_mut_ptr().cast(), len) }
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.data()[row * self.stride..][..self.width]
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let (width, stride) = (self.width, self.stride);
        &mut self.data_mut()[row * stride..][..width]
    }

    /// The rows from `first` on, to read.
    pub(crate) fn rows_from(&self, first: usize) -> Rows<'_> {
        Rows { data: &self.data()[first * self.stride..], stride: self.stride }
    }

    /// All rows, to read.
    pub(crate) fn rows(&self) -> Rows<'_> {
        self.rows_from(0)
    }

    /// The rows from `first` on, to write from several threads.
    pub(crate) fn shared_from(&mut self, first: usize) -> SharedRows<'_> {
        let (width, stride) = (self.width, self.stride);
        SharedRows::new(&mut self.data_mut()[first * stride..], width, stride)
    }

    /// All rows, to write from several threads.
    pub(crate) fn shared(&mut self) -> SharedRows<'_> {
        self.shared_from(0)
    }
}

/// Rows that are read: `stride` numbers from one to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(data: &'a [f32], stride: usize) -> Self {
        Self { data, stride }
    }

    /// `len` numbers of a row, from column `start` on.
    #[inline(always)]
    pub(crate) fn slice(&self, row: usize, start: usize, len: usize) -> &'a [f32] {
        &self.data[row * self.stride + start..][..len]
    }
}

/// Rows that several threads write at once, each its own part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SharedRows<'a> {
    data: *mut f32,
    len: usize,
    width: usize,
    stride: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

#[expect(unsafe_code, reason = "several threads write disjoint columns of the same rows")]
// SAFETY: the memory is borrowed exclusively for `'a`; who takes a part answers for there being no other.
unsafe impl Send for SharedRows<'_> {}

#[expect(unsafe_code, reason = "several threads write disjoint columns of the same rows")]
// SAFETY: as for `Send`.
unsafe impl Sync for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    pub(crate) fn new(data: &'a mut [f32], width: usize, stride: usize) -> Self {
        assert!(width <= stride, "rows of {width} don't fit a stride of {stride}");
        Self { data: data.as_mut_ptr(), len: data.len(), width, stride, borrowed: PhantomData }
    }

    /// Numbers in a row.
    #[inline(always)]
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// The columns from `first` on, `width` of them.
    pub(crate) fn columns(self, first: usize, width: usize) -> Self {
        assert!(first + width <= self.width, "outside of the rows");
        let len = self.len.saturating_sub(first);
        Self { data: self.data.wrapping_add(first), len, width, ..self }
    }

    /// `len` numbers of a row, from column `start` on.
    ///
    /// # Safety
    /// Nobody else may hold any of these numbers meanwhile.
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint columns of the same rows")]
    pub(crate) unsafe fn slice_mut(&self, row: usize, start: usize, len: usize) -> &'a mut [f32] {
        let offset = row * self.stride + start;
        assert!(start + len <= self.width && offset + len <= self.len, "outside of the rows");
        // SAFETY: inside the borrowed memory (asserted); the caller answers for exclusiveness.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(offset), len) }
    }
}
