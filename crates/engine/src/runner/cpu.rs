//! The model on the processor.

use super::{Backend, Logits, RunnerOptions};
use crate::Error;
use crate::config::ModelConfig;
use crate::kernels::Cpu;
use crate::kv_cache::{KvCache, bytes_per_block};
use crate::memory::available_memory;
use crate::model::Model;
use crate::model::decoder::{Buffers, Step};
use crate::model::rope::RopeTable;
use crate::precision::KvCacheDtype;
use crate::sampler::PlainChoice;
use crate::step::{SequenceInput, StepInput};
use crate::weights::Checkpoint;

/// A loaded model.
#[derive(Debug)]
pub(super) struct CpuBackend {
    model: Model,
    cpu: Cpu,
    /// Angles of positions, a table for each of the model's ropes.
    ropes: Vec<RopeTable>,
    cache: KvCache,
    buffers: Buffers,
    kv_cache_dtype: KvCacheDtype,
}

impl CpuBackend {
    pub(super) fn load(
        checkpoint: &Checkpoint,
        cpu: Cpu,
        options: &RunnerOptions,
    ) -> Result<Self, Error> {
        let config = checkpoint.config()?;
        let num_threads = cpu.threads.num_threads();
        let buffers = Buffers::new(&config, options.max_num_batched_tokens, num_threads);
        let ropes = config.ropes.iter().map(RopeTable::new).collect();
        let model = Model::load(&config, checkpoint, &cpu, options.precision)?;
        tracing::debug!(
            instruction_set = cpu.simd.name(),
            threads = options.threads,
            weight_bytes = model.num_bytes(),
            "model loaded"
        );
        // Keys and values are rounded no more than the weights that make them.
        let usual = if model.has_fp32_keys() { KvCacheDtype::Fp32 } else { KvCacheDtype::Fp16 };
        let kv_cache_dtype = options.kv_cache_dtype.unwrap_or(usual);
        let cache = KvCache::new(&config, 0, kv_cache_dtype)?;
        Ok(Self { model, cpu, ropes, cache, buffers, kv_cache_dtype })
    }
}

impl Backend for CpuBackend {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn weight_bytes(&self) -> u64 {
        self.model.num_bytes()
    }

    fn kv_cache_dtype(&self) -> KvCacheDtype {
        self.kv_cache_dtype
    }

    fn kv_bytes_per_block(&self) -> usize {
        bytes_per_block(self.config(), self.kv_cache_dtype)
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize) -> Result<(), Error> {
        // The one before is given back first.
        self.cache = KvCache::new(self.model.config(), 0, self.kv_cache_dtype)?;
        self.cache = KvCache::new(self.model.config(), num_blocks, self.kv_cache_dtype)?;
        Ok(())
    }

    fn num_kv_blocks(&self) -> usize {
        self.cache.num_blocks()
    }

    fn kv_cache_room(&self) -> Option<u64> {
        available_memory().map(|bytes| bytes / 2)
    }

    fn back(
        &mut self,
        num_blocks: usize,
        available_memory: fn() -> Option<u64>,
    ) -> Result<(), Error> {
        self.cache.back(num_blocks, available_memory)
    }

    /// Leaves the choices to the samplers, which its threads share.
    fn forward(
        &mut self,
        input: &StepInput,
        _: &[Option<PlainChoice>],
    ) -> Result<Logits<'_>, Error> {
        let num_positions = input.sequences.iter().map(SequenceInput::end).max().unwrap_or(0);
        self.ropes.iter_mut().for_each(|rope| rope.ensure(num_positions));
        let Self { model, cpu, ropes, cache, buffers, .. } = self;
        let step = Step { cpu, input, ropes };
        cpu.threads.step(|| model.forward(step, cache, buffers));
        let (rows, num_rows) = self.buffers.logits();
        Ok(Logits::new(rows, num_rows, &self.cpu.threads))
    }
}
