//! `flotilla bench queue`: what the queue costs. No-op workers answer jobs of 1 KB, and everything
//! else is real: producer → JetStream → workers → JetStream → collector with Redis and fdatasync,
//! each role and each server a process of its own.

use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use shared::queue::nats::{Fleet, NatsConfig};
use shared::{Context, JobId, Query};
use tempfile::TempDir;
use tokio::process::Command;

use super::Report;
use super::processes::{Processes, Role};
use crate::cli::QueueBench;
use crate::{fleet, signals};

/// The run.
const RUN: &str = "bench";
/// Characters of a job's context: with the rest, a job of about 1 KB.
const CONTEXT_LENGTH: usize = 600;
/// `GOMEMLIMIT` of the nats-server, as in docker-compose.yml.
const NATS_MEMORY: &str = "256MiB";
/// How long servers and roles may take to be ready.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two looks at whether something is ready, or at what the processes use.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Runs `flotilla bench queue`.
pub(super) fn main(options: &QueueBench) -> anyhow::Result<Report> {
    fleet::block_on(async {
        let interruption = signals::interruption()?;
        tokio::select! {
            report = measure(options) => report,
            // Its processes end with it.
            () = interruption.cancelled() => bail!("interrupted"),
        }
    })
}

async fn measure(options: &QueueBench) -> anyhow::Result<Report> {
    let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
    let mut processes = Processes::default();
    let urls = start_servers(options, &dir, &mut processes).await?;
    start_roles(options, &dir, &urls, &mut processes).await?;

    let started = Instant::now();
    let mut producer = role(&dir, &urls, "produce");
    producer.args(["--contexts-file", "-", "--run", RUN]).stdin(Stdio::piped());
    let child = processes.start(Role::Producer, &mut producer)?;
    let input = child.stdin.take().context("the producer has no stdin")?.into_owned_fd()?;
    let jobs = options.jobs;
    let feeding = tokio::task::spawn_blocking(move || feed(input.into(), jobs));
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    let mut lines = Lines::of(&dir.path().join("results.jsonl"))?;
    let (mut published, mut written) = (None, None);
    loop {
        ticks.tick().await;
        processes.look();
        if published.is_none() && processes.has_ended(Role::Producer)? {
            published = Some(started.elapsed());
        }
        if written.is_none() && lines.count()? == jobs {
            written = Some(started.elapsed());
        }
        // It ends by itself a little after the last line.
        if processes.has_ended(Role::Collector)? {
            break;
        }
    }
    feeding.await?.context("cannot feed the producer")?;
    let lines = lines.count()?;
    ensure!(lines == jobs, "expected {jobs} lines, found {lines}");
    let elapsed = written.unwrap_or(started.elapsed());
    Ok(report(options, &processes, (published.unwrap_or(elapsed), elapsed)))
}

/// Where the servers are.
struct Urls {
    nats: String,
    redis: String,
}

async fn start_servers(
    options: &QueueBench,
    dir: &TempDir,
    processes: &mut Processes,
) -> anyhow::Result<Urls> {
    let path = dir.path();
    let sync = if options.sync_always { "sync_interval: always" } else { "" };
    let config = format!(
        "listen: \"127.0.0.1:-1\"\nmax_payload: 8MB\n\
         jetstream {{ store_dir: {:?}, max_file_store: 64GB\n{sync}\n}}\n",
        path.join("nats")
    );
    let config_file = path.join("nats.conf");
    std::fs::write(&config_file, config).context("cannot write the server's configuration")?;
    let mut nats = Command::new(server(options.nats_server.as_ref(), "nats-server"));
    nats.env("GOMEMLIMIT", NATS_MEMORY);
    nats.arg("-c").arg(&config_file).arg("--ports_file_dir").arg(path);
    let pid = processes.start(Role::Nats, &mut nats)?.id().unwrap_or(0);
    let socket = path.join("redis.sock");
    let mut redis = Command::new(server(options.redis_server.as_ref(), "redis-server"));
    redis.args(["--port", "0", "--appendonly", "yes", "--save", ""]);
    redis.arg("--dir").arg(path).arg("--unixsocket").arg(&socket);
    processes.start(Role::Redis, &mut redis)?;
    let redis = format!("redis+unix://{}", socket.display());
    until("the servers", || Ok(socket.exists().then_some(()))).await?;
    let ports = until("nats-server", || ports(path, pid)).await?;
    Ok(Urls { nats: ports, redis })
}

/// A server's program: the one given, the one that `scripts/servers.sh` fetched, or the one on PATH.
fn server(given: Option<&PathBuf>, name: &str) -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .filter(|dir| !dir.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
    let fetched =
        cache.map(|dir| dir.join("flotilla/bin").join(name)).filter(|file| file.is_file());
    given.cloned().or(fetched).unwrap_or_else(|| name.into())
}

/// The URL in the server's ports file, once that is written.
fn ports(dir: &Path, pid: u32) -> anyhow::Result<Option<String>> {
    let file = dir.join(format!("nats-server_{pid}.ports"));
    let Ok(text) = std::fs::read_to_string(&file) else { return Ok(None) };
    // Half written is not written yet.
    let Ok(ports) = serde_json::from_str::<Value>(&text) else { return Ok(None) };
    Ok(ports["nats"][0].as_str().map(str::to_owned))
}

/// Starts the collector and the workers, and waits until they say that they are there.
async fn start_roles(
    options: &QueueBench,
    dir: &TempDir,
    urls: &Urls,
    processes: &mut Processes,
) -> anyhow::Result<()> {
    let config = NatsConfig { url: urls.nats.clone(), ..NatsConfig::default() };
    let fleet = Fleet::connect(&config).await.context("cannot use the started nats-server")?;
    let mut collector = role(dir, urls, "collect");
    collector.args(["--run", RUN, "--until-done", "--output-file", "results.jsonl"]);
    collector.args(["--redis-url", &urls.redis]);
    processes.start(Role::Collector, &mut collector)?;
    for _ in 0..options.workers {
        let mut worker = role(dir, urls, "work");
        worker.args(["--backend", "noop", "--noop-slots", "256"]);
        processes.start(Role::Worker, &mut worker)?;
    }
    let deadline = Instant::now() + START_TIMEOUT;
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    loop {
        ticks.tick().await;
        let workers = fleet.workers().await.context("cannot see the workers")?.len();
        let collectors = fleet.runs().await.context("cannot see the collector")?.len();
        if workers as u32 == options.workers && collectors == 1 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "workers and collector did not start in time");
    }
}

/// This program in a role.
fn role(dir: &TempDir, urls: &Urls, name: &str) -> Command {
    let program = std::env::current_exe().unwrap_or_else(|_| "flotilla".into());
    let mut command = Command::new(program);
    command.arg(name).args(["--nats-url", &urls.nats]).current_dir(dir.path());
    command.env("FLOTILLA_LOG", "warn");
    command
}

/// Writes the jobs' contexts for the producer to read.
fn feed(input: std::fs::File, jobs: u64) -> std::io::Result<()> {
    let mut input = BufWriter::new(input);
    for number in 0..jobs {
        let id = JobId(format!("bench-{number}"));
        let query = Query::new(id, format!("What is number {number}?"));
        let context = "x".repeat(CONTEXT_LENGTH);
        let context = Context { context_length: context.len(), context, ..Context::empty(query) };
        serde_json::to_writer(&mut input, &context)?;
        input.write_all(b"\n")?;
    }
    input.flush()
}

/// Counts the lines of a file that grows.
struct Lines {
    file: std::fs::File,
    num_lines: u64,
    buffer: Vec<u8>,
}

impl Lines {
    fn of(path: &Path) -> anyhow::Result<Self> {
        let file = std::fs::File::open(path).context("the collector made no output")?;
        Ok(Self { file, num_lines: 0, buffer: vec![0; 1 << 20] })
    }

    /// Lines so far.
    fn count(&mut self) -> std::io::Result<u64> {
        loop {
            let length = self.file.read(&mut self.buffer)?;
            if length == 0 {
                return Ok(self.num_lines);
            }
            let ends = self.buffer[..length].iter().filter(|&&byte| byte == b'\n').count();
            self.num_lines += ends as u64;
        }
    }
}

fn report(
    options: &QueueBench,
    processes: &Processes,
    (published, elapsed): (Duration, Duration),
) -> Report {
    let jobs = options.jobs as f64;
    let mut report = Report::new();
    let mut add = |name: &str, value: Value| drop(report.insert(name.to_owned(), value));
    add("jobs", json!(options.jobs));
    add("workers", json!(options.workers));
    add("sync_always", json!(options.sync_always));
    add("elapsed_seconds", json!(elapsed.as_secs_f64()));
    add("jobs_per_second", json!(jobs / elapsed.as_secs_f64()));
    add("published_per_second", json!(jobs / published.as_secs_f64()));
    let total: Duration = processes.usage().iter().map(|usage| usage.cpu).sum();
    add("cpu_ms_per_job", json!(total.as_secs_f64() * 1e3 / jobs));
    let rows = processes.usage().into_iter().map(|usage| {
        json!({
            "process": usage.role.name(),
            "cpu_ms_per_job": usage.cpu.as_secs_f64() * 1e3 / jobs,
            "peak_memory_bytes": usage.peak_memory_bytes,
        })
    });
    add("processes", Value::Array(rows.collect()));
    report
}

/// Looks until something is there.
async fn until<T>(
    what: &str,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + START_TIMEOUT;
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    loop {
        ticks.tick().await;
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("{what} did not start in time");
        }
    }
}
