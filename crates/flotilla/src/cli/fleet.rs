//! The options of the fleet's commands: produce, work, collect, status, retry, reconcile, cancel.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, ValueEnum};
use collector::Step;
use producer::{FollowConfig, RetrievalConfig, SourceConfig};
use shared::RunId;

use super::{GenerationOptions, ModelOptions, ModelPath};

/// Options of `flotilla produce`.
#[derive(Args, Debug)]
pub(crate) struct ProduceOptions {
    #[command(flatten)]
    pub(crate) jobs: JobOptions,
    #[command(flatten)]
    pub(crate) follow: FollowConfig,
    /// Take queries over HTTP at this address: POST /v1/queries with one query, an array or JSONL.
    /// 202 when they are durably queued, 429 when the queue stays full.
    #[arg(long, value_name = "ADDR", requires = "run", conflicts_with_all = ["queries_file", "contexts_file", "follow"])]
    pub(crate) listen: Option<SocketAddr>,
    /// Token that requests must bring as `Authorization: Bearer TOKEN`. Without it, only an address
    /// of this machine can be listened on.
    #[arg(
        long,
        env = "FLOTILLA_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true,
        requires = "listen"
    )]
    pub(crate) token: Option<String>,
    /// JSONL file that gets the input that can have no line, with file, line and reason. By default
    /// it has the name of the queries file and `.rejected.jsonl`; stdin and --listen have none.
    #[arg(long, value_name = "FILE")]
    pub(crate) rejected_file: Option<PathBuf>,
    /// Jobs published at a time without waiting for their confirmation.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = parse_window)]
    pub(crate) window: usize,
    #[command(flatten)]
    pub(crate) metrics: MetricsOptions,
    #[command(flatten)]
    pub(crate) nats: NatsOptions,
}

/// What becomes jobs, and what all of them have in common.
#[derive(Args, Debug)]
pub(crate) struct JobOptions {
    #[command(flatten)]
    pub(crate) source: SourceConfig,
    #[command(flatten)]
    pub(crate) model_path: ModelPath,
    #[command(flatten)]
    pub(crate) retrieval: RetrievalConfig,
    #[command(flatten)]
    pub(crate) generation: GenerationOptions,
    #[command(flatten)]
    pub(crate) run: RunOption,
    #[command(flatten)]
    pub(crate) model: ModelName,
}

/// Options of `flotilla work`.
#[derive(Args, Debug)]
pub(crate) struct WorkOptions {
    #[command(flatten)]
    pub(crate) model: ModelOptions,
    /// Deliveries after which a job that keeps taking its worker down is given up; the last one is
    /// alone in its worker.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) max_attempts: u32,
    /// Seconds that running jobs get to finish after SIGTERM or Ctrl-C; then they go back to the
    /// queue.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_seconds)]
    pub(crate) drain_timeout: Duration,
    #[command(flatten)]
    pub(crate) hidden: TestOptions,
    #[command(flatten)]
    pub(crate) metrics: MetricsOptions,
    #[command(flatten)]
    pub(crate) nats: NatsOptions,
}

/// What only tests and benchmarks set.
#[derive(Args, Clone, Debug)]
pub(crate) struct TestOptions {
    /// What answers.
    #[arg(long, value_enum, default_value_t = BackendName::Engine, hide = true)]
    pub(crate) backend: BackendName,
    /// Milliseconds that the no-op backend takes for an answer.
    #[arg(long, value_name = "MS", default_value_t = 0, hide = true)]
    pub(crate) noop_latency: u64,
    /// Jobs that the no-op backend answers at a time.
    #[arg(long, value_name = "N", default_value_t = 64, hide = true)]
    pub(crate) noop_slots: usize,
    /// Name of the no-op backend's model.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_MODEL, hide = true)]
    pub(crate) noop_model: String,
    /// Id of a job that aborts the process when the no-op backend begins it.
    #[arg(long, value_name = "ID", hide = true)]
    pub(crate) noop_poison: Option<String>,
    /// Id of a job with which the no-op backend hangs for good.
    #[arg(long, value_name = "ID", hide = true)]
    pub(crate) noop_hang: Option<String>,
    /// Workers of the no-op backend in this process.
    #[arg(long, value_name = "N", default_value_t = 1, hide = true)]
    pub(crate) noop_workers: usize,
    /// Outcomes after which a worker's process dies, each of them stored and the last one's job not
    /// yet acked.
    #[arg(long, value_name = "N", hide = true)]
    pub(crate) die_after_publish: Option<u64>,
    /// Seconds that a silent worker keeps its jobs.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = parse_seconds, hide = true)]
    pub(crate) lease: Duration,
}

/// What answers a worker's jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendName {
    /// The model.
    Engine,
    /// Nothing: an answer made from the id.
    Noop,
}

/// Options of `flotilla collect`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("output").args(["output_file", "output_dir"]).required(true)))]
pub(crate) struct CollectOptions {
    /// JSONL file that gets one line for each query of the run. Lines that are there are kept.
    #[arg(long, value_name = "FILE")]
    pub(crate) output_file: Option<PathBuf>,
    /// Collect every run, each into `<run>.jsonl` in this folder; runs that begin later too. A file
    /// that can't be written is told by /healthz and `flotilla status`, and tried again.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["run", "until_done", "statistics_file"])]
    pub(crate) output_dir: Option<PathBuf>,
    /// End when all producers of the run have finished and each of their queries has its line. One
    /// that died keeps the run open until its command is run again.
    #[arg(long)]
    pub(crate) until_done: bool,
    /// Fail if another collector writes the output, instead of waiting to take over.
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// JSON file that gets the statistics at the end.
    #[arg(long, value_name = "FILE")]
    pub(crate) statistics_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) run: RunOption,
    /// Seconds that a silent collector keeps its outcomes.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = parse_seconds, hide = true)]
    pub(crate) lease: Duration,
    /// Step of the protocol after which the process aborts, the second time that it comes there.
    #[arg(long, value_name = "STEP", hide = true)]
    pub(crate) abort_at: Option<Step>,
    #[command(flatten)]
    pub(crate) metrics: MetricsOptions,
    #[command(flatten)]
    pub(crate) nats: NatsOptions,
    #[command(flatten)]
    pub(crate) redis: RedisOptions,
}

/// Options of `flotilla status`.
#[derive(Args, Debug)]
pub(crate) struct StatusOptions {
    /// Show it again and again, every so many seconds.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = parse_seconds)]
    pub(crate) watch: Option<Duration>,
    /// Print JSON; with --watch, a line each time.
    #[arg(long)]
    pub(crate) json: bool,
    /// Only this run.
    #[arg(long, env = "FLOTILLA_RUN", value_name = "NAME", value_parser = parse_run)]
    pub(crate) run: Option<RunId>,
    #[command(flatten)]
    pub(crate) nats: NatsOptions,
}

/// Options of `flotilla retry`.
#[derive(Args, Debug)]
pub(crate) struct RetryOptions {
    /// The run whose failed jobs go back to the queue.
    #[arg(long, env = "FLOTILLA_RUN", value_name = "NAME", value_parser = parse_run)]
    pub(crate) run: RunId,
    /// Only jobs of this model.
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Only the job with this id; may be given several times.
    #[arg(long, value_name = "ID", allow_hyphen_values = true)]
    pub(crate) id: Vec<String>,
    /// Take out the failed lines of bad input instead, which never was a job: corrected, it is then
    /// published by `flotilla produce` like any other.
    #[arg(long, conflicts_with = "model")]
    pub(crate) input_failures: bool,
    /// The run's output, where no collector is running: its failed lines are taken out here instead
    /// of by the collector.
    #[arg(long, value_name = "FILE")]
    pub(crate) output_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) nats: NatsOptions,
    #[command(flatten)]
    pub(crate) redis: RedisOptions,
}

/// Options of `flotilla cancel`.
#[derive(Args, Debug)]
pub(crate) struct CancelOptions {
    /// The run whose queued jobs are dropped.
    #[arg(long, value_name = "NAME", value_parser = parse_run)]
    pub(crate) run: RunId,
    #[command(flatten)]
    pub(crate) nats: NatsOptions,
}

/// Options of `flotilla reconcile`.
#[derive(Args, Debug)]
pub(crate) struct ReconcileOptions {
    #[command(flatten)]
    pub(crate) jobs: JobOptions,
    /// The run's output: what has its line here is done.
    #[arg(long, value_name = "FILE")]
    pub(crate) output_file: PathBuf,
    /// Publish even while jobs of the run are queued. Those that are queued and missing alike are
    /// then computed twice, and still written once.
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) nats: NatsOptions,
}

/// Name of the shipped model.
pub(crate) const DEFAULT_MODEL: &str = "flotilla-reader";

/// Which run it is.
#[derive(Args, Clone, Debug)]
pub(crate) struct RunOption {
    /// Name of the run: its jobs have one output [default: the name of the queries file or of the
    /// output, without its ending].
    #[arg(long, env = "FLOTILLA_RUN", value_name = "NAME", value_parser = parse_run)]
    pub(crate) run: Option<RunId>,
}

/// Which workers get the jobs.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelName {
    /// Name of the model that shall answer: workers with a model folder of this name take the
    /// jobs.
    #[arg(long, env = "FLOTILLA_MODEL", value_name = "NAME", default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
}

/// Where a role can be looked at.
#[derive(Args, Clone, Debug)]
pub(crate) struct MetricsOptions {
    /// Serve GET /metrics (Prometheus) and GET /healthz at this address.
    #[arg(long, env = "FLOTILLA_METRICS_ADDR", value_name = "ADDR")]
    pub(crate) metrics_addr: Option<SocketAddr>,
}

/// The connection to the queue.
#[derive(Args, Clone)]
#[command(next_help_heading = "Servers")]
pub(crate) struct NatsOptions {
    /// NATS server: nats://host:4222, nats://user:password@host:4222 or tls://host:4222; those of a
    /// cluster separated by commas.
    #[arg(long, env = "FLOTILLA_NATS_URL", value_name = "URL", hide_env_values = true)]
    pub(crate) nats_url: String,
    #[command(flatten)]
    pub(crate) settings: NatsSettings,
}

/// How to be let in by the NATS server, and how it keeps what it gets.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Servers")]
pub(crate) struct NatsSettings {
    /// Credentials file of the NATS user.
    #[arg(long, env = "FLOTILLA_NATS_CREDS", value_name = "FILE")]
    pub(crate) nats_creds: Option<PathBuf>,
    /// File with the seed of the NATS user's nkey.
    #[arg(long, env = "FLOTILLA_NATS_NKEY", value_name = "FILE")]
    pub(crate) nats_nkey: Option<PathBuf>,
    /// Certificates that the NATS server's own must be signed by.
    #[arg(long, env = "FLOTILLA_NATS_CA", value_name = "FILE")]
    pub(crate) nats_ca: Option<PathBuf>,
    /// This client's certificate.
    #[arg(long, env = "FLOTILLA_NATS_CERT", value_name = "FILE", requires = "nats_key")]
    pub(crate) nats_cert: Option<PathBuf>,
    /// Key of this client's certificate.
    #[arg(long, env = "FLOTILLA_NATS_KEY", value_name = "FILE", requires = "nats_cert")]
    pub(crate) nats_key: Option<PathBuf>,
    /// Servers of a NATS cluster that keep each job and answer: 3 survive the loss of one, 5 of two.
    /// Streams that exist with fewer get so many; ones with more keep them.
    #[arg(long, env = "FLOTILLA_NATS_REPLICAS", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=5))]
    pub(crate) nats_replicas: u8,
}

/// The servers of `flotilla run`, where it shall not keep its queues in memory.
#[derive(Args, Clone)]
#[command(next_help_heading = "Servers")]
pub(crate) struct RunServers {
    /// Queue the jobs at this NATS server, so that workers elsewhere can help: see `flotilla work`.
    #[arg(long, value_name = "URL")]
    nats_url: Option<String>,
    #[command(flatten)]
    settings: NatsSettings,
    #[command(flatten)]
    pub(crate) redis: RedisOptions,
}

impl RunServers {
    /// The connection to the queue, if it isn't in memory.
    pub(crate) fn nats(&self) -> Option<NatsOptions> {
        let settings = self.settings.clone();
        self.nats_url.clone().map(|nats_url| NatsOptions { nats_url, settings })
    }
}

/// The index of what is written.
#[derive(Args, Clone)]
#[command(next_help_heading = "Servers")]
pub(crate) struct RedisOptions {
    /// Redis that indexes the ids in the output: redis://host:6379 or rediss://… [default: in this
    /// process' memory, from the output].
    #[arg(long, env = "FLOTILLA_REDIS_URL", value_name = "URL", hide_env_values = true)]
    pub(crate) redis_url: Option<String>,
}

// URLs may hold passwords.
impl std::fmt::Debug for NatsOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatsOptions").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for RunServers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunServers").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for RedisOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisOptions").finish_non_exhaustive()
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
    let sensible = seconds.filter(|s| !s.is_zero() && *s <= Duration::from_secs(86_400 * 365));
    sensible.ok_or_else(|| "expected a number of seconds above 0".to_owned())
}

fn parse_window(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(window @ 1..=65_536) => Ok(window),
        _ => Err("expected a number from 1 to 65536".to_owned()),
    }
}

fn parse_run(text: &str) -> Result<RunId, String> {
    if text.is_empty() {
        Err("expected a name, given nothing".to_owned())
    } else {
        Ok(RunId(text.to_owned()))
    }
}
