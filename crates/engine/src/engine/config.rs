//! The settings of an engine, and what they are where the user names none.

use std::path::PathBuf;

use crate::Error;
use crate::gpu::Device;
use crate::kernels::Simd as InstructionSet;
use crate::precision::{KvCacheDtype, Precision};
use crate::runner::{GPU_MEMORY_UTILIZATION, RunnerOptions};

/// Settings of an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// The model's folder.
    pub model_path: PathBuf,
    /// What the model is computed on.
    pub device: Device,
    /// Most sequences that run at a time.
    pub max_num_seqs: usize,
    /// Most tokens that are computed in a step.
    pub max_num_batched_tokens: usize,
    /// Longest sequence, prompt and answer; the model's window if not given.
    pub max_model_len: Option<usize>,
    /// Memory of the KV cache; derived from the free memory if not given.
    pub kv_cache_memory_bytes: Option<u64>,
    /// Threads that compute.
    pub threads: usize,
    /// Whether prompts that begin alike share what has been computed for them.
    pub enable_prefix_caching: bool,
    /// How weights are kept; as the checkpoint has them if not given.
    pub precision: Option<Precision>,
    /// How keys and values are kept; `fp16` if not given, or `fp32` beside weights in `fp32`.
    pub kv_cache_dtype: Option<KvCacheDtype>,
    /// What computes; the best of this machine if not given.
    pub instruction_set: Option<InstructionSet>,
    /// Share of a GPU's memory that weights, buffers and KV cache may take, what others have taken counted in.
    pub gpu_memory_utilization: f32,
    /// Folder for a GPU's compiled kernels; they are compiled at each start if not given.
    pub kernel_cache: Option<PathBuf>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            model_path: PathBuf::new(),
            device: Device::Cpu,
            max_num_seqs: 32,
            max_num_batched_tokens: 512,
            max_model_len: None,
            kv_cache_memory_bytes: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            enable_prefix_caching: true,
            precision: None,
            kv_cache_dtype: None,
            instruction_set: None,
            gpu_memory_utilization: GPU_MEMORY_UTILIZATION,
            kernel_cache: None,
        }
    }
}

impl EngineConfig {
    /// The default settings on a device: a GPU takes many more sequences at a time than a processor.
    pub fn for_device(device: Device) -> Self {
        let usual = Self::default();
        match device {
            Device::Cpu => usual,
            Device::Gpu(_) => {
                Self { device, max_num_seqs: 256, max_num_batched_tokens: 8192, ..usual }
            }
        }
    }

    /// What the runner is told of them.
    pub(super) fn runner_options(&self) -> RunnerOptions {
        RunnerOptions {
            device: self.device,
            threads: self.threads,
            max_num_batched_tokens: self.max_num_batched_tokens,
            precision: self.precision,
            kv_cache_dtype: self.kv_cache_dtype,
            instruction_set: self.instruction_set,
            gpu_memory_utilization: self.gpu_memory_utilization,
            kernel_cache: self.kernel_cache.clone(),
        }
    }

    /// Checks the settings; the error names everything that is wrong with them.
    pub fn validate(&self) -> Result<(), Error> {
        let counts = [
            ("max_num_seqs", Some(self.max_num_seqs)),
            ("max_num_batched_tokens", Some(self.max_num_batched_tokens)),
            ("threads", Some(self.threads)),
        ];
        let mut problems: Vec<String> = counts
            .into_iter()
            .filter(|(_, value)| *value == Some(0))
            .map(|(name, _)| format!("{name} must be at least 1, got 0"))
            .collect();
        if let Some(length) = self.max_model_len.filter(|length| *length < 2) {
            problems.push(format!("max_model_len must be at least 2, got {length}"));
        }
        let share = self.gpu_memory_utilization;
        if !(share > 0.0 && share <= 1.0) {
            problems
                .push(format!("gpu_memory_utilization must be above 0 and at most 1, got {share}"));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Input(problems.join("; "))) }
    }
}
