//! One measurement of `flotilla bench engine`: a batch of prompts, from the first step to the last answer.
//!
//! It runs in a process of its own and hands what it saw to the one that reports.

use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use engine::{Engine, EngineConfig, Request, SamplingParams, StepOutput};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

use super::cpu::CpuTime;
use crate::cli::{EngineBench, ModelPath, kernel_cache};
use crate::hub::Need;
use crate::statistics::peak_memory_bytes_of;

/// Tokens of a prompt of the warm-up, and of its answer.
const WARM_UP: (usize, usize) = (64, 4);

/// What a process measured.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Measured {
    /// The same batch, time after time, with other prompts.
    pub(super) jobs: Vec<Job>,
    /// Most memory that the process had resident, loading included.
    pub(super) peak_memory_bytes: u64,
    /// Seconds that loading took.
    pub(super) load_seconds: f64,
    /// Tokens that the KV cache holds.
    pub(super) kv_cache_tokens: usize,
    /// How it keeps them.
    pub(super) kv_cache_dtype: String,
    /// Most tokens of a step.
    pub(super) max_num_batched_tokens: usize,
}

/// A batch that was answered.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Job {
    /// From the first step to the last answer.
    pub(super) seconds: f64,
    pub(super) steps: Vec<Step>,
    /// Until each sequence's first token.
    pub(super) first_token_seconds: Vec<f64>,
    /// Sequences that lost their blocks meanwhile.
    pub(super) preemptions: u64,
    /// CPUs that other processes used meanwhile, where the system tells.
    pub(super) other_cpus: Option<f64>,
}

/// A step of the engine.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(super) struct Step {
    pub(super) seconds: f64,
    /// Tokens computed.
    pub(super) tokens: u64,
    /// Tokens generated: rows of logits.
    pub(super) generated: u64,
}

impl Step {
    /// Whether parts of prompts were computed in it.
    pub(super) fn has_prompts(self) -> bool {
        self.tokens > self.generated
    }
}

/// Measures the one batch of these options, here.
pub(super) fn measure(options: &EngineBench) -> anyhow::Result<Measured> {
    let &[batch] = &options.batch[..] else { bail!("expected one batch in a process") };
    let config = engine_config(options, batch)?;
    let start = Instant::now();
    let mut engine = Engine::load(&config)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let (input_len, output_len) = (options.input_len as usize, options.output_len as usize);
    let most = engine.max_model_len();
    ensure!(
        input_len + output_len <= most,
        "{input_len} tokens and {output_len} more don't fit: model and KV cache hold {most}"
    );
    let warm_up = (input_len.min(WARM_UP.0), output_len.min(WARM_UP.1));
    let (mut prompts, mut others) = (Prompts::new(&engine, 0), Prompts::new(&engine, u64::MAX));
    answer(&mut engine, &mut others, batch, warm_up)?;
    let jobs = (0..options.repeat)
        .map(|_| answer(&mut engine, &mut prompts, batch, (input_len, output_len)))
        .collect::<anyhow::Result<_>>()?;
    Ok(Measured {
        jobs,
        peak_memory_bytes: peak_memory_bytes_of(std::process::id()),
        load_seconds,
        kv_cache_tokens: engine.stats().kv_blocks_total * engine::step::BLOCK_SIZE,
        kv_cache_dtype: engine.kv_cache_dtype().to_string(),
        max_num_batched_tokens: config.max_num_batched_tokens,
    })
}

/// The settings of the engine for a batch.
fn engine_config(options: &EngineBench, batch: u32) -> anyhow::Result<EngineConfig> {
    let defaults = EngineConfig::for_device(options.device);
    Ok(EngineConfig {
        model_path: find_model(options)?,
        max_num_seqs: options.max_num_seqs.unwrap_or(batch) as usize,
        max_num_batched_tokens: options
            .max_num_batched_tokens
            .map_or(defaults.max_num_batched_tokens, |tokens| tokens as usize),
        kv_cache_memory_bytes: options.kv_cache_memory.map(|mib| mib << 20),
        threads: options.threads.map_or(defaults.threads, |threads| threads as usize),
        precision: options.precision,
        kv_cache_dtype: options.kv_cache_dtype,
        instruction_set: options.instruction_set,
        kernel_cache: kernel_cache(),
        ..defaults
    })
}

/// The model on this machine.
pub(super) fn find_model(options: &EngineBench) -> anyhow::Result<std::path::PathBuf> {
    let model_path = options.model.clone().or_else(|| options.model_path.model_path.clone());
    ModelPath { model_path, ..options.model_path.clone() }.find(Need::Model)
}

/// Random prompts, always the same ones for a seed, and none like another.
struct Prompts {
    random: StdRng,
    vocab_size: u32,
}

impl Prompts {
    fn new(engine: &Engine, seed: u64) -> Self {
        let vocab_size = u32::try_from(engine.model_config().vocab_size).unwrap_or(u32::MAX);
        Self { random: StdRng::seed_from_u64(seed), vocab_size }
    }

    fn prompt(&mut self, len: usize) -> Vec<u32> {
        (0..len).map(|_| self.random.random_range(0..self.vocab_size)).collect()
    }
}

/// Answers a batch of prompts, all of which are there from the start.
fn answer(
    engine: &mut Engine,
    prompts: &mut Prompts,
    batch: u32,
    (input_len, output_len): (usize, usize),
) -> anyhow::Result<Job> {
    let requests: Vec<Request> = (0..batch)
        .map(|id| Request {
            id: u64::from(id),
            prompt: prompts.prompt(input_len),
            sampling: SamplingParams {
                max_new_tokens: output_len,
                temperature: 0.0,
                ignore_eos: true,
                ..SamplingParams::default()
            },
        })
        .collect();
    let before = engine.stats();
    let cpu = CpuTime::now();
    let start = Instant::now();
    for request in requests {
        engine.add(request)?;
    }
    let (mut steps, mut first_token_seconds) = (Vec::new(), Vec::new());
    while engine.has_unfinished() {
        let (step_start, last) = (Instant::now(), engine.stats());
        for output in engine.step()? {
            match output {
                StepOutput::Finished(finished) => {
                    let count = finished.token_ids.len();
                    ensure!(count == output_len, "an answer of {count} tokens");
                    ensure!(finished.cached_tokens == 0, "a prompt was cached");
                    first_token_seconds.push(finished.timing.first_token.as_secs_f64());
                }
                StepOutput::Failed { reason, .. } => bail!("a prompt has no answer: {reason}"),
            }
        }
        let now = engine.stats();
        steps.push(Step {
            seconds: step_start.elapsed().as_secs_f64(),
            tokens: now.computed_tokens - last.computed_tokens,
            generated: now.generation_tokens - last.generation_tokens,
        });
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Job {
        seconds,
        steps,
        first_token_seconds,
        preemptions: engine.stats().num_preemptions - before.num_preemptions,
        other_cpus: cpu.and_then(|cpu| cpu.used_by_others()),
    })
}

/// Runs this program again for one batch and reads what it measured.
pub(super) fn measure_in_process(
    options: &EngineBench,
    model_path: &std::path::Path,
    batch: u32,
) -> anyhow::Result<Measured> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = std::process::Command::new(program);
    command.args(["bench", "engine", "--in-this-process", "--model-path"]).arg(model_path);
    let mut option = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            command.args([name, &value]);
        }
    };
    option("--input-len", Some(options.input_len.to_string()));
    option("--output-len", Some(options.output_len.to_string()));
    option("--batch", Some(batch.to_string()));
    option("--precision", options.precision.map(|precision| precision.to_string()));
    option("--kv-cache-dtype", options.kv_cache_dtype.map(|dtype| dtype.to_string()));
    option("--instruction-set", options.instruction_set.map(|set| set.to_string()));
    option("--threads", options.threads.map(|threads| threads.to_string()));
    option("--max-num-seqs", options.max_num_seqs.map(|seqs| seqs.to_string()));
    option("--device", Some(options.device.to_string()));
    let max_num_batched_tokens = options.max_num_batched_tokens;
    option("--max-num-batched-tokens", max_num_batched_tokens.map(|tokens| tokens.to_string()));
    option("--kv-cache-memory", options.kv_cache_memory.map(|mib| mib.to_string()));
    option("--repeat", Some(options.repeat.to_string()));
    let output = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot run this program again")?;
    ensure!(output.status.success(), "the measurement ended with {}", output.status);
    serde_json::from_slice(&output.stdout).context("the measurement left no figures")
}
