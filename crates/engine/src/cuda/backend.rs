//! A model on a device with its KV cache: a step's plan in, logits out.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;

use super::device::{Device, GraphId, Half};
use super::forward::{DeviceBuffers, DeviceCache, DeviceModel, Forward, bytes_per_block};
use super::kernels::Shape;
use super::plan::{Form, LADDER_STEP, StepPlan};
use super::store::DeviceStore;
use crate::Error;
use crate::config::ModelConfig;
use crate::kernels::{Activations, Cpu};
use crate::model::{Account, Model};
use crate::precision::{KvCacheDtype, Precision};
use crate::runner::{Backend, ChosenToken, Logits, RunnerOptions};
use crate::sampler::{PlainChoice, SampleError};
use crate::step::StepInput;
use crate::weights::{Checkpoint, Format};

/// What a device writes in place of a token where logits are NaN (`cuda/sample.cu`).
const NOT_A_NUMBER: i32 = -1;

/// Tokens that a device can choose among (`cuda/sample.cu`).
const MAX_CHOICES: usize = 1 << 18;

/// A loaded model.
#[derive(Debug)]
pub(super) struct DeviceBackend {
    model: DeviceModel,
    shape: Shape,
    cache: DeviceCache,
    buffers: DeviceBuffers,
    plan: StepPlan,
    /// The logits of the last step, on the host.
    logits: Activations,
    /// The tokens that were chosen in the last step, by row.
    tokens: Vec<Option<ChosenToken>>,
    /// Bytes as they come.
    staging: Vec<u8>,
    graphs: Graphs,
    /// What the host computes with.
    cpu: Cpu,
    weight_bytes: u64,
    gpu_memory_utilization: f32,
    device: Arc<dyn Device>,
}

impl DeviceBackend {
    /// Takes a checkpoint to the device that `open` gives for the model's shape.
    pub(super) fn load(
        checkpoint: &Checkpoint,
        cpu: Cpu,
        options: &RunnerOptions,
        open: impl FnOnce(&Shape) -> Result<Arc<dyn Device>, Error>,
    ) -> Result<Self, Error> {
        let config = checkpoint.config()?;
        let account = Model::account(&config, checkpoint, None)?;
        let half = half(&account, options)?;
        let shape = Shape::new(&config, half)?;
        let device = open(&shape)?;
        check_room(&account, device.as_ref())?;
        let store = DeviceStore { device: &device, half, cpu: &cpu, num_bytes: Cell::new(0) };
        let model = Model::assemble(&config, checkpoint, &store)?;
        let weight_bytes = store.num_bytes.get();
        let max_tokens = options.max_num_batched_tokens.next_multiple_of(LADDER_STEP);
        let buffers = DeviceBuffers::new(&device, &config, max_tokens)?;
        Ok(Self {
            model,
            shape,
            cache: DeviceCache::new(&device, &config, 0)?,
            buffers,
            plan: StepPlan::default(),
            logits: Activations::new(0, config.vocab_size),
            tokens: Vec::new(),
            staging: Vec::new(),
            graphs: Graphs::default(),
            cpu,
            weight_bytes,
            gpu_memory_utilization: options.gpu_memory_utilization,
            device,
        })
    }
}

/// The type that the model is computed in: what was asked for, or what most of it is stored in.
fn half(account: &Account, options: &RunnerOptions) -> Result<Half, Error> {
    let most = account.stored.iter().max_by_key(|(_, count)| *count).map(|(format, _)| *format);
    let half = match options.precision {
        Some(Precision::Bf16) => Half::Bf16,
        Some(Precision::Fp16) => Half::Fp16,
        None if most == Some(Format::F16) => Half::Fp16,
        None => Half::Bf16,
        Some(other) => {
            return Err(Error::Input(format!(
                "a GPU computes in bf16 or fp16, not in {other}: take one of them, or --devices cpu"
            )));
        }
    };
    match options.kv_cache_dtype {
        Some(given) if given != half.kv_cache_dtype() => Err(Error::Input(format!(
            "a GPU keeps keys and values in the type that the model is computed in, {}, not in {}",
            half.kv_cache_dtype().name(),
            given.name()
        ))),
        _ => Ok(half),
    }
}

/// Refuses a model whose weights the device has no memory for, before it is read.
fn check_room(account: &Account, device: &dyn Device) -> Result<(), Error> {
    let num_parameters: u64 = account.stored.iter().map(|(_, count)| count).sum();
    let (needed, (free, _)) = (2 * num_parameters, device.memory()?);
    if needed <= free {
        return Ok(());
    }
    Err(Error::OutOfMemory(format!(
        "the weights take {} MiB, the GPU has {} MiB free: {} MiB are missing; a smaller model fits, or a GPU with more memory",
        needed >> 20,
        free >> 20,
        (needed - free).div_ceil(1 << 20)
    )))
}

impl Backend for DeviceBackend {
    fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    fn kv_cache_dtype(&self) -> KvCacheDtype {
        self.shape.half.kv_cache_dtype()
    }

    fn kv_bytes_per_block(&self) -> usize {
        bytes_per_block(self.config())
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize) -> Result<(), Error> {
        // Graphs know where it lies, and the one before is given back first.
        self.graphs.clear(self.device.as_ref());
        self.cache = DeviceCache::new(&self.device, &self.model.config, 0)?;
        self.cache = DeviceCache::new(&self.device, &self.model.config, num_blocks)?;
        Ok(())
    }

    fn num_kv_blocks(&self) -> usize {
        self.cache.num_blocks()
    }

    fn kv_cache_room(&self) -> Option<u64> {
        let (free, total) = self.device.memory().ok()?;
        let others = (total as f64 * f64::from(1.0 - self.gpu_memory_utilization)) as u64;
        Some(free.saturating_sub(others))
    }

    /// All of it is taken when it is made.
    fn back(&mut self, _: usize, _: fn() -> Option<u64>) -> Result<(), Error> {
        Ok(())
    }

    fn forward(
        &mut self,
        input: &StepInput,
        choices: &[Option<PlainChoice>],
    ) -> Result<Logits<'_>, Error> {
        let Self { model, shape, cache, buffers, plan, graphs, device, .. } = self;
        let choices = if model.config.vocab_size <= MAX_CHOICES { choices } else { &[] };
        plan.fill(input, choices, (shape, cache.num_blocks()));
        if buffers.prepare(device, plan, (shape, model.config.vocab_size))? {
            graphs.clear(device.as_ref());
        }
        let form = plan.form;
        let step = Forward { device, shape, model, cache, plan, buffers };
        graphs.run(device.as_ref(), form, || step.run())?;
        self.fetch_tokens(choices)?;
        let num_rows = self.plan.num_rows;
        if self.tokens.len() < num_rows || self.tokens.contains(&None) {
            self.fetch_logits(num_rows)?;
        }
        Ok(Logits::new(&self.logits, num_rows, &self.cpu.threads).with_tokens(&self.tokens))
    }
}

impl DeviceBackend {
    /// Steps are launched one by one.
    #[cfg(test)]
    pub(super) fn without_graphs(mut self) -> Self {
        self.graphs.is_off = true;
        self
    }

    /// Steps that are recorded.
    #[cfg(test)]
    pub(super) fn num_graphs(&self) -> usize {
        self.graphs.seen.values().flatten().count()
    }

    /// The tokens that the device has chosen.
    fn fetch_tokens(&mut self, choices: &[Option<PlainChoice>]) -> Result<(), Error> {
        self.staging.resize(choices.len() * size_of::<i32>(), 0);
        if !self.staging.is_empty() {
            self.buffers.tokens().read(&mut self.staging)?;
        }
        let chosen = self.staging.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes));
        self.tokens.clear();
        self.tokens.extend(choices.iter().zip(chosen).map(|(choice, token)| {
            choice.as_ref()?;
            Some(match u32::try_from(token) {
                Ok(token) => Ok(token),
                Err(_) if token == NOT_A_NUMBER => Err(SampleError::NotANumber),
                Err(_) => Err(SampleError::NothingPossible),
            })
        }));
        Ok(())
    }

    /// All rows of logits.
    fn fetch_logits(&mut self, num_rows: usize) -> Result<(), Error> {
        let row_bytes = self.model.config.vocab_size * size_of::<f32>();
        self.staging.resize(num_rows * row_bytes, 0);
        self.buffers.logits().read(&mut self.staging)?;
        self.logits.ensure_rows(num_rows);
        for (row, bytes) in self.staging.chunks_exact(row_bytes).enumerate() {
            for (logit, bytes) in self.logits.row_mut(row).iter_mut().zip(bytes.as_chunks().0) {
                *logit = f32::from_le_bytes(*bytes);
            }
        }
        Ok(())
    }
}

/// Recorded steps, by their forms.
#[derive(Debug, Default)]
struct Graphs {
    /// `None` for a form that was seen once: what runs for the first time does things that can't be recorded, and may never come again.
    seen: HashMap<Form, Option<GraphId>>,
    /// Whether the device could not record.
    is_off: bool,
}

impl Graphs {
    /// Runs a step: recorded, if its form has come before.
    fn run(
        &mut self,
        device: &dyn Device,
        form: Option<Form>,
        work: impl Fn() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(form) = form.filter(|_| !self.is_off) else { return work() };
        match self.seen.get(&form) {
            None => {
                self.seen.insert(form, None);
                work()
            }
            Some(Some(graph)) => device.replay(*graph),
            Some(None) => match device.record(&mut || work()) {
                Ok(graph) => {
                    self.seen.insert(form, Some(graph));
                    device.replay(graph)
                }
                Err(error) => {
                    tracing::warn!(%error, "steps are not recorded as graphs; they are launched one by one");
                    self.is_off = true;
                    work()
                }
            },
        }
    }

    fn clear(&mut self, device: &dyn Device) {
        self.seen.clear();
        device.forget_graphs();
    }
}
