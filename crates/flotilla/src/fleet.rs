//! What the fleet's commands share: the runtime, the connection, names.

use std::collections::BTreeSet;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use shared::RunId;
use shared::queue::nats::{Fleet, Limits, NatsConfig};
use tokio_util::sync::CancellationToken;

use crate::cli::Usage;
use crate::cli::fleet::{NatsOptions, RunOption};

/// Threads for what blocks: reading, retrieving, rendering, each worker's engine apart.
const MAX_BLOCKING_THREADS: usize = 16;
/// How long a finished command waits for threads that still read ahead.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(100);

/// How long a command that only looks or asks waits for the server.
const SOON: Duration = Duration::from_secs(10);

/// Runs a role on a runtime of its own. What still blocks when it is over is left behind.
pub(crate) fn block_on<T>(role: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build()
        .context("cannot start the async runtime")?;
    let done = runtime.block_on(role);
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    done
}

/// Connects, waiting for a server that is not there yet.
pub(crate) async fn connect(options: &NatsOptions) -> anyhow::Result<Fleet> {
    let replicas = usize::from(options.settings.nats_replicas);
    let limits = Limits { replicas, ..Limits::default() };
    Fleet::connect_with(&config(options), limits).await.context("cannot use the NATS server")
}

/// The same for a command that somebody waits for: gives up soon.
pub(crate) async fn connect_soon(options: &NatsOptions) -> anyhow::Result<Fleet> {
    tokio::time::timeout(SOON, connect(options)).await.unwrap_or_else(|_late| {
        bail!(
            "no NATS server answered within {} seconds: look at --nats-url or FLOTILLA_NATS_URL, and \
             whether the server runs",
            SOON.as_secs()
        )
    })
}

/// Refuses a run that nobody has heard of, and says which there are.
pub(crate) async fn check_run(fleet: &Fleet, run: &RunId) -> anyhow::Result<()> {
    let mut runs: BTreeSet<RunId> =
        fleet.runs().await?.into_iter().map(|status| status.run).collect();
    runs.extend(fleet.num_jobs_queued().await?.into_keys().map(|(_model, run)| run));
    runs.extend(fleet.num_outcomes_queued().await?.into_keys());
    runs.extend(fleet.num_dead().await?.into_keys());
    if !runs.contains(run) {
        bail!("{}", unknown_run(run, runs.iter().map(|run| run.0.as_str())));
    }
    Ok(())
}

/// That there is no such run.
pub(crate) fn unknown_run<'a>(run: &RunId, runs: impl Iterator<Item = &'a str>) -> String {
    let runs: Vec<&str> = runs.collect();
    let there_are = if runs.is_empty() { "there are none".to_owned() } else { runs.join(", ") };
    format!("nothing is known of a run '{}'; runs of the last day: {there_are}", run.0)
}

/// The same; `None` if it is interrupted before.
pub(crate) async fn connect_unless(
    interruption: &CancellationToken,
    options: &NatsOptions,
) -> anyhow::Result<Option<Fleet>> {
    tokio::select! {
        fleet = connect(options) => fleet.map(Some),
        () = interruption.cancelled() => Ok(None),
    }
}

fn config(options: &NatsOptions) -> NatsConfig {
    let settings = options.settings.clone();
    NatsConfig {
        url: options.nats_url.clone(),
        creds_file: settings.nats_creds,
        nkey_file: settings.nats_nkey,
        tls_ca: settings.nats_ca,
        tls_cert: settings.nats_cert,
        tls_key: settings.nats_key,
    }
}

/// The run's name: the one given, or that of the file it is about, without its ending.
pub(crate) fn run_id(option: &RunOption, file: Option<&PathBuf>) -> anyhow::Result<RunId> {
    let named = || {
        let name = file.filter(|file| *file != Path::new("-"))?.file_stem()?.to_str()?;
        Some(RunId(name.to_owned())).filter(|run| !run.0.is_empty())
    };
    option.run.clone().or_else(named).ok_or_else(|| {
        Usage("expected --run with the name of the run, since no file names it".to_owned()).into()
    })
}

/// Name of this process in the fleet.
pub(crate) fn process_name() -> String {
    format!("{}-{}", host(), std::process::id())
}

/// Name of this machine.
pub(crate) fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "localhost".to_owned() } else { name.trim().to_owned() }
}
