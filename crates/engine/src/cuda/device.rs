//! What is asked of a GPU: memory, copies, launches of kernels, products of matrices.
//!
//! Everything that is asked runs in the order in which it is asked for, after the call has returned; a download waits.

use std::fmt::Debug;
use std::sync::Arc;

use crate::Error;
use crate::precision::KvCacheDtype;

/// An address in a device's memory.
pub(super) type Address = u64;

/// A GPU with the kernels of one model.
pub(super) trait Device: Debug + Send + Sync {
    /// Takes memory, 256 bytes aligned. What is in it is not defined.
    fn allocate(&self, num_bytes: usize) -> Result<Address, Error>;

    /// Gives memory back.
    fn release(&self, address: Address);

    /// Memory that could still be taken, and all of it.
    fn memory(&self) -> Result<(u64, u64), Error>;

    /// Copies to the device. The bytes may change once the call has returned.
    fn upload(&self, bytes: &[u8], to: Address) -> Result<(), Error>;

    /// Copies from the device, once all that was asked for before is done.
    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), Error>;

    /// Copies within the device.
    fn copy(&self, from: Address, to: Address, num_bytes: usize) -> Result<(), Error>;

    /// Runs a kernel.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error>;

    /// Multiplies.
    fn multiply(&self, product: &Product) -> Result<(), Error>;

    /// Notes the launches and products that `work` asks for as a graph, without running them.
    fn record(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<GraphId, Error>;

    /// Runs a graph: what was noted, with the same addresses and numbers.
    fn replay(&self, graph: GraphId) -> Result<(), Error>;

    /// Gives all graphs back.
    fn forget_graphs(&self);
}

/// A graph of a device, by the place in which it was recorded.
pub(super) type GraphId = usize;

/// A kernel with what it runs on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch<'a> {
    pub(super) kernel: &'static str,
    /// Blocks, `(x, y)`.
    pub(super) grid: (usize, usize),
    /// Threads of a block: whole warps.
    pub(super) num_threads: usize,
    /// Shared memory of a block beside that which the kernel declares.
    pub(super) shared_bytes: usize,
    pub(super) arguments: &'a [Argument],
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Argument {
    Address(Address),
    Int(i32),
    Float(f32),
}

/// `out = x weight^T`, all of them row by row, in the model's 16-bit type and summed in f32.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    /// `(num_rows, in_features)`
    pub(super) x: Address,
    /// `(out_features, in_features)`
    pub(super) weight: Address,
    /// `(num_rows, out_features)`
    pub(super) out: Address,
    pub(super) num_rows: usize,
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    /// Whether `out` is f32.
    pub(super) wide: bool,
}

/// The 16-bit type that a model is computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Half {
    Bf16,
    Fp16,
}

impl Half {
    /// Keys and values are kept in it, too.
    pub(super) fn kv_cache_dtype(self) -> KvCacheDtype {
        match self {
            Self::Bf16 => KvCacheDtype::Bf16,
            Self::Fp16 => KvCacheDtype::Fp16,
        }
    }
}

/// Memory of a device, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Memory {
    device: Arc<dyn Device>,
    address: Address,
    num_bytes: usize,
}

impl Memory {
    /// Takes memory.
    pub(super) fn new(device: &Arc<dyn Device>, num_bytes: usize) -> Result<Self, Error> {
        let address = device.allocate(num_bytes.max(1))?;
        Ok(Self { device: Arc::clone(device), address, num_bytes })
    }

    /// Where it begins.
    pub(super) fn address(&self) -> Address {
        self.address
    }

    /// How much it is.
    pub(super) fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Fills it from its beginning.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        self.write_at(0, bytes)
    }

    /// Fills it from `offset` on.
    pub(super) fn write_at(&self, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        assert!(offset + bytes.len() <= self.num_bytes, "a write behind the end of memory");
        self.device.upload(bytes, self.address + offset as u64)
    }

    /// Reads its first bytes.
    pub(super) fn read(&self, bytes: &mut [u8]) -> Result<(), Error> {
        assert!(bytes.len() <= self.num_bytes, "a read behind the end of memory");
        self.device.download(self.address, bytes)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.device.release(self.address);
    }
}
