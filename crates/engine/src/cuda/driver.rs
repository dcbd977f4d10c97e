//! A real GPU: memory, copies and launches through NVIDIA's driver, products through cuBLAS.
//!
//! The libraries are looked for when they are needed, so that the program starts, and says what is missing, where there are none.
//! Everything runs in one stream of the device.
#![expect(unsafe_code, reason = "calls the driver, whose functions take addresses on trust")]

mod compile;
mod product;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute, CUresult};

use self::product::Products;
use super::device::{Address, Argument, Device, GraphId, Launch, Product};
use super::kernels::Shape;
use crate::Error;
use crate::gpu::{Gpu, GpuUuid};

/// Shared memory that a block may use without asking for more.
const USUAL_SHARED_BYTES: usize = 48 << 10;

impl Gpu {
    /// The devices that this process may use: all of the machine, or those that `CUDA_VISIBLE_DEVICES` names.
    pub fn all() -> Result<Vec<Self>, Error> {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Device(
                "there is no NVIDIA driver: its library, libcuda.so.1, was not found".into(),
            ));
        }
        match result::init() {
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
            other => other.and_then(|()| result::device::get_count()),
        }
        .and_then(|count| (0..count).map(Self::at).collect())
        .map_err(failed("find the devices"))
    }

    fn at(index: i32) -> Result<Self, DriverError> {
        let device = result::device::get(index)?;
        let uuid = result::device::get_uuid(device)?;
        // SAFETY: the device is one that there is.
        let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
        let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        // SAFETY: as above.
        let memory = unsafe { result::device::total_mem(device) }?;
        Ok(Self {
            index: index.unsigned_abs(),
            name: result::device::get_name(device)?,
            uuid: GpuUuid(uuid.bytes.map(|byte| byte.to_ne_bytes()[0])),
            memory_bytes: memory as u64,
            compute_capability: (major.unsigned_abs(), minor.unsigned_abs()),
        })
    }
}

/// A device with the kernels of one model.
#[derive(Debug)]
pub(super) struct Cuda {
    gpu: Gpu,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static str, sys::CUfunction>>,
    graphs: Mutex<Vec<sys::CUgraphExec>>,
    products: Mutex<Products>,
}

// SAFETY: handles of the driver may be used from every thread for which their context is current, which `enter` sees to.
unsafe impl Send for Cuda {}
// SAFETY: as above; what changes is behind locks.
unsafe impl Sync for Cuda {}

impl Cuda {
    /// Opens a device, and compiles the kernels for a model's shape or takes them from `kernel_cache`.
    pub(super) fn open(
        gpu: &Gpu,
        shape: &Shape,
        kernel_cache: Option<&Path>,
    ) -> Result<Self, Error> {
        if gpu.compute_capability < (8, 0) {
            let (major, minor) = gpu.compute_capability;
            return Err(Error::Device(format!(
                "{} has compute capability {major}.{minor}, 8.0 is needed (Ampere, of 2020, or later)",
                gpu.name
            )));
        }
        let image = compile::image(&shape.source(), gpu.compute_capability, kernel_cache)?;
        let opened = || {
            let device = result::device::get(gpu.index.cast_signed())?;
            // SAFETY: the device is one that there is; the context is given back when this is dropped.
            let context = unsafe { result::primary_ctx::retain(device) }?;
            // SAFETY: the context is the one that was just made.
            unsafe { result::ctx::set_current(context) }?;
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
            // SAFETY: the image is a whole one, of the compiler's.
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) }?;
            Ok((device, context, stream, module))
        };
        let (device, context, stream, module) = opened().map_err(failed("open the device"))?;
        let products = Products::new(shape.half, stream).inspect_err(|_| {
            // SAFETY: nobody has the context; with it goes all that was made in it. There is nothing to do where it fails.
            let _given_back = unsafe { result::primary_ctx::release(device) };
        })?;
        Ok(Self {
            gpu: gpu.clone(),
            device,
            context,
            stream,
            module,
            functions: Mutex::default(),
            graphs: Mutex::default(),
            products: Mutex::new(products),
        })
    }

    /// Makes the device this thread's.
    fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: the context is there until this is dropped.
        unsafe { result::ctx::set_current(self.context) }
    }

    fn function(&self, launch: &Launch<'_>) -> Result<sys::CUfunction, DriverError> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(launch.kernel) {
            return Ok(*function);
        }
        let name = CString::new(launch.kernel).unwrap_or_default();
        // SAFETY: the module is there until this is dropped.
        let function = unsafe { result::module::get_function(self.module, name) }?;
        if launch.shared_bytes > USUAL_SHARED_BYTES {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(launch.shared_bytes).unwrap_or(i32::MAX);
            // SAFETY: the function is one of the module's.
            unsafe { result::function::set_function_attribute(function, attribute, bytes) }?;
        }
        functions.insert(launch.kernel, function);
        Ok(function)
    }
}

impl Device for Cuda {
    fn allocate(&self, num_bytes: usize) -> Result<Address, Error> {
        // SAFETY: what is in it is not read before it is written.
        let taken = self.enter().and_then(|()| unsafe { result::malloc_sync(num_bytes) });
        taken.map_err(|error| match error {
            DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                let (free, _) = self.memory().unwrap_or_default();
                Error::OutOfMemory(format!(
                    "{} has {free} bytes left of {}, {num_bytes} more are needed: take a smaller \
                     precision or model, a shorter --max-model-len or fewer --max-num-batched-tokens",
                    self.gpu.name, self.gpu.memory_bytes
                ))
            }
            other => failed("take memory")(other),
        })
    }

    fn release(&self, address: Address) {
        // Work that still uses it is waited for. After an error that the device can't recover from there is nothing to give
        // back: its memory is free when the process ends.
        // SAFETY: the address is one that `allocate` gave, and nobody uses it any more.
        let released = self.enter().and_then(|()| unsafe {
            let waited = result::stream::synchronize(self.stream);
            result::free_sync(address).and(waited)
        });
        if let Err(error) = released {
            tracing::debug!(%error, "memory of the device could not be given back");
        }
    }

    fn memory(&self) -> Result<(u64, u64), Error> {
        let memory = self.enter().and_then(|()| result::mem_get_info());
        let memory = memory.map(|(free, total)| (free as u64, total as u64));
        memory.map_err(failed("say how much memory is free"))
    }

    fn upload(&self, bytes: &[u8], to: Address) -> Result<(), Error> {
        // Nothing says that the driver is through with the bytes when the copy has been asked for.
        // SAFETY: who calls has so much memory there; the copy is done before the call returns.
        let copied = self.enter().and_then(|()| unsafe {
            result::memcpy_htod_async(to, bytes, self.stream)?;
            result::stream::synchronize(self.stream)
        });
        copied.map_err(failed("copy to the device"))
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), Error> {
        // SAFETY: who calls has so much memory there; the copy is done before the call returns.
        let copied = self.enter().and_then(|()| unsafe {
            result::memcpy_dtoh_async(bytes, from, self.stream)
                .and_then(|()| result::stream::synchronize(self.stream))
        });
        copied.map_err(failed("compute"))
    }

    fn copy(&self, from: Address, to: Address, num_bytes: usize) -> Result<(), Error> {
        // SAFETY: who calls has so much memory in both places.
        let copied = self
            .enter()
            .and_then(|()| unsafe { result::memcpy_dtod_async(to, from, num_bytes, self.stream) });
        copied.map_err(failed("copy"))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        let size = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let mut arguments: Vec<*mut c_void> = launch
            .arguments
            .iter()
            .map(|argument| match argument {
                Argument::Address(address) => std::ptr::from_ref(address).cast_mut().cast(),
                Argument::Int(number) => std::ptr::from_ref(number).cast_mut().cast(),
                Argument::Float(number) => std::ptr::from_ref(number).cast_mut().cast(),
            })
            .collect();
        let launched = self.enter().and_then(|()| {
            let function = self.function(launch)?;
            // SAFETY: the arguments are those of the kernel, of which the emulator's tests tell; addresses lie in memory that is kept
            // until the work is done.
            unsafe {
                result::launch_kernel(
                    function,
                    (size(launch.grid.0), size(launch.grid.1), 1),
                    (size(launch.num_threads), 1, 1),
                    size(launch.shared_bytes),
                    self.stream,
                    &mut arguments,
                )
            }
        });
        launched.map_err(failed(launch.kernel))
    }

    fn multiply(&self, product: &Product) -> Result<(), Error> {
        self.enter().map_err(failed("multiply"))?;
        self.products.lock().unwrap_or_else(PoisonError::into_inner).multiply(product)
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<GraphId, Error> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let begin = || {
            self.enter()?;
            // SAFETY: the stream is there until this is dropped.
            unsafe { result::stream::begin_capture(self.stream, mode) }
        };
        begin().map_err(failed("record a step"))?;
        let worked = work();
        // The recording ends whatever became of the work.
        // SAFETY: as above; the graph is given back, its executable form is kept until it is forgotten.
        let ended = unsafe {
            result::stream::end_capture(self.stream).and_then(|graph| {
                let flags = sys::CUgraphInstantiate_flags(0);
                let executable = result::graph::instantiate(graph, flags);
                result::graph::destroy(graph)?;
                executable
            })
        };
        worked?;
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        graphs.push(ended.map_err(failed("record a step"))?);
        Ok(graphs.len() - 1)
    }

    fn replay(&self, graph: GraphId) -> Result<(), Error> {
        let graph = self.graphs.lock().unwrap_or_else(PoisonError::into_inner)[graph];
        // SAFETY: it has not been forgotten, and the memory that it uses is there until then.
        let launched =
            self.enter().and_then(|()| unsafe { result::graph::launch(graph, self.stream) });
        launched.map_err(failed("compute"))
    }

    fn forget_graphs(&self) {
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        for graph in graphs.drain(..) {
            // SAFETY: nobody has it any more; the driver waits for what still runs of it. There is nothing to do where it fails.
            let _given_back =
                self.enter().and_then(|()| unsafe { result::graph::exec_destroy(graph) });
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        let waited = self.enter().and_then(|()| {
            // SAFETY: the stream is there until it is destroyed below.
            unsafe { result::stream::synchronize(self.stream) }
        });
        self.forget_graphs();
        self.products.get_mut().unwrap_or_else(PoisonError::into_inner).close();
        // Each is given back whatever became of the one before.
        // SAFETY: nobody uses the handles any more.
        let closed = unsafe {
            [
                waited,
                result::module::unload(self.module),
                result::stream::destroy(self.stream),
                result::primary_ctx::release(self.device),
            ]
        };
        for error in closed.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "the device could not be closed");
        }
    }
}

/// An error of the driver's as ours.
fn failed(what: &str) -> impl FnOnce(DriverError) -> Error + use<'_> {
    move |error| {
        let told = |text: Result<&std::ffi::CStr, DriverError>| {
            text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let (name, text) = (told(error.error_name()), told(error.error_string()));
        Error::Device(format!("the GPU could not {what}: {text} ({name})"))
    }
}
