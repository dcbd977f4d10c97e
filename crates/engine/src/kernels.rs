//! The arithmetic of the CPU backend, in `f32`.
//!
//! Every kernel is written once over [`Vector`] (16 lanes) and instantiated for each instruction set by
//! [`Simd::run`], which picks at run time. Lanes always hold different output elements, a reduction
//! always runs in one fixed order with fused multiply-adds: so the same bits come out of every vector
//! unit, batch, chunk and number of threads. Products with weights of 16 bits or less run on a matrix unit
//! where there is one (`tiles`); its bits are its own, and again the same for every batch, chunk and number
//! of threads. Sums of whole numbers (`int8`) are exact, and the same on all of them. Called by the decoder and attention.

mod activations;
mod blocks;
mod elementwise;
mod int8;
mod lanes;
mod matmul;
mod memory;
mod mlp;
mod packed;
mod product;
mod threads;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::fmt::{Display, Formatter};
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::precision::{UnknownName, find};

pub(crate) use activations::{Activations, Rows, SharedRows};
#[cfg(target_arch = "x86_64")]
use elementwise::Gates;
pub(crate) use elementwise::{
    rms_norm, rms_norm_row, rope_row, softcap, softcap_row, softmax_row, sum_lanes,
};
pub(crate) use int8::Int8Columns;
pub(crate) use lanes::{Bf16Lanes, F16Lanes, I8Lanes, LANES, Lanes, Stored, Vector};
pub(crate) use matmul::{Epilogue, Linear, matmul};
pub(crate) use memory::Zeroed;
pub(crate) use mlp::{Inner, Mlp};
pub(crate) use packed::{PackedMatrix, RowSource, packed_bytes};
pub(crate) use product::{Finish, Operand, Product, Tiled, accumulate, fetch, for_each_tile};
pub(crate) use threads::Threads;

/// Outputs of a pair of panels, whose tiles lie side by side.
const PAIR_OUTPUTS: usize = 2 * LANES;

/// Lines of two tiles: of a pair of panels, or of the two parts of 16 rows.
const PAIR_LINES: usize = 2 * LANES;

/// Memory that is used again: what a thread that panicked leaves is written before it is read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What computes: an instruction set, and threads to share the work.
#[derive(Debug)]
pub(crate) struct Cpu {
    /// The instruction set of every kernel.
    pub(crate) simd: Simd,
    /// The threads.
    pub(crate) threads: Threads,
    /// Left-hand sides of products of whole numbers.
    quantised: int8::Quantised,
    /// What products on the matrix unit need.
    #[cfg(target_arch = "x86_64")]
    tiles: Option<tiles::Tiles>,
}

impl Cpu {
    /// What computes on an instruction set and some threads.
    pub(crate) fn new(simd: Simd, threads: Threads) -> Self {
        Self {
            quantised: int8::Quantised::default(),
            #[cfg(target_arch = "x86_64")]
            tiles: simd.has_matrix_unit().then(|| tiles::Tiles::new(threads.num_threads())),
            simd,
            threads,
        }
    }
}

/// A kernel with its arguments, written for any vector unit.
pub(crate) trait Kernel {
    /// Runs it. Must be `#[inline(always)]`, so that it is compiled with the caller's instruction set.
    fn run<V: Vector>(self);
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simd(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// AVX-512 and the matrix unit.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 with products of bytes.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Simd {
    /// Everything this machine can run, the best first.
    pub fn available() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let has_avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if has_avx2 && tiles::is_available() {
                levels.push(Self(Level::Amx));
            }
            if has_avx2 && is_x86_feature_detected!("avx512f") {
                if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni") {
                    levels.push(Self(Level::Avx512Vnni));
                }
                levels.push(Self(Level::Avx512));
            }
            if has_avx2 {
                levels.push(Self(Level::Avx2));
            }
        }
        levels.push(Self(Level::Portable));
        levels
    }

    /// The best this machine can run.
    pub fn detect() -> Self {
        Self::available()[0]
    }

    /// Its name, on the command line and in logs.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            Level::Portable => "portable",
        }
    }

    /// Whether it has a matrix unit, whose products are rounded in another way.
    pub fn has_matrix_unit(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let has_unit = self.0 == Level::Amx;
        #[cfg(not(target_arch = "x86_64"))]
        let has_unit = false;
        has_unit
    }

    /// Whether it has instructions for products of bytes.
    #[cfg(target_arch = "x86_64")]
    fn multiplies_bytes(self) -> bool {
        self.0 == Level::Avx512Vnni
    }

    /// Runs a kernel compiled for this instruction set.
    #[expect(unsafe_code, reason = "calls into functions compiled for more than the baseline")]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self.0 {
            // SAFETY: `available` makes these levels only where avx512f, avx2, fma and f16c were detected.
            #[cfg(target_arch = "x86_64")]
            Level::Amx | Level::Avx512Vnni | Level::Avx512 => unsafe { run_avx512(kernel) },
            // SAFETY: `available` makes this level only where avx2, fma and f16c were detected.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { run_avx2(kernel) },
            Level::Portable => kernel.run::<Lanes>(),
        }
    }
}

impl FromStr for Simd {
    type Err = UnknownName;

    /// One of those that this machine has.
    fn from_str(text: &str) -> Result<Self, UnknownName> {
        find(&Self::available(), Self::name, text)
    }
}

impl Display for Simd {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// For what stands beside tiles; everything else is not compiled once more.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")]
fn run_amx<K: Kernel>(kernel: K) {
    kernel.run::<lanes::Avx512>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn run_avx512<K: Kernel>(kernel: K) {
    kernel.run::<lanes::Avx512>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(kernel: K) {
    kernel.run::<lanes::Avx2>();
}
