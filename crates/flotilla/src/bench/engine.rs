//! `flotilla bench engine`: tokens per second of the engine alone, against what the machine can do at most.
//!
//! The least time that a batch can take is that of its steps, each of which reads all weights once and
//! multiplies every token with them: whichever takes longer, at the rates that were measured. Attention
//! is left out, so this is less than it takes.

use anyhow::{Context as _, ensure};
use engine::{Device, EngineConfig, Footprint, Gpu, InstructionSet, MachineLimits};
use serde::Serialize;

use self::job::{Job, Measured, Step};
use super::MIB;
use crate::cli::EngineBench;
use crate::columns::{Align, write_table};
use crate::telemetry;

mod cpu;
mod job;

/// Runs `flotilla bench engine`.
pub(super) fn main(options: &EngineBench, json: bool) -> anyhow::Result<()> {
    if options.in_this_process {
        let measured = job::measure(options)?;
        return Ok(telemetry::print(&serde_json::to_string(&measured)?)?);
    }
    let report = Report::measure(options)?;
    let text = if json { serde_json::to_string_pretty(&report)? + "\n" } else { report.table() };
    Ok(telemetry::print(&text)?)
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    /// Numbers of the model.
    parameters: u64,
    /// Memory of its weights.
    weight_bytes: u64,
    /// As they are stored if not given.
    precision: Option<&'static str>,
    kv_cache_dtype: String,
    /// `cpu`, or the name of the GPU.
    device: String,
    /// Of the processor.
    instruction_set: Option<&'static str>,
    input_len: u32,
    output_len: u32,
    threads: usize,
    max_num_batched_tokens: usize,
    limits: Limits,
    rows: Vec<Row>,
}

/// What the machine can do at most.
#[derive(Debug, Serialize)]
struct Limits {
    read_bytes_per_second: f64,
    operations_per_second: f64,
    /// What the weights were kept in when that was measured.
    operations_format: &'static str,
}

/// A batch.
#[derive(Debug, Serialize)]
struct Row {
    batch: u32,
    /// Of the whole job, prompts and answers.
    generated_tokens_per_second: f64,
    /// Tokens of prompts too.
    total_tokens_per_second: f64,
    /// Tokens of prompts, by the time of the steps that have some.
    prefill_tokens_per_second: f64,
    /// Tokens of the steps without any of prompts, by the time of those.
    decode_tokens_per_second: Option<f64>,
    /// From the start of the job: the mean over its sequences.
    time_to_first_token_seconds: f64,
    median_time_to_first_token_seconds: f64,
    /// Loading included.
    peak_memory_bytes: u64,
    /// The least time that the job can take on this machine, by the time that it took.
    share_of_limit: f64,
    /// The same of the steps with prompts.
    prefill_share_of_limit: f64,
    /// The same of the steps without.
    decode_share_of_limit: Option<f64>,
    seconds: f64,
    steps: usize,
    preemptions: u64,
    load_seconds: f64,
    kv_cache_tokens: usize,
    /// CPUs that other processes used meanwhile: above 0.15 or so, measure again.
    other_cpus: Option<f64>,
    /// Of every time that it was measured, the one that counts among them.
    all_generated_tokens_per_second: Vec<f64>,
}

impl Report {
    fn measure(options: &EngineBench) -> anyhow::Result<Self> {
        let model_path = job::find_model(options)?;
        let footprint = Footprint::open(&model_path)?;
        let threads = options.threads.map_or(EngineConfig::default().threads, |n| n as usize);
        let (machine, device, instruction_set) = match options.device {
            Device::Cpu => {
                let set = options.instruction_set.unwrap_or_else(InstructionSet::detect);
                (MachineLimits::measure(threads)?, "cpu".to_owned(), Some(set.name()))
            }
            Device::Gpu(id) => (MachineLimits::of_gpu(id)?, Gpu::find(id)?.name, None),
        };
        let floor = Floor::new(&footprint, options, &machine);
        let batches = options.batch.iter();
        let measured = batches.map(|batch| job::measure_in_process(options, &model_path, *batch));
        let measured = measured.collect::<anyhow::Result<Vec<_>>>()?;
        let rows = options.batch.iter().zip(&measured);
        let rows = rows.map(|(batch, measured)| Row::of(*batch, measured, options, &floor));
        let first = measured.first().context("no batch was measured")?;
        Ok(Self {
            model: engine::model_name(&model_path),
            parameters: footprint.num_parameters(),
            weight_bytes: footprint.weight_bytes(options.precision),
            precision: options.precision.map(engine::Precision::name),
            kv_cache_dtype: first.kv_cache_dtype.clone(),
            device,
            instruction_set,
            input_len: options.input_len,
            output_len: options.output_len,
            threads,
            max_num_batched_tokens: first.max_num_batched_tokens,
            limits: Limits {
                read_bytes_per_second: machine.read_bytes_per_second,
                operations_per_second: machine.operations_per_second,
                operations_format: machine.fastest_format.name(),
            },
            rows: rows.collect::<anyhow::Result<_>>()?,
        })
    }

    fn table(&self) -> String {
        let computes = match self.instruction_set {
            Some(instruction_set) => format!("{} threads, {instruction_set}", self.threads),
            None => self.device.clone(),
        };
        let mut text = format!(
            "{}: {:.0} M parameters, weights {:.0} MiB ({}), KV cache in {}; prompts of {} tokens, \
             answers of {}; {}\nat most here: memory read at {:.1} GB/s, {:.0} GFLOP/s in \
             linear layers ({} weights)\n\n",
            self.model,
            self.parameters as f64 / 1e6,
            self.weight_bytes as f64 / MIB,
            self.precision.unwrap_or("as stored"),
            self.kv_cache_dtype,
            self.input_len,
            self.output_len,
            computes,
            self.limits.read_bytes_per_second / 1e9,
            self.limits.operations_per_second / 1e9,
            self.limits.operations_format,
        );
        let heads = [
            "BATCH",
            "GENERATED/S",
            "TOTAL/S",
            "PREFILL/S",
            "DECODE/S",
            "FIRST TOKEN",
            "PEAK MEMORY",
            "OF THE LIMIT",
            "OTHERS",
        ];
        let heads = heads.map(|head| (head, Align::Right));
        write_table(&mut text, &heads, self.rows.iter().map(Row::cells));
        text
    }
}

impl Row {
    fn of(
        batch: u32,
        measured: &Measured,
        options: &EngineBench,
        floor: &Floor,
    ) -> anyhow::Result<Self> {
        let mut jobs: Vec<&Job> = measured.jobs.iter().collect();
        jobs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let job = jobs.get(jobs.len() / 2).context("nothing was measured")?;
        let prompt_tokens = f64::from(batch) * f64::from(options.input_len);
        let generated = f64::from(batch) * f64::from(options.output_len);
        let counted: u64 = job.steps.iter().map(|step| step.generated).sum();
        ensure!(counted as f64 == generated, "{counted} tokens generated, expected {generated}");
        let (prefill, decode): (Vec<Step>, Vec<Step>) =
            job.steps.iter().partition(|step| step.has_prompts());
        let seconds = |steps: &[Step]| steps.iter().map(|step| step.seconds).sum::<f64>();
        let decoded: u64 = decode.iter().map(|step| step.generated).sum();
        let mut first = job.first_token_seconds.clone();
        first.sort_by(f64::total_cmp);
        Ok(Self {
            batch,
            generated_tokens_per_second: generated / job.seconds,
            total_tokens_per_second: (prompt_tokens + generated) / job.seconds,
            prefill_tokens_per_second: prompt_tokens / seconds(&prefill),
            decode_tokens_per_second: (decoded > 0).then(|| decoded as f64 / seconds(&decode)),
            time_to_first_token_seconds: first.iter().sum::<f64>() / first.len() as f64,
            median_time_to_first_token_seconds: first[first.len() / 2],
            peak_memory_bytes: measured.peak_memory_bytes,
            share_of_limit: floor.seconds(&job.steps) / job.seconds,
            prefill_share_of_limit: floor.seconds(&prefill) / seconds(&prefill),
            decode_share_of_limit: (decoded > 0).then(|| floor.seconds(&decode) / seconds(&decode)),
            seconds: job.seconds,
            steps: job.steps.len(),
            preemptions: job.preemptions,
            load_seconds: measured.load_seconds,
            kv_cache_tokens: measured.kv_cache_tokens,
            other_cpus: job.other_cpus,
            all_generated_tokens_per_second: measured
                .jobs
                .iter()
                .map(|job| generated / job.seconds)
                .collect(),
        })
    }

    fn cells(&self) -> [String; 9] {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        [
            self.batch.to_string(),
            format!("{:.1}", self.generated_tokens_per_second),
            format!("{:.1}", self.total_tokens_per_second),
            format!("{:.1}", self.prefill_tokens_per_second),
            or_dash(self.decode_tokens_per_second.map(|rate| format!("{rate:.1}"))),
            format!("{:.3} s", self.time_to_first_token_seconds),
            format!("{:.1} MiB", self.peak_memory_bytes as f64 / MIB),
            format!("{:.1} %", self.share_of_limit * 100.0),
            or_dash(self.other_cpus.map(|cpus| format!("{cpus:.2} CPU"))),
        ]
    }
}

/// The least time that steps take.
struct Floor {
    /// Numbers that every token is multiplied with.
    body: f64,
    /// Numbers that the tokens are multiplied with whose logits are wanted.
    output: f64,
    /// Seconds of reading each of them once.
    read_seconds: f64,
    operations_per_second: f64,
}

impl Floor {
    fn new(footprint: &Footprint, options: &EngineBench, machine: &MachineLimits) -> Self {
        let config = footprint.config();
        let output = (config.vocab_size * config.hidden_size) as u64;
        // A token's vector is looked up, and most experts are left out.
        let embedding = if config.tie_word_embeddings { 0 } else { output };
        let idle_experts = config.experts.map_or(0, |experts| {
            let layers = config.layers.iter().filter(|layer| layer.experts).count();
            let idle = experts.num_experts.saturating_sub(experts.num_experts_per_token);
            (layers * idle * 3 * config.hidden_size * experts.intermediate_size) as u64
        });
        let all = footprint.num_parameters();
        let used = all.saturating_sub(embedding + idle_experts);
        let weight_bytes = footprint.weight_bytes(options.precision) as f64;
        Self {
            body: used.saturating_sub(output) as f64,
            output: output as f64,
            read_seconds: weight_bytes * used as f64 / all as f64 / machine.read_bytes_per_second,
            operations_per_second: machine.operations_per_second,
        }
    }

    fn seconds(&self, steps: &[Step]) -> f64 {
        let step = |step: &Step| {
            let products = self.body * step.tokens as f64 + self.output * step.generated as f64;
            self.read_seconds.max(2.0 * products / self.operations_per_second)
        };
        steps.iter().map(step).sum()
    }
}
