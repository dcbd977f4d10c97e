//! The runner on a GPU: the decoder as kernels of our own and products of cuBLAS.
//!
//! What runs on the device is CUDA C++ (`crates/engine/cuda`), compiled for one model's shape when the model is
//! loaded. The host's half is written against [`device::Device`], of which there are two: a real GPU through the driver
//! (`driver`, with the feature `cuda`), and in tests the emulator, which runs the very same kernels on a processor.

mod backend;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(test)]
mod emulator;
mod forward;
mod kernels;
mod limits;
mod plan;
mod store;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
pub(crate) use self::open::{limits_of, load_on};

#[cfg(feature = "cuda")]
mod open {
    use std::sync::Arc;

    use super::backend::DeviceBackend;
    use super::device::Device;
    use super::driver::Cuda;
    use super::kernels::Shape;
    use super::limits::{self, Sizes};
    use crate::Error;
    use crate::gpu::Gpu;
    use crate::kernels::Cpu;
    use crate::runner::{Backend, RunnerOptions};
    use crate::weights::Checkpoint;

    /// Loads a model on a GPU. `cpu` converts its weights.
    pub(crate) fn load_on(
        gpu: &Gpu,
        checkpoint: &Checkpoint,
        cpu: Cpu,
        options: &RunnerOptions,
    ) -> Result<Box<dyn Backend>, Error> {
        tracing::info!(%gpu, "loading the model on a GPU");
        let open = |shape: &_| {
            Ok(Arc::new(Cuda::open(gpu, shape, options.kernel_cache.as_deref())?) as Arc<_>)
        };
        Ok(Box::new(DeviceBackend::load(checkpoint, cpu, options, open)?))
    }

    /// Bytes read or written in a second, and multiplications and additions, that a GPU reaches at most.
    pub(crate) fn limits_of(gpu: &Gpu) -> Result<(f64, f64), Error> {
        let device: Arc<dyn Device> = Arc::new(Cuda::open(gpu, &Shape::SMALLEST, None)?);
        limits::measure(&device, Sizes::USUAL)
    }
}
