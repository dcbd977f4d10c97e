//! The command line. Each option is documented once, here or in its role's `Args`.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::EngineConfig;
use producer::{RetrievalConfig, SourceConfig};
use shared::Generation;

pub(crate) mod fleet;

/// The model that ships with flotilla.
const SHIPPED_MODEL: &str = "models/flotilla-reader";

/// Answers files of queries with local models, each query exactly once.
#[derive(Debug, Parser)]
#[command(name = "flotilla", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Log what happens to every job.
    #[arg(long, global = true)]
    pub(crate) verbose: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer queries: retrieve a context for each, run the model, write one line each.
    ///
    /// The same command run again goes on where it stopped. Exit codes: 0 all answered, 1 failed,
    /// 2 wrong usage, 3 finished but some jobs failed or some input could not be read,
    /// 130 interrupted.
    Run(Box<RunOptions>),
    /// Retrieve a context for each query and write them to a file, without running a model.
    Contexts(Box<ContextsOptions>),
    /// Turn queries into jobs on the queue, from a file, stdin, a growing file or HTTP.
    ///
    /// The same command run again adds nothing twice: the output gets one line for each id. Exit codes
    /// as of `run`.
    Produce(Box<fleet::ProduceOptions>),
    /// Answer jobs of the queue on this machine, until SIGTERM or Ctrl-C.
    ///
    /// A machine joins the fleet with this command and leaves it at any time: its jobs go to the
    /// others.
    Work(Box<fleet::WorkOptions>),
    /// Write the answers of a run to its output, each exactly once, until SIGTERM or Ctrl-C.
    ///
    /// A second collector of the same output waits until the first is gone, and takes over.
    Collect(Box<fleet::CollectOptions>),
    /// Show what the fleet is doing: runs, and workers.
    Status(Box<fleet::StatusOptions>),
    /// Put the failed jobs of a run back to the queue, and take their lines out of the output.
    ///
    /// The lines are kept in `<output>.retried.jsonl`. The run's collector must be running, or
    /// --output-file given.
    Retry(Box<fleet::RetryOptions>),
    /// Publish those queries again that are neither in the output nor among the failed jobs.
    ///
    /// For a queue that lost what it had stored: after a power failure, or a wiped disk.
    Reconcile(Box<fleet::ReconcileOptions>),
    /// Measure flotilla on this machine.
    Bench(BenchOptions),
}

/// Options of `flotilla run`.
#[derive(Args, Debug)]
pub(crate) struct RunOptions {
    #[command(flatten)]
    pub(crate) source: SourceConfig,
    #[command(flatten)]
    pub(crate) retrieval: RetrievalConfig,
    /// JSONL file that gets one line for each query. Lines that are there are kept and their
    /// queries skipped.
    #[arg(long, value_name = "FILE")]
    pub(crate) output_file: PathBuf,
    /// JSON file that gets the run's statistics at its end.
    #[arg(long, value_name = "FILE")]
    pub(crate) statistics_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) model: ModelOptions,
    #[command(flatten)]
    pub(crate) generation: GenerationOptions,
    /// Workers in this process, each with a model of its own; with --nats-url also 0, where others
    /// work.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub(crate) workers: u32,
    /// Deliveries after which a job that keeps taking its worker down is given up; the last one is
    /// alone in its worker.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) max_attempts: u32,
    #[command(flatten)]
    pub(crate) servers: fleet::RunServers,
}

/// Options of `flotilla contexts`.
#[derive(Args, Debug)]
pub(crate) struct ContextsOptions {
    #[command(flatten)]
    pub(crate) source: SourceConfig,
    #[command(flatten)]
    pub(crate) retrieval: RetrievalConfig,
    /// JSONL file to write the contexts to; replaced if it exists.
    #[arg(long, value_name = "FILE")]
    pub(crate) output_file: PathBuf,
    /// Folder of the model whose tokenizer counts the tokens for --max-tokens [default: the
    /// shipped model].
    #[arg(long, env = "FLOTILLA_MODEL_PATH", value_name = "DIR")]
    pub(crate) model_path: Option<PathBuf>,
}

/// Which model runs, and how.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelOptions {
    /// Folder with the model: config.json, safetensors, tokenizer.json [default: the shipped
    /// model].
    #[arg(long, env = "FLOTILLA_MODEL_PATH", value_name = "DIR")]
    pub(crate) model_path: Option<PathBuf>,
    /// Where inference runs.
    #[arg(long, value_enum, default_value_t = InferenceType::Local)]
    pub(crate) inference_type: InferenceType,
    /// Precision to compute in. The CPU computes in fp32 whatever is asked for.
    #[arg(long, value_enum, default_value_t = Precision::Fp32)]
    pub(crate) precision: Precision,
    /// Most sequences that a worker computes at once.
    #[arg(long, visible_alias = "batch-size", value_name = "N", default_value_t = EngineConfig::default().max_num_seqs)]
    pub(crate) max_num_seqs: usize,
    /// Most tokens that a worker computes in one step.
    #[arg(long, value_name = "N", default_value_t = EngineConfig::default().max_num_batched_tokens)]
    pub(crate) max_num_batched_tokens: usize,
    /// Longest sequence, prompt and answer, in tokens [default: the model's window].
    #[arg(long, value_name = "N")]
    pub(crate) max_model_len: Option<usize>,
    /// Memory of a worker's KV cache, in MiB [default: from the free memory].
    #[arg(long, value_name = "MIB")]
    pub(crate) kv_cache_memory: Option<u64>,
    /// Threads of all workers together [default: the cores].
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Compute every prompt from its start, even where another shares its beginning.
    #[arg(long)]
    pub(crate) no_prefix_caching: bool,
    /// Accepted for older scripts; sequences join a running batch at once, so nothing waits.
    #[arg(long, value_name = "SECONDS", hide = true)]
    pub(crate) batch_timeout: Option<f64>,
    /// Accepted for older scripts; local inference needs no key.
    #[arg(long, value_name = "KEY", hide = true, hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Accepted for older scripts; local inference takes --model-path.
    #[arg(long, value_name = "NAME", hide = true)]
    pub(crate) api_model_name: Option<String>,
}

/// Where inference runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum InferenceType {
    /// On this machine.
    Local,
}

/// Precision of weights and arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Precision {
    /// 32-bit floating point.
    Fp32,
    /// 16-bit floating point.
    Fp16,
    /// 16-bit floating point with the range of 32.
    Bf16,
}

/// How answers are generated.
#[derive(Args, Clone, Debug)]
pub(crate) struct GenerationOptions {
    /// Most tokens of an answer.
    #[arg(long, value_name = "N", default_value_t = 512, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_new_tokens: u32,
    /// Sampling temperature; 0 takes the most likely token.
    #[arg(long, value_name = "T", default_value_t = 0.2, allow_negative_numbers = true, value_parser = parse_temperature)]
    pub(crate) temperature: f32,
    /// Sample among the most likely tokens whose probabilities add up to this.
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true, value_parser = parse_top_p)]
    pub(crate) top_p: f32,
    /// Sample among this many most likely tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub(crate) top_k: u32,
    /// Text that ends an answer and is not part of it; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Seed of the run; each job's own comes from it and the job's id.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// System prompt.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system_prompt: Option<String>,
    /// Jinja template of the user message, with `context`, `query`, `id`, `target_api` and
    /// `dependencies`. Its text can't be control tokens: those come from the model's chat template.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_template: Option<PathBuf>,
}

/// Options of `flotilla bench`.
#[derive(Args, Debug)]
pub(crate) struct BenchOptions {
    /// What to measure.
    #[command(subcommand)]
    pub(crate) what: Option<BenchCommand>,
    /// Print JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Answers and tokens per second of the whole run in one process [the default, with `memory`].
    Run {
        /// Queries to answer.
        #[arg(long, default_value_t = 500)]
        queries: u64,
        /// Folder with the model [default: the shipped model].
        #[arg(long, env = "FLOTILLA_MODEL_PATH", value_name = "DIR")]
        model_path: Option<PathBuf>,
    },
    /// Peak memory of a run, for several numbers of queries.
    Memory {
        /// Numbers of queries.
        #[arg(long, value_delimiter = ',', default_values_t = [1_000, 100_000])]
        queries: Vec<u64>,
    },
    /// Contexts per second, from a corpus made for it.
    Retrieval {
        /// Documents of the corpus.
        #[arg(long, default_value_t = 50_000)]
        documents: usize,
        /// Queries to retrieve for.
        #[arg(long, default_value_t = 10_000)]
        queries: usize,
    },
    /// Jobs per second through the queue: all roles with their servers, and workers that do nothing.
    Queue(QueueBench),
}

/// Options of `flotilla bench queue`.
#[derive(Args, Clone, Debug)]
pub(crate) struct QueueBench {
    /// Jobs of about 1 KB.
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub(crate) jobs: u64,
    /// Worker processes.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) workers: u32,
    /// The nats-server to start [default: the one that scripts/servers.sh fetched, or on PATH].
    #[arg(long, value_name = "FILE")]
    pub(crate) nats_server: Option<PathBuf>,
    /// The redis-server to start [default: the one on PATH].
    #[arg(long, value_name = "FILE")]
    pub(crate) redis_server: Option<PathBuf>,
    /// Let the NATS server sync every message to disk before it confirms it.
    #[arg(long)]
    pub(crate) sync_always: bool,
}

impl ModelOptions {
    /// The settings of each of `workers` engines.
    pub(crate) fn engine_config(&self, workers: u32) -> anyhow::Result<EngineConfig> {
        if self.batch_timeout.is_some() {
            tracing::warn!("--batch-timeout has no effect: a sequence never waits for a batch");
        }
        if self.api_key.is_some() || self.api_model_name.is_some() {
            tracing::warn!("--api-key and --api-model-name have no effect on local inference");
        }
        if self.precision != Precision::Fp32 {
            tracing::warn!("the CPU computes in fp32, whatever --precision says");
        }
        let InferenceType::Local = self.inference_type;
        let defaults = EngineConfig::default();
        let threads = self.threads.unwrap_or(defaults.threads).div_ceil(workers.max(1) as usize);
        let config = EngineConfig {
            model_path: model_path(self.model_path.as_ref())?,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_model_len: self.max_model_len,
            kv_cache_memory_bytes: self.kv_cache_memory.map(|mib| mib << 20),
            threads,
            enable_prefix_caching: !self.no_prefix_caching,
        };
        config.validate().map_err(|error| Usage(error.to_string()))?;
        Ok(config)
    }
}

impl GenerationOptions {
    /// What every job is told; the seed is the run's.
    pub(crate) fn generation(&self) -> Generation {
        Generation {
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            stop: self.stop.clone(),
            seed: self.seed,
        }
    }

    /// The text of the prompt template, checked.
    pub(crate) fn template(&self) -> anyhow::Result<Option<String>> {
        let Some(path) = &self.prompt_template else { return Ok(None) };
        let source = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the prompt template {}", path.display()))?;
        engine::UserTemplate::new(&source)
            .with_context(|| format!("the prompt template {} is wrong", path.display()))?;
        Ok(Some(source))
    }
}

/// Options that parse but can't be meant; the program ends with the exit code for wrong usage.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// The folder of the model: the one given, or the shipped one, looked for in this folder and in
/// those above the program.
pub(crate) fn model_path(given: Option<&PathBuf>) -> anyhow::Result<PathBuf> {
    if let Some(path) = given {
        ensure!(
            path.join("config.json").is_file(),
            "{} is not a model: expected a folder with config.json, model.safetensors and \
             tokenizer.json",
            path.display()
        );
        return Ok(path.clone());
    }
    let program = std::env::current_exe().unwrap_or_default();
    let candidates = std::iter::once(PathBuf::new()).chain(program.ancestors().map(PathBuf::from));
    for folder in candidates {
        let path = folder.join(SHIPPED_MODEL);
        if path.join("config.json").is_file() {
            return Ok(path);
        }
    }
    bail!(
        "the shipped model {SHIPPED_MODEL} is neither here nor beside the program; give --model-path"
    );
}

/// Options whose value may begin with a hyphen, and is left as it is.
const TEXT_OPTIONS: [&str; 2] = ["--stop", "--system-prompt"];

/// The arguments with `_` in option names turned into `-`, as older scripts spell them.
pub(crate) fn hyphenated(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut only_values = false;
    let mut is_value = false;
    args.map(|arg| {
        only_values |= arg == "--";
        let arg = match arg.to_str() {
            Some(text) if text.starts_with("--") && !only_values && !is_value => {
                let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
                OsString::from(name.replace('_', "-") + value)
            }
            _ => arg,
        };
        is_value = !is_value && TEXT_OPTIONS.iter().any(|option| arg == *option);
        arg
    })
    .collect()
}

fn parse_temperature(text: &str) -> Result<f32, String> {
    match text.parse() {
        Ok(value) if f32::is_finite(value) && value >= 0.0 => Ok(value),
        _ => Err("expected a number of at least 0".to_owned()),
    }
}

fn parse_top_p(text: &str) -> Result<f32, String> {
    match text.parse() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("expected a number above 0 and at most 1".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn underscores_of_option_names_become_hyphens_and_values_stay() {
        let args = "flotilla run --output_file=a_b.jsonl --stop --x_y --start_index 1 -- --a_b";
        let hyphens = "flotilla run --output-file=a_b.jsonl --stop --x_y --start-index 1 -- --a_b";
        let args = args.split(' ').map(OsString::from);
        assert_eq!(hyphenated(args), hyphens.split(' ').collect::<Vec<_>>());
    }
}
