//! The runner: a step's plan in, logits out.
//!
//! This one computes on the CPU. One for another device has the same face (`load`, `allocate_kv_cache`,
//! `forward`) and meets the engine in nothing but [`StepInput`] and [`Logits`]. Not here: what runs in a
//! step (scheduler), which blocks (block manager), which token (sampler).

use std::path::Path;

use crate::Error;
use crate::config::ModelConfig;
use crate::kernels::{Activations, Cpu, Simd, Threads};
use crate::kv_cache::{KvCache, bytes_per_block};
use crate::memory::available_memory;
use crate::model::Model;
use crate::model::decoder::{Buffers, Step};
use crate::model::rope::RopeTable;
use crate::precision::{KvCacheDtype, Precision};
use crate::step::{BLOCK_SIZE, SequenceInput, StepInput};
use crate::weights::Checkpoint;

/// How a model is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunnerOptions {
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
}

impl Default for RunnerOptions {
    /// One thread, everything as it is stored, a KV cache that rounds nothing.
    fn default() -> Self {
        Self {
            threads: 1,
            max_num_batched_tokens: 512,
            precision: None,
            kv_cache_dtype: Some(KvCacheDtype::Fp32),
            instruction_set: None,
        }
    }
}

/// A loaded model with its KV cache.
#[derive(Debug)]
pub struct Runner {
    model: Model,
    cpu: Cpu,
    /// Angles of positions, a table for each of the model's ropes.
    ropes: Vec<RopeTable>,
    cache: Option<KvCache>,
    buffers: Buffers,
    max_num_batched_tokens: usize,
    kv_cache_dtype: KvCacheDtype,
    /// Tells how much memory can be had.
    pub(crate) available_memory: fn() -> Option<u64>,
}

/// Logits of a step: a row for each sequence that wanted them, in their order.
#[derive(Clone, Copy, Debug)]
pub struct Logits<'a> {
    rows: &'a Activations,
    num_rows: usize,
    threads: &'a Threads,
}

impl<'a> Logits<'a> {
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

    /// The threads that computed them.
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
        let checkpoint = Checkpoint::open(model_path)?;
        let config = checkpoint.config()?;
        let threads = Threads::new(options.threads)?;
        let buffers = Buffers::new(&config, options.max_num_batched_tokens, threads.num_threads());
        let ropes = config.ropes.iter().map(RopeTable::new).collect();
        let cpu = Cpu::new(simd, threads);
        let model = Model::load(&config, &checkpoint, &cpu, options.precision)?;
        tracing::debug!(
            instruction_set = simd.name(),
            threads = options.threads,
            weight_bytes = model.num_bytes(),
            "model loaded"
        );
        // Keys and values are rounded no more than the weights that make them.
        let usual = if model.has_fp32_keys() { KvCacheDtype::Fp32 } else { KvCacheDtype::Fp16 };
        Ok(Self {
            model,
            cpu,
            ropes,
            cache: None,
            buffers,
            max_num_batched_tokens: options.max_num_batched_tokens,
            kv_cache_dtype: options.kv_cache_dtype.unwrap_or(usual),
            available_memory,
        })
    }

    /// What the model looks like.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Memory that the weights take.
    pub fn weight_bytes(&self) -> u64 {
        self.model.num_bytes()
    }

    /// How keys and values are kept.
    pub fn kv_cache_dtype(&self) -> KvCacheDtype {
        self.kv_cache_dtype
    }

    /// Memory that a block of the KV cache takes.
    pub fn kv_bytes_per_block(&self) -> usize {
        bytes_per_block(self.config(), self.kv_cache_dtype)
    }

    /// Makes the KV cache, in place of the one before.
    pub fn allocate_kv_cache(&mut self, num_blocks: usize) -> Result<(), Error> {
        self.cache = None;
        self.cache = Some(KvCache::new(self.model.config(), num_blocks, self.kv_cache_dtype)?);
        Ok(())
    }

    /// Blocks of the KV cache: fewer than were asked for once memory ran out.
    pub fn num_kv_blocks(&self) -> usize {
        self.cache.as_ref().map_or(0, KvCache::num_blocks)
    }

    /// Computes a step: keys and values of its tokens go to the cache, the wanted logits come back.
    ///
    /// Where there is no memory for blocks that it is the first to write to, the cache loses them
    /// ([`Error::OutOfMemory`]).
    pub fn forward(&mut self, input: &StepInput) -> Result<Logits<'_>, Error> {
        self.check(input)?;
        let Self { model, cpu, ropes, cache, buffers, .. } = self;
        let Some(cache) = cache else {
            return Err(Error::Input("the runner has no KV cache yet".into()));
        };
        let end = |s: &SequenceInput| s.num_computed_tokens + s.num_scheduled_tokens;
        let blocks =
            input.sequences.iter().flat_map(|s| &s.block_table[..end(s).div_ceil(BLOCK_SIZE)]);
        let num_blocks = blocks.map(|block| block.0 as usize + 1).max().unwrap_or(0);
        cache.back(num_blocks, self.available_memory)?;
        let num_positions = input.sequences.iter().map(end).max().unwrap_or(0);
        ropes.iter_mut().for_each(|rope| rope.ensure(num_positions));
        let step = Step { cpu, input, ropes };
        cpu.threads.step(|| model.forward(step, cache, buffers));
        let (rows, num_rows) = self.buffers.logits();
        Ok(Logits { rows, num_rows, threads: &self.cpu.threads })
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
            let end = sequence.num_computed_tokens.saturating_add(sequence.num_scheduled_tokens);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::BlockId;

    /// A short prompt, a token and two tokens, on every instruction set.
    fn check_instruction_sets(model: &Path, options: RunnerOptions, prompt_len: usize) {
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
            let options = RunnerOptions { instruction_set: Some(simd), ..options };
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
            check_instruction_sets(&model, RunnerOptions::default(), 50);
            for kv_cache_dtype in KvCacheDtype::ALL {
                let precision = Some(Precision::Q8_0);
                let kv_cache_dtype = Some(kv_cache_dtype);
                let options = RunnerOptions { precision, kv_cache_dtype, ..Default::default() };
                check_instruction_sets(&model, options, 50);
            }
        }
        // Its rows are whole blocks of every format.
        let shipped = package.join("../../models/flotilla-reader");
        for precision in [Precision::Fp16, Precision::Q6K, Precision::Q4K] {
            let options = RunnerOptions { precision: Some(precision), ..Default::default() };
            check_instruction_sets(&shipped, options, 5);
        }
    }
}
