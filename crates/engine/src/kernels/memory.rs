//! Memory that begins as zeros and takes room where it is written first, for weights and the KV cache.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// Numbers of which any bytes are some: so a mapping of zeros holds them.
///
/// # Safety
/// Every pattern of bits must be a value, and the alignment at most a page's.
#[expect(unsafe_code, reason = "promises something of every implementation")]
pub(crate) unsafe trait Plain: Copy + Send + Sync {}

/// So many numbers, all zero at first.
#[derive(Debug)]
pub(crate) struct Zeroed<T> {
    memory: MmapMut,
    holds: PhantomData<T>,
}

impl<T: Plain> Zeroed<T> {
    /// Memory that is read and written here and there.
    pub(crate) fn new(len: usize) -> std::io::Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self { memory: MmapMut::map_anon(bytes.max(1))?, holds: PhantomData })
    }

    /// Memory that is read from end to end: in pages of 2 MiB where the system gives them, which spares
    /// the processor a look into its tables every 4 KiB.
    pub(crate) fn new_streamed(len: usize) -> std::io::Result<Self> {
        let zeroed = Self::new(len)?;
        // Small pages will do as well.
        #[cfg(target_os = "linux")]
        let _refused = zeroed.memory.advise(memmap2::Advice::HugePage);
        Ok(zeroed)
    }
}

impl<T: Plain> Deref for Zeroed<T> {
    type Target = [T];

    #[expect(unsafe_code, reason = "bytes of a mapping as numbers")]
    fn deref(&self) -> &[T] {
        // SAFETY: any bytes are valid numbers; a mapping begins at a page, so nothing is cut off in front.
        let (_, numbers, _) = unsafe { self.memory.align_to() };
        numbers
    }
}

impl<T: Plain> DerefMut for Zeroed<T> {
    #[expect(unsafe_code, reason = "bytes of a mapping as numbers")]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and any numbers are valid bytes.
        let (_, numbers, _) = unsafe { self.memory.align_to_mut() };
        numbers
    }
}
