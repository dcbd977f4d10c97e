//! What this machine can do at most, measured: how fast its memory is read, how fast it multiplies.
//!
//! The reading is a plain sum; the multiplying is the engine's own linear layer on a product that stays in the
//! cache. `flotilla bench engine` holds a model's speed against both.

use std::time::{Duration, Instant};

use memmap2::MmapMut;

use crate::Error;
#[cfg(feature = "cuda")]
use crate::cuda::limits_of;
use crate::gpu::{Gpu, GpuId};
use crate::kernels::{
    Activations, Cpu, Epilogue, Kernel, LANES, Lanes, Linear, PackedMatrix, RowSource, Simd,
    Stored as _, Threads, Vector, matmul,
};
use crate::memory::available_memory;
use crate::quant::BlockFormat;
use crate::weights::Format;

/// Bytes that are read, unless memory is short: more than caches hold.
const READ_BYTES: u64 = 1 << 30;
/// Bytes that a thread reads at a time.
const PIECE_BYTES: usize = 1 << 22;
/// Passes over them; the fastest counts.
const NUM_PASSES: usize = 6;
/// The product that stays in the cache: rows of activations, inputs, outputs.
const PRODUCT: [usize; 3] = [256, 2048, 512];
/// How long a product is repeated; the fastest counts.
const PRODUCT_TIME: Duration = Duration::from_millis(250);
/// What the weights of the product are kept in; the fastest counts.
const FORMATS: [Format; 4] =
    [Format::F32, Format::Bf16, Format::Int8, Format::Block(BlockFormat::Q8_0)];

/// What a machine does at most with a number of threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MachineLimits {
    /// Bytes of memory read in a second.
    pub read_bytes_per_second: f64,
    /// Multiplications and additions in a second.
    pub operations_per_second: f64,
    /// Format of the weights that they were measured with.
    pub fastest_format: Format,
}

impl MachineLimits {
    /// Measures those of a GPU, in 16 bits.
    pub fn of_gpu(id: GpuId) -> Result<Self, Error> {
        let (read_bytes_per_second, operations_per_second) = limits_of(&Gpu::find(id)?)?;
        let fastest_format = Format::Bf16;
        Ok(Self { read_bytes_per_second, operations_per_second, fastest_format })
    }

    /// Measures them; takes a second or two, and a GiB of memory for that time.
    pub fn measure(threads: usize) -> Result<Self, Error> {
        let cpu = Cpu::new(Simd::detect(), Threads::new(threads)?);
        let mut limits = Self {
            read_bytes_per_second: read_rate(&cpu)?,
            operations_per_second: 0.0,
            fastest_format: FORMATS[0],
        };
        for format in FORMATS {
            let rate = product_rate(&cpu, format)?;
            if rate > limits.operations_per_second {
                limits = Self { operations_per_second: rate, fastest_format: format, ..limits };
            }
        }
        Ok(limits)
    }
}

/// Without the feature there is no GPU to be found.
#[cfg(not(feature = "cuda"))]
fn limits_of(gpu: &Gpu) -> Result<(f64, f64), Error> {
    Err(Error::Device(format!("{} cannot be used by this program", gpu.name)))
}

/// Multiplications and additions a second of a linear layer in the cache.
fn product_rate(cpu: &Cpu, format: Format) -> Result<f64, Error> {
    let [num_rows, in_features, out_features] = PRODUCT;
    let numbers: Vec<f32> = (0..in_features).map(|k| (k % 17) as f32 / 16.0 - 0.5).collect();
    let write = |_row: usize, bytes: &mut [u8]| format.given().encode(&numbers, bytes);
    let source = RowSource { format, num_rows: out_features, write: &write };
    let weight = PackedMatrix::pack(cpu, in_features, &[source])?;
    let linear = Linear { weight, bias: None };
    let mut x = Activations::new(num_rows, in_features);
    (0..num_rows).for_each(|row| x.row_mut(row).copy_from_slice(&numbers));
    let mut out = Activations::new(num_rows, out_features);
    let fastest = cpu.threads.step(|| {
        let start = Instant::now();
        let mut fastest = Duration::MAX;
        while start.elapsed() < PRODUCT_TIME {
            let start = Instant::now();
            matmul(cpu, (x.rows(), num_rows), &linear, (out.shared(), Epilogue::Store));
            fastest = fastest.min(start.elapsed());
        }
        fastest
    });
    Ok(2.0 * PRODUCT.iter().product::<usize>() as f64 / fastest.as_secs_f64())
}

/// Bytes a second of reading much memory from its start to its end.
fn read_rate(cpu: &Cpu) -> Result<f64, Error> {
    let quarter = available_memory().map_or(READ_BYTES, |bytes| bytes / 4);
    let num_bytes = READ_BYTES.min(quarter).max(PIECE_BYTES as u64) as usize;
    let mut memory = MmapMut::map_anon(num_bytes)
        .map_err(|error| Error::OutOfMemory(format!("no room to measure memory in: {error}")))?;
    // As fast as memory gets; where the system has no large pages, it is measured without.
    #[cfg(target_os = "linux")]
    let _without = memory.advise(memmap2::Advice::HugePage);
    // Written by the threads that read it, so that no page is the shared one of zeros.
    cpu.threads.share_chunks(&mut memory, PIECE_BYTES, |_, (): &mut (), bytes| bytes.fill(1));
    let lanes = lanes_of(&memory);
    let num_pieces = num_bytes.div_ceil(PIECE_BYTES);
    let piece_len = PIECE_BYTES / size_of::<Lanes>();
    let fastest = cpu.threads.step(|| {
        let pass = |_| {
            let start = Instant::now();
            cpu.threads.share(num_pieces, num_bytes, |piece| {
                let first = piece * piece_len;
                let lanes = &lanes[first..(first + piece_len).min(lanes.len())];
                let mut sum = Lanes::ZERO;
                cpu.simd.run(Sum { lanes, sum: &mut sum });
                std::hint::black_box(&sum);
            });
            start.elapsed()
        };
        (0..NUM_PASSES).map(pass).min().unwrap_or_default()
    });
    Ok(num_bytes as f64 / fastest.as_secs_f64())
}

#[expect(unsafe_code, reason = "bytes of a mapping as vectors")]
fn lanes_of(memory: &MmapMut) -> &[Lanes] {
    // SAFETY: any bytes are valid numbers; a mapping begins at a page, so nothing is cut off in front.
    let (_, lanes, _) = unsafe { memory.align_to() };
    lanes
}

/// Adds up vectors.
struct Sum<'a> {
    lanes: &'a [Lanes],
    sum: &'a mut Lanes,
}

impl Kernel for Sum<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        // Several sums, so that none waits for the one before.
        let mut sums = [V::zero(); 8];
        for lanes in self.lanes.as_chunks::<8>().0 {
            for (sum, lanes) in sums.iter_mut().zip(lanes) {
                *sum = sum.fma(1.0, lanes.load());
            }
        }
        sums.into_iter().fold(V::zero(), |all, sum| all.fma(1.0, sum)).store(self.sum);
    }
}

const _: () = assert!(
    PIECE_BYTES.is_multiple_of(size_of::<[Lanes; 8]>()) && PRODUCT[1].is_multiple_of(LANES)
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vector_is_summed() {
        let lanes = [Lanes([0.5; LANES]); 40];
        for simd in Simd::available() {
            let mut sum = Lanes::ZERO;
            simd.run(Sum { lanes: &lanes, sum: &mut sum });
            assert_eq!(sum.0, [20.0; LANES], "{}", simd.name());
        }
    }
}
