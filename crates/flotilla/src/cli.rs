//! The command line. Each option is documented once, here or in its role's `Args`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::{Device, EngineConfig, InstructionSet, KvCacheDtype, Precision};
use producer::{RetrievalConfig, SourceConfig};

use crate::hub::{HubOptions, Need};

mod bench;
pub(crate) mod fleet;
mod generation;
mod model_path;

pub(crate) use bench::{BenchCommand, BenchOptions, EngineBench, QueueBench};
pub(crate) use generation::GenerationOptions;
pub(crate) use model_path::ModelPath;

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
    ///
    /// Exit codes as of `run`.
    Contexts(Box<ContextsOptions>),
    /// Turn queries into jobs on the queue, from a file, stdin, a growing file or HTTP.
    ///
    /// The same command run again adds nothing twice: what has its line is left out where a collector
    /// of the run is running, and the output gets one line for each id in any case. An id that is queued
    /// already keeps the question it came with. Exit codes: 0 all published, 1 failed, 2 wrong usage,
    /// 3 published but some input could not be read, 130 interrupted before the end of the input;
    /// --follow and --listen end by Ctrl-C, with 0 or 3.
    Produce(Box<fleet::ProduceOptions>),
    /// Answer jobs of the queue on this machine, until SIGTERM or Ctrl-C.
    ///
    /// A machine joins the fleet with this command and leaves it at any time: its jobs go to the
    /// others. Exit codes: 0 ended as told, 1 failed, 2 wrong usage, 130 interrupted twice.
    Work(Box<fleet::WorkOptions>),
    /// Write the answers of a run to its output, each exactly once, until SIGTERM or Ctrl-C.
    ///
    /// A second collector of the same output waits until the first is gone, and takes over; one of the
    /// same run with another output is refused while the first runs. Exit codes: 0 ended as told,
    /// 1 failed, or lines are missing at the end of the run, 2 wrong usage; with --until-done also 3
    /// when some jobs failed, and 130 interrupted before.
    Collect(Box<fleet::CollectOptions>),
    /// Show what the fleet is doing: runs, and workers.
    ///
    /// PUBLISHED counts jobs and input that failed before it became one; QUEUED are jobs that wait,
    /// IN FLIGHT those that workers hold, UNWRITTEN answers on their way to the output. DONE are the
    /// output's lines, those with FAILED among them; DEAD are failed jobs that `flotilla retry` can put
    /// back. A STATE of "lines missing" says that nothing is left to do and the output lacks lines all
    /// the same. Exit codes: 0 shown, 1 no server or no such run, 2 wrong usage.
    Status(Box<fleet::StatusOptions>),
    /// Put the failed jobs of a run back to the queue, and take their lines out of the output.
    ///
    /// The lines are kept in `<output>.retried.jsonl`. The run's collector must be running, or
    /// --output-file given. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    Retry(Box<fleet::RetryOptions>),
    /// Publish those queries again that have no line in the output.
    ///
    /// For a queue that lost what it had stored: after a power failure, or a wiped disk. Failed jobs
    /// have their line and stay failed; one whose line was lost is published again, like any other. Exit codes as of `produce`.
    Reconcile(Box<fleet::ReconcileOptions>),
    /// Say what models are: architecture, size, memory at each precision, how many sequences fit into
    /// this machine's free memory; or why one can't be loaded.
    ///
    /// Nothing is loaded: configuration and headers say it all. Exit codes: 0 all can be loaded, 1 at
    /// least one can't.
    Models(ModelsOptions),
    /// Drop what is queued of a run, for ever: its jobs wait for a model that nobody has, or it was a
    /// mistake.
    ///
    /// What is written stays, and what workers hold may still get its line. Its producers must have ended.
    /// Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    Cancel(fleet::CancelOptions),
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
    #[command(flatten)]
    pub(crate) model_path: ModelPath,
}

/// Which model runs, and how.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelOptions {
    #[command(flatten)]
    pub(crate) model_path: ModelPath,
    /// Where inference runs.
    #[arg(long, value_enum, default_value_t = InferenceType::Local)]
    pub(crate) inference_type: InferenceType,
    /// Devices to compute on, one engine each: cpu, numbers of GPUs such as 0,1, their names (GPU-…), or all: the GPUs that
    /// CUDA_VISIBLE_DEVICES leaves, or the processor where there is none or the program was built without CUDA.
    #[arg(long, value_name = "DEVICES", env = "FLOTILLA_DEVICES", default_value = "all")]
    pub(crate) devices: String,
    /// Share of a GPU's memory that weights and KV cache may take, what others have taken counted in.
    #[arg(long, value_name = "SHARE", default_value_t = EngineConfig::default().gpu_memory_utilization)]
    pub(crate) gpu_memory_utilization: f32,
    /// Folder for kernels that were compiled for a model and a GPU [default: kernels in flotilla's cache folder].
    #[arg(long, value_name = "DIR", env = "FLOTILLA_KERNEL_CACHE")]
    pub(crate) kernel_cache: Option<PathBuf>,
    /// How weights are kept in memory: fp32, fp16, bf16, or quantised while loading to q8_0, int8 (the fastest
    /// with AMX or AVX-512 VNNI), q6_k or q4_k [default: as the checkpoint stores them].
    #[arg(long, value_name = "NAME", value_parser = named(&Precision::ALL, Precision::name))]
    pub(crate) precision: Option<Precision>,
    /// How the KV cache keeps keys and values [default: fp16, fp32 beside weights in fp32].
    #[arg(long, value_name = "NAME", value_parser = named(&KvCacheDtype::ALL, KvCacheDtype::name))]
    pub(crate) kv_cache_dtype: Option<KvCacheDtype>,
    /// Most sequences that a worker computes at once [default: 32, on a GPU 256].
    #[arg(long, visible_alias = "batch-size", value_name = "N", value_parser = at_least(1))]
    pub(crate) max_num_seqs: Option<usize>,
    /// Most tokens that a worker computes in one step [default: 512, on a GPU 8192].
    #[arg(long, value_name = "N", value_parser = at_least(1))]
    pub(crate) max_num_batched_tokens: Option<usize>,
    /// Longest sequence, prompt and answer, in tokens [default: the model's window].
    #[arg(long, value_name = "N", value_parser = at_least(2))]
    pub(crate) max_model_len: Option<usize>,
    /// Memory of a worker's KV cache, in MiB [default: from the free memory].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=MAX_MEMORY_MIB))]
    pub(crate) kv_cache_memory: Option<u64>,
    /// Threads of all workers together [default: the cores].
    #[arg(long, value_name = "N", value_parser = at_least(1))]
    pub(crate) threads: Option<usize>,
    /// What computes: amx, avx512-vnni, avx512, avx2 or portable, as far as the machine has it [default: the best].
    #[arg(long, value_name = "NAME")]
    pub(crate) instruction_set: Option<InstructionSet>,
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

/// Options of `flotilla models`.
#[derive(Args, Debug)]
pub(crate) struct ModelsOptions {
    /// Models as --model-path of `run` takes them: folders, GGUF files, ORG/NAME at the Hub.
    #[arg(required = true, value_name = "MODEL")]
    pub(crate) models: Vec<String>,
    /// Print a line of JSON for each.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) hub: HubOptions,
}

impl ModelOptions {
    /// The devices to compute on.
    pub(crate) fn devices(&self) -> Result<Vec<Device>, Usage> {
        let devices = gpu_worker::devices(&self.devices);
        devices.map_err(|error| Usage(format!("--devices: {error}")))
    }

    /// The settings of each of `num_engines` engines, whichever device it is on.
    pub(crate) fn engine_config(&self, num_engines: usize) -> anyhow::Result<EngineConfig> {
        if self.batch_timeout.is_some() {
            tracing::warn!("--batch-timeout has no effect: a sequence never waits for a batch");
        }
        if self.api_key.is_some() || self.api_model_name.is_some() {
            tracing::warn!("--api-key and --api-model-name have no effect on local inference");
        }
        let InferenceType::Local = self.inference_type;
        let defaults = EngineConfig::default();
        let threads = self.threads.unwrap_or(defaults.threads).div_ceil(num_engines.max(1));
        let config = EngineConfig {
            model_path: self.model_path.find(Need::Model)?,
            max_model_len: self.max_model_len,
            kv_cache_memory_bytes: self.kv_cache_memory.map(|mib| mib << 20),
            threads,
            enable_prefix_caching: !self.no_prefix_caching,
            precision: self.precision,
            kv_cache_dtype: self.kv_cache_dtype,
            instruction_set: self.instruction_set,
            gpu_memory_utilization: self.gpu_memory_utilization,
            kernel_cache: self.kernel_cache.clone().or_else(kernel_cache),
            ..defaults
        };
        config.validate().map_err(|error| Usage(error.to_string()))?;
        Ok(config)
    }

    /// The settings of an engine on a device.
    pub(crate) fn on(&self, device: Device, config: &EngineConfig) -> EngineConfig {
        let usual = EngineConfig::for_device(device);
        EngineConfig {
            max_num_seqs: self.max_num_seqs.unwrap_or(usual.max_num_seqs),
            max_num_batched_tokens: self
                .max_num_batched_tokens
                .unwrap_or(usual.max_num_batched_tokens),
            device,
            ..config.clone()
        }
    }
}

/// The usual folder for kernels that were compiled for a GPU.
pub(crate) fn kernel_cache() -> Option<PathBuf> {
    producer::RetrievalConfig::default().resolved_cache_dir().map(|cache| cache.join("kernels"))
}

/// Options that parse but can't be meant; the program ends with the exit code for wrong usage.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// More memory than any machine has, in MiB.
const MAX_MEMORY_MIB: u64 = 1 << 30;

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

/// Takes a whole number that is not too small.
fn at_least(
    least: usize,
) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = text.parse().ok().filter(|number| *number >= least);
        number.ok_or_else(|| format!("expected a whole number of at least {least}"))
    }
}

/// Takes one of these names, which the help lists.
fn named<T>(all: &'static [T], name: fn(T) -> &'static str) -> impl TypedValueParser<Value = T>
where
    T: Clone
        + Copy
        + FromStr<Err: std::error::Error + Send + Sync + 'static>
        + Send
        + Sync
        + 'static,
{
    let names = all.iter().map(move |item| name(*item));
    PossibleValuesParser::new(names).try_map(|text| text.parse::<T>())
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
    fn a_number_that_is_too_small_is_refused_under_the_options_name() {
        for (option, expected) in [
            ("--max-num-seqs 0", "'--max-num-seqs <N>': expected a whole number of at least 1"),
            ("--batch-size 0", "'--max-num-seqs <N>': expected a whole number of at least 1"),
            ("--max-num-batched-tokens 0", "'--max-num-batched-tokens <N>'"),
            ("--max-model-len 1", "'--max-model-len <N>': expected a whole number of at least 2"),
            ("--threads x", "'--threads <N>': expected a whole number of at least 1"),
            ("--kv-cache-memory 0", "'--kv-cache-memory <MIB>'"),
        ] {
            let args = format!("flotilla run --queries-file q --output-file o {option}");
            let error = Cli::try_parse_from(args.split(' ')).unwrap_err().to_string();
            assert!(error.contains(expected), "{option}: {error}");
        }
    }

    #[test]
    fn underscores_of_option_names_become_hyphens_and_values_stay() {
        let args = "flotilla run --output_file=a_b.jsonl --stop --x_y --start_index 1 -- --a_b";
        let hyphens = "flotilla run --output-file=a_b.jsonl --stop --x_y --start-index 1 -- --a_b";
        let args = args.split(' ').map(OsString::from);
        assert_eq!(hyphenated(args), hyphens.split(' ').collect::<Vec<_>>());
    }
}
