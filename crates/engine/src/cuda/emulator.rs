//! A device for tests: this machine's processor, which runs the kernels as `cuda/emulator.h` says.
//!
//! It is stricter than a GPU. Memory that was not written is full of NaN, what is written outside of it is found, and the
//! threads of a block run in another order with each launch.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_uint, c_ulong, c_void};
use std::process::Command;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use half::{bf16, f16};
use libloading::Library;

use super::device::{Address, Argument, Device, GraphId, Half, Launch, Product};
use super::kernels::Shape;
use crate::Error;

/// Around each allocation, to see whether something was written there.
const GUARD_BYTES: usize = 4096;
const GUARD: u8 = 0xff;

/// A processor with the kernels of one model.
#[derive(Debug)]
pub(super) struct Emulator {
    kernels: Arc<Kernels>,
    half: Half,
    allocations: Mutex<HashMap<Address, Allocation>>,
    num_launches: AtomicU32,
    graphs: Mutex<Vec<Graph>>,
    /// The graph that is recorded.
    recording: Mutex<Option<Graph>>,
    /// Memory that can still be taken, and all of it.
    free_bytes: AtomicU64,
    all_bytes: u64,
}

/// Compiled kernels. They hold the state of a launch, so there is one at a time.
#[derive(Debug)]
struct Kernels {
    library: Mutex<Library>,
}

type Graph = Vec<Recorded>;

/// What is asked for while a graph is recorded.
#[derive(Clone, Debug)]
enum Recorded {
    Launch { launch: Launch<'static>, arguments: Vec<Argument> },
    Product(Product),
}

#[derive(Debug)]
struct Allocation {
    /// What was asked for, between two guards.
    bytes: Vec<Aligned>,
    num_bytes: usize,
}

#[derive(Clone, Copy, Debug)]
#[repr(C, align(256))]
struct Aligned([u8; 256]);

type LaunchFunction = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    c_uint,
    c_ulong,
    *const *const c_void,
    *const c_char,
    c_uint,
) -> *const c_char;

impl Emulator {
    /// A device that has `all_bytes` of memory, with the kernels for a shape.
    pub(super) fn open(shape: &Shape, all_bytes: u64) -> Self {
        Self {
            kernels: Kernels::compiled(&shape.source()),
            half: shape.half,
            allocations: Mutex::default(),
            num_launches: AtomicU32::new(0),
            graphs: Mutex::default(),
            recording: Mutex::default(),
            free_bytes: AtomicU64::new(all_bytes),
            all_bytes,
        }
    }

    /// Ends the test if something outside of the device's memory was written.
    fn check_guards(&self, kernel: &str) {
        let is_damaged = |allocation: &Allocation| {
            let bytes = allocation.all();
            let end = GUARD_BYTES + allocation.num_bytes;
            let mut guards = bytes[..GUARD_BYTES].iter().chain(&bytes[end..]);
            guards.any(|byte| *byte != GUARD)
        };
        let allocations = self.allocations.lock().unwrap();
        let damaged = allocations.values().find(|allocation| is_damaged(allocation));
        let damaged = damaged.map(|allocation| allocation.num_bytes);
        // Memory is given back while the test ends.
        drop(allocations);
        assert_eq!(damaged, None, "{kernel} wrote outside of an allocation of so many bytes");
    }

    /// Ends the test if the memory from `address` on is not the device's.
    fn check_range(&self, address: Address, num_bytes: usize) {
        let is_inside = |(start, allocation): (&Address, &Allocation)| {
            let end = start + allocation.num_bytes as u64;
            (*start..=end).contains(&address) && address + num_bytes as u64 <= end
        };
        let is_ours = self.allocations.lock().unwrap().iter().any(is_inside);
        assert!(is_ours, "{num_bytes} bytes at {address:#x} are not the device's");
    }

    /// Numbers of the model's type.
    #[expect(unsafe_code, reason = "the device's memory is this process's")]
    fn numbers(&self, address: Address, num: usize) -> Vec<f32> {
        self.check_range(address, 2 * num);
        // SAFETY: it lies in an allocation, which nobody else uses meanwhile.
        let bits = unsafe { std::slice::from_raw_parts(address as *const u16, num) };
        let widen = |bits: &u16| match self.half {
            Half::Bf16 => bf16::from_bits(*bits).to_f32(),
            Half::Fp16 => f16::from_bits(*bits).to_f32(),
        };
        bits.iter().map(widen).collect()
    }
}

impl Allocation {
    #[expect(unsafe_code, reason = "aligned bytes as bytes")]
    fn all(&self) -> &[u8] {
        // SAFETY: they have no gaps.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr().cast(), self.bytes.len() * 256) }
    }
}

impl Device for Emulator {
    fn allocate(&self, num_bytes: usize) -> Result<Address, Error> {
        let taken = self.free_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| {
            free.checked_sub(num_bytes as u64)
        });
        if taken.is_err() {
            return Err(Error::OutOfMemory(format!("the emulator has no {num_bytes} bytes")));
        }
        let len = (num_bytes + 2 * GUARD_BYTES).div_ceil(256);
        let allocation = Allocation { bytes: vec![Aligned([GUARD; 256]); len], num_bytes };
        let address = allocation.all()[GUARD_BYTES..].as_ptr() as Address;
        self.allocations.lock().unwrap().insert(address, allocation);
        Ok(address)
    }

    fn release(&self, address: Address) {
        let allocation = self.allocations.lock().unwrap().remove(&address).expect("was allocated");
        self.free_bytes.fetch_add(allocation.num_bytes as u64, Ordering::Relaxed);
    }

    fn memory(&self) -> Result<(u64, u64), Error> {
        Ok((self.free_bytes.load(Ordering::Relaxed), self.all_bytes))
    }

    #[expect(unsafe_code, reason = "the device's memory is this process's")]
    fn upload(&self, bytes: &[u8], to: Address) -> Result<(), Error> {
        self.check_range(to, bytes.len());
        // SAFETY: it lies in an allocation, which nobody else uses meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    #[expect(unsafe_code, reason = "the device's memory is this process's")]
    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), Error> {
        self.check_range(from, bytes.len());
        // SAFETY: it lies in an allocation, which nobody else uses meanwhile.
        unsafe {
            std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len());
        };
        Ok(())
    }

    #[expect(unsafe_code, reason = "the device's memory is this process's")]
    fn copy(&self, from: Address, to: Address, num_bytes: usize) -> Result<(), Error> {
        self.check_range(from, num_bytes);
        self.check_range(to, num_bytes);
        // SAFETY: both lie in allocations, which nobody else uses meanwhile.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, num_bytes) };
        Ok(())
    }

    #[expect(unsafe_code, reason = "calls compiled kernels")]
    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        let arguments = launch.arguments.to_vec();
        if self.notes(Recorded::Launch { launch: Launch { arguments: &[], ..*launch }, arguments })
        {
            return Ok(());
        }
        let name = CString::new(launch.kernel).expect("a name");
        let grid = [launch.grid.0 as c_uint, launch.grid.1 as c_uint, 1];
        let mut kinds = String::new();
        let mut pointers: Vec<*const c_void> = Vec::new();
        for argument in launch.arguments {
            let (kind, pointer) = match argument {
                Argument::Address(address) => {
                    if *address != 0 {
                        self.check_range(*address, 0);
                    }
                    ('p', std::ptr::from_ref(address).cast())
                }
                Argument::Int(number) => ('i', std::ptr::from_ref(number).cast()),
                Argument::Float(number) => ('f', std::ptr::from_ref(number).cast()),
            };
            kinds.push(kind);
            pointers.push(pointer);
        }
        let kinds = CString::new(kinds).expect("letters");
        let schedule = self.num_launches.fetch_add(1, Ordering::Relaxed);
        let library = self.kernels.library.lock().unwrap();
        // SAFETY: the function has this type, and checks the kinds of the arguments; kernels access what they are given.
        let problem = unsafe {
            let function = library.get::<LaunchFunction>(b"emulator_launch").expect("is there");
            function(
                name.as_ptr(),
                grid.as_ptr(),
                launch.num_threads as c_uint,
                launch.shared_bytes as c_ulong,
                pointers.as_ptr(),
                kinds.as_ptr(),
                schedule,
            )
        };
        if !problem.is_null() {
            // SAFETY: it is a text of the library's, which lasts until the next launch.
            panic!("{}", unsafe { CStr::from_ptr(problem) }.to_string_lossy());
        }
        drop(library);
        self.check_guards(launch.kernel);
        Ok(())
    }

    #[expect(unsafe_code, reason = "the device's memory is this process's")]
    fn multiply(&self, product: &Product) -> Result<(), Error> {
        if self.notes(Recorded::Product(*product)) {
            return Ok(());
        }
        let Product { num_rows, in_features, out_features, .. } = *product;
        let x = self.numbers(product.x, num_rows * in_features);
        let weight = self.numbers(product.weight, out_features * in_features);
        let size = if product.wide { 4 } else { 2 };
        self.check_range(product.out, num_rows * out_features * size);
        for (row, x) in x.chunks_exact(in_features).enumerate() {
            for (output, weight) in weight.chunks_exact(in_features).enumerate() {
                let sum: f32 = x.iter().zip(weight).map(|(x, weight)| x * weight).sum();
                let at = product.out + ((row * out_features + output) * size) as u64;
                let half = match self.half {
                    Half::Bf16 => bf16::from_f32(sum).to_bits(),
                    Half::Fp16 => f16::from_f32(sum).to_bits(),
                };
                // SAFETY: it lies in an allocation, which nobody else uses meanwhile.
                unsafe {
                    if product.wide {
                        *(at as *mut f32) = sum;
                    } else {
                        *(at as *mut u16) = half;
                    }
                }
            }
        }
        Ok(())
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<GraphId, Error> {
        *self.recording.lock().unwrap() = Some(Graph::new());
        work()?;
        let graph = self.recording.lock().unwrap().take().expect("was begun");
        let mut graphs = self.graphs.lock().unwrap();
        graphs.push(graph);
        Ok(graphs.len() - 1)
    }

    fn replay(&self, graph: GraphId) -> Result<(), Error> {
        let graph = self.graphs.lock().unwrap()[graph].clone();
        graph.iter().try_for_each(|recorded| match recorded {
            Recorded::Launch { launch, arguments } => self.launch(&Launch { arguments, ..*launch }),
            Recorded::Product(product) => self.multiply(product),
        })
    }

    fn forget_graphs(&self) {
        self.graphs.lock().unwrap().clear();
    }
}

impl Emulator {
    /// Whether a graph is recorded, which then has this too.
    fn notes(&self, recorded: Recorded) -> bool {
        match &mut *self.recording.lock().unwrap() {
            Some(graph) => graph.push(recorded),
            None => return false,
        }
        true
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let leaked = self.allocations.get_mut().unwrap().len();
            assert_eq!(leaked, 0, "allocations that were never given back");
        }
    }
}

impl Kernels {
    /// The kernels of a source, compiled once in a process.
    fn compiled(source: &str) -> Arc<Self> {
        static COMPILED: OnceLock<Mutex<HashMap<String, Arc<Kernels>>>> = OnceLock::new();
        let mut compiled = COMPILED.get_or_init(Mutex::default).lock().unwrap();
        let kernels =
            compiled.entry(source.to_owned()).or_insert_with(|| Arc::new(Self::compile(source)));
        Arc::clone(kernels)
    }

    #[expect(unsafe_code, reason = "loads what was compiled")]
    fn compile(source: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (file, library) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
        let emulator = include_str!("../../cuda/emulator.h");
        let text =
            format!("#define FLOTILLA_EMULATOR\n#line 1 \"emulator.h\"\n{emulator}\n{source}");
        std::fs::write(&file, text).unwrap();
        // Stacks are changed by jumps, which hardened headers take for a mistake. Names must be each library's own.
        let flags = "-x c++ -std=c++20 -O1 -fPIC -shared -fno-gnu-unique -fvisibility=hidden -U_FORTIFY_SOURCE -w";
        let output = Command::new("c++")
            .args(flags.split(' '))
            .arg(&file)
            .arg("-o")
            .arg(&library)
            .output()
            .expect("the tests need a C++ compiler, c++");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        // SAFETY: loading it runs nothing but the registration of its kernels.
        let library = unsafe { Library::new(&library) }.unwrap();
        Self { library: Mutex::new(library) }
    }
}
