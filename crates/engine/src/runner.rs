//! The runner: a step's plan in, logits out.
//!
//! It refuses what would read or write where it must not, and hands the rest to a [`Backend`]: the processor (`runner/cpu.rs`) or a
//! GPU (`cuda`). Not here: what runs in a step (scheduler), which blocks (block manager), which token (sampler).

mod cpu;

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use self::cpu::CpuBackend;
use crate::Error;
use crate::config::ModelConfig;
use crate::gpu::{Device, Gpu};
use crate::kernels::{Activations, Cpu, Simd, Threads};
use crate::memory::available_memory;
use crate::precision::{KvCacheDtype, Precision};
use crate::sampler::{PlainChoice, SampleError};
use crate::step::{BLOCK_SIZE, StepInput, TokenId};
use crate::weights::Checkpoint;

/// The default of [`RunnerOptions::gpu_memory_utilization`].
pub(crate) const GPU_MEMORY_UTILIZATION: f32 = 0.9;

/// How a model is run.
#[derive(Clone, Debug, PartialEq)]
pub struct RunnerOptions {
    /// What the model is computed on.
    pub device: Device,
    /// Threads that compute.
    pub threads: usize,
    /// Most tokens of a step, over all its sequences.
    pub max_num_batched_tokens: usize,
    /// How weights are kept; as the checkpoint has them if not given.
    pub precision: Option<Precision>,
    /// How keys and values are kept; `fp16` if not given, or `fp32` beside weights in `fp32`.
    pub kv_cache_dtype: Option<KvCacheDtype>,
    /// What computes; the best of this machine if not given.
    pub instruction_set: Option<Simd>,
    /// Share of a GPU's memory that weights, buffers and KV cache may take, what others have taken counted in.
    pub gpu_memory_utilization: f32,
    /// Folder for a GPU's compiled kernels; they are compiled at each start if not given.
    pub kernel_cache: Option<PathBuf>,
}

impl Default for RunnerOptions {
    /// One thread, everything as it is stored, a KV cache that rounds nothing.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            threads: 1,
            max_num_batched_tokens: 512,
            precision: None,
            kv_cache_dtype: Some(KvCacheDtype::Fp32),
            instruction_set: None,
            gpu_memory_utilization: GPU_MEMORY_UTILIZATION,
            kernel_cache: None,
        }
    }
}

/// A loaded model with its KV cache.
#[derive(Debug)]
pub struct Runner {
    backend: Box<dyn Backend>,
    max_num_batched_tokens: usize,
    /// Tells how much memory can be had.
    pub(crate) available_memory: fn() -> Option<u64>,
}

/// What computes the steps of a runner: a model on the processor or on a GPU, with its KV cache.
pub(crate) trait Backend: Debug + Send {
    /// What the model looks like.
    fn config(&self) -> &ModelConfig;

    /// Memory that the weights take.
    fn weight_bytes(&self) -> u64;

    /// How keys and values are kept.
    fn kv_cache_dtype(&self) -> KvCacheDtype;

    /// Memory that a block of the KV cache takes.
    fn kv_bytes_per_block(&self) -> usize;

    /// Makes the KV cache, in place of the one before.
    fn allocate_kv_cache(&mut self, num_blocks: usize) -> Result<(), Error>;

    /// Blocks of the KV cache.
    fn num_kv_blocks(&self) -> usize;

    /// Memory that a KV cache may take by default, where that is known.
    fn kv_cache_room(&self) -> Option<u64>;

    /// Sees to it that the first `num_blocks` of the KV cache can be written to, as [`Runner::forward`] says it.
    fn back(
        &mut self,
        num_blocks: usize,
        available_memory: fn() -> Option<u64>,
    ) -> Result<(), Error>;

    /// Computes a step that was checked.
    ///
    /// `choices` are how the tokens of the rows are chosen, for a backend that can do it; `None`, or one that is missing, is not for it to
    /// choose.
    fn forward(
        &mut self,
        input: &StepInput,
        choices: &[Option<PlainChoice>],
    ) -> Result<Logits<'_>, Error>;
}

/// Logits of a step: a row for each sequence that wanted them, in their order.
#[derive(Clone, Copy, Debug)]
pub struct Logits<'a> {
    rows: &'a Activations,
    num_rows: usize,
    /// Tokens that the backend has chosen, by row; those behind the last are not chosen.
    tokens: &'a [Option<ChosenToken>],
    threads: &'a Threads,
}

/// A token, or why none can be chosen.
pub(crate) type ChosenToken = Result<TokenId, SampleError>;

impl<'a> Logits<'a> {
    /// The first `num_rows` of `rows`, computed by `threads`, which go on to sample.
    pub(crate) fn new(rows: &'a Activations, num_rows: usize, threads: &'a Threads) -> Self {
        Self { rows, num_rows, tokens: &[], threads }
    }

    /// Of those rows whose token is chosen there may be no numbers.
    #[cfg_attr(not(any(test, feature = "cuda")), expect(dead_code, reason = "a GPU chooses"))]
    pub(crate) fn with_tokens(self, tokens: &'a [Option<ChosenToken>]) -> Self {
        Self { tokens, ..self }
    }

    /// The token that was chosen for a row, if the backend did.
    pub(crate) fn token(&self, row: usize) -> Option<ChosenToken> {
        self.tokens.get(row).copied().flatten()
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// A row, `(vocab_size)`.
    ///
    /// # Panics
    /// If there are not so many rows.
    pub fn row(&self, row: usize) -> &'a [f32] {
        assert!(row < self.num_rows, "row {row} of {} rows of logits", self.num_rows);
        self.rows.row(row)
    }

    /// The threads to sample with.
    pub(crate) fn threads(&self) -> &'a Threads {
        self.threads
    }

    /// All rows.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &'a [f32]> + use<'a> {
        let rows = self.rows;
        (0..self.num_rows).map(move |row| rows.row(row))
    }
}

impl Runner {
    /// Loads the model in a folder. It computes once it has a KV cache.
    pub fn load(model_path: &Path, options: &RunnerOptions) -> Result<Self, Error> {
        if options.threads == 0 || options.max_num_batched_tokens == 0 {
            return Err(Error::Input(
                "a runner needs a thread and a token per step at least".into(),
            ));
        }
        let simd = options.instruction_set.unwrap_or_else(Simd::detect);
        let cpu = Cpu::new(simd, Threads::new(options.threads)?);
        let checkpoint = Checkpoint::open(model_path)?;
        let backend: Box<dyn Backend> = match options.device {
            Device::Cpu => Box::new(CpuBackend::load(&checkpoint, cpu, options)?),
            Device::Gpu(id) => load_on(&Gpu::find(id)?, &checkpoint, cpu, options)?,
        };
        Ok(Self {
            backend,
            max_num_batched_tokens: options.max_num_batched_tokens,
            available_memory,
        })
    }

    /// A model that is loaded already.
    #[cfg(test)]
    pub(crate) fn with_backend(backend: Box<dyn Backend>, max_num_batched_tokens: usize) -> Self {
        Self { backend, max_num_batched_tokens, available_memory }
    }

    /// What the model looks like.
    pub fn config(&self) -> &ModelConfig {
        self.backend.config()
    }

    /// Memory that the weights take.
    pub fn weight_bytes(&self) -> u64 {
        self.backend.weight_bytes()
    }

    /// How keys and values are kept.
    pub fn kv_cache_dtype(&self) -> KvCacheDtype {
        self.backend.kv_cache_dtype()
    }

    /// Memory that a block of the KV cache takes.
    pub fn kv_bytes_per_block(&self) -> usize {
        self.backend.kv_bytes_per_block()
    }

    /// Memory that a KV cache may take by default, where that is known.
    pub(crate) fn kv_cache_room(&self) -> Option<u64> {
        self.backend.kv_cache_room()
    }

    /// Makes the KV cache, in place of the one before.
    pub fn allocate_kv_cache(&mut self, num_blocks: usize) -> Result<(), Error> {
        self.backend.allocate_kv_cache(num_blocks)
    }

    /// Blocks of the KV cache: fewer than were asked for once memory ran out.
    pub fn num_kv_blocks(&self) -> usize {
        self.backend.num_kv_blocks()
    }

    /// Computes a step: keys and values of its tokens go to the cache, the wanted logits come back.
    ///
    /// Where there is no memory for blocks that it is the first to write to, the cache loses them
    /// ([`Error::OutOfMemory`]).
    pub fn forward(&mut self, input: &StepInput) -> Result<Logits<'_>, Error> {
        self.forward_and_choose(input, &[])
    }

    /// The same, where a backend may choose tokens as `choices` say for the rows of logits.
    pub(crate) fn forward_and_choose(
        &mut self,
        input: &StepInput,
        choices: &[Option<PlainChoice>],
    ) -> Result<Logits<'_>, Error> {
        if self.num_kv_blocks() == 0 {
            return Err(Error::Input("the runner has no KV cache yet".into()));
        }
        self.check(input)?;
        let blocks =
            input.sequences.iter().flat_map(|s| &s.block_table[..s.end().div_ceil(BLOCK_SIZE)]);
        let num_blocks = blocks.map(|block| block.0 as usize + 1).max().unwrap_or(0);
        self.backend.back(num_blocks, self.available_memory)?;
        self.backend.forward(input, choices)
    }

    /// Refuses what would read or write where it must not.
    fn check(&self, input: &StepInput) -> Result<(), Error> {
        let config = self.config();
        let num_blocks = self.num_kv_blocks();
        let num_tokens = input.token_ids.len();
        if num_tokens > self.max_num_batched_tokens {
            return Err(Error::Input(format!(
                "a step of {num_tokens} tokens, expected at most {}",
                self.max_num_batched_tokens
            )));
        }
        if let Some(token) =
            input.token_ids.iter().find(|token| **token as usize >= config.vocab_size)
        {
            return Err(Error::Input(format!(
                "the token {token} is outside of the model's vocabulary of {}",
                config.vocab_size
            )));
        }
        let mut num_scheduled = 0;
        for (index, sequence) in input.sequences.iter().enumerate() {
            let end = sequence.end();
            num_scheduled += sequence.num_scheduled_tokens;
            let wrong =
                |what: String| Err(Error::Input(format!("sequence {index} of the step {what}")));
            if sequence.num_scheduled_tokens == 0 {
                return wrong("has no tokens".into());
            }
            let most = config.max_position_embeddings.min(num_blocks * BLOCK_SIZE);
            if end > most {
                return wrong(format!("reaches {end} tokens, model and cache end at {most}"));
            }
            let Some(blocks) = sequence.block_table.get(..end.div_ceil(BLOCK_SIZE)) else {
                let given = sequence.block_table.len();
                return wrong(format!("has {given} blocks for {end} tokens"));
            };
            if let Some(block) = blocks.iter().find(|block| block.0 as usize >= num_blocks) {
                return wrong(format!("has the block {} of {num_blocks}", block.0));
            }
        }
        if num_scheduled != num_tokens {
            return Err(Error::Input(format!(
                "the step has {num_tokens} tokens, its sequences {num_scheduled}"
            )));
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
use crate::cuda::load_on;

/// Without the feature there is no GPU to be found.
#[cfg(not(feature = "cuda"))]
fn load_on(
    gpu: &Gpu,
    _: &Checkpoint,
    _: Cpu,
    _: &RunnerOptions,
) -> Result<Box<dyn Backend>, Error> {
    Err(Error::Device(format!("{} cannot be used by this program", gpu.name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::{BlockId, SequenceInput};

    /// A short prompt, a token and two tokens, on every instruction set.
    fn check_instruction_sets(model: &Path, options: &RunnerOptions, prompt_len: usize) {
        let lengths = [(0, prompt_len), (prompt_len, 1), (prompt_len + 1, 2)];
        let steps = lengths.map(|(computed, scheduled)| StepInput {
            token_ids: (0..scheduled).map(|i| ((i + computed) * 7 % 300) as u32).collect(),
            sequences: vec![SequenceInput {
                num_scheduled_tokens: scheduled,
                num_computed_tokens: computed,
                block_table: [3, 1, 0, 2].map(BlockId).to_vec(),
                is_long: false,
                wants_logits: true,
            }],
        });
        let vector_units = Simd::available().into_iter().filter(|simd| !simd.has_matrix_unit());
        let mut logits = vector_units.map(|simd| {
            let options = RunnerOptions { instruction_set: Some(simd), ..options.clone() };
            let mut runner = Runner::load(model, &options).unwrap();
            runner.allocate_kv_cache(4).unwrap();
            let bits = |step| -> Vec<u32> {
                runner.forward(step).unwrap().row(0).iter().map(|x| x.to_bits()).collect()
            };
            (simd.name(), steps.iter().map(bits).collect::<Vec<_>>())
        });
        let (_, first) = logits.next().unwrap();
        for (name, other) in logits {
            assert!(first == other, "{} with {options:?}: {name} differs", model.display());
        }
    }

    /// But for a matrix unit, which rounds in its own way (`matmul` has the test of that).
    #[test]
    fn every_vector_unit_gives_the_same_bits() {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        for model in [
            "llama-odd",
            "llama-bias",
            "llama-bf16",
            "llama-f16",
            "llama-gelu",
            "phi3-longrope-partial",
            "gemma2",
            "gemma2-v4",
            "gemma3",
            "qwen3-moe",
        ] {
            let model = package.join("tests/fixtures").join(model);
            check_instruction_sets(&model, &RunnerOptions::default(), 50);
            for kv_cache_dtype in KvCacheDtype::ALL {
                let precision = Some(Precision::Q8_0);
                let kv_cache_dtype = Some(kv_cache_dtype);
                let options = RunnerOptions { precision, kv_cache_dtype, ..Default::default() };
                check_instruction_sets(&model, &options, 50);
            }
        }
        // Its rows are whole blocks of every format.
        let shipped = package.join("../../models/flotilla-reader");
        for precision in [Precision::Fp16, Precision::Q6K, Precision::Q4K] {
            let options = RunnerOptions { precision: Some(precision), ..Default::default() };
            check_instruction_sets(&shipped, &options, 5);
        }
    }
}
