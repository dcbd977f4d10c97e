//! What the fleet's commands share: the runtime, the connection, names.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use shared::RunId;
use shared::queue::nats::{Fleet, NatsConfig};
use tokio_util::sync::CancellationToken;

use crate::cli::Usage;
use crate::cli::fleet::{NatsOptions, RunOption};

/// Threads for what blocks: reading, retrieving, rendering, each worker's engine apart.
const MAX_BLOCKING_THREADS: usize = 16;
/// How long a finished command waits for threads that still read ahead.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(100);

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
    Fleet::connect(&config(options)).await.context("cannot use the NATS server")
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
    let access = options.access.clone();
    NatsConfig {
        url: options.nats_url.clone(),
        creds_file: access.nats_creds,
        nkey_file: access.nats_nkey,
        tls_ca: access.nats_ca,
        tls_cert: access.nats_cert,
        tls_key: access.nats_key,
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

/// Name of this machine.
pub(crate) fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "localhost".to_owned() } else { name.trim().to_owned() }
}
