//! `flotilla work`: this machine's devices answer jobs of the queue, until a signal.
//!
//! One worker a device, each with its own engine, its own heartbeats and its own name; they share the
//! connection. A worker that cannot go on leaves its jobs to the others.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use engine::{Device, EngineConfig};
use gpu_worker::{Backend, EngineBackend, Noop, Stats};
use shared::queue::nats::Fleet;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::cli::fleet::{BackendName, WorkOptions};
use crate::observe::{self, Health};
use crate::{fleet, signals};

mod faults;
mod page;
mod said;

use faults::{Faulty, LastWords};
use said::Identity;

/// Runs `flotilla work`.
pub(crate) fn main(options: &WorkOptions) -> anyhow::Result<ExitCode> {
    let mut devices = options.model.devices()?;
    let engine = match options.hidden.backend {
        BackendName::Engine => Some(options.model.engine_config(devices.len())?),
        BackendName::Noop => {
            devices = devices.repeat(options.hidden.noop_workers);
            None
        }
    };
    fleet::block_on(work(options, &devices, engine))
}

/// The workers of a process.
pub(crate) type Workers = JoinSet<Result<(), gpu_worker::Error>>;

async fn work(
    options: &WorkOptions,
    devices: &[Device],
    engine: Option<EngineConfig>,
) -> anyhow::Result<ExitCode> {
    let interruption = signals::interruption()?;
    let all_stats: Vec<Arc<Stats>> = devices.iter().map(|_| Arc::default()).collect();
    let health = Health::default();
    let page = {
        let all_stats = all_stats.clone();
        move || std::future::ready(page::page(&all_stats))
    };
    observe::serve(options.metrics.metrics_addr, health.clone(), page).await?;
    let Some(fleet) = fleet::connect_unless(&interruption, &options.nats).await? else {
        return Ok(ExitCode::SUCCESS);
    };
    let fleet = fleet.with_lease(options.hidden.lease);
    let mut workers = Workers::new();
    for (rank, (device, stats)) in devices.iter().zip(all_stats).enumerate() {
        let worker = Worker {
            rank: rank as u32,
            device: *device,
            max_attempts: options.max_attempts,
            drain_timeout: options.drain_timeout,
            fleet: fleet.clone(),
            stats,
            health: health.clone(),
            shutdown: interruption.clone(),
            last_words: options.hidden.die_after_publish,
        };
        match &engine {
            Some(engine) => {
                let model = engine::model_name(&engine.model_path);
                let backend = EngineBackend { engine: options.model.on(*device, engine) };
                workers.spawn(worker.run(backend, model));
            }
            None => {
                let hidden = &options.hidden;
                let noop = Noop {
                    latency: Duration::from_millis(hidden.noop_latency),
                    slots: hidden.noop_slots,
                    model: hidden.noop_model.clone(),
                };
                let backend = Faulty {
                    backend: noop,
                    poison: hidden.noop_poison.clone(),
                    hang: hidden.noop_hang.clone(),
                };
                workers.spawn(worker.run(backend, hidden.noop_model.clone()));
            }
        }
    }
    supervise(workers, &interruption).await?;
    Ok(ExitCode::SUCCESS)
}

/// One device's worker.
pub(crate) struct Worker {
    /// Its number in this process.
    pub(crate) rank: u32,
    /// Where it computes.
    pub(crate) device: Device,
    /// Delivery from which on a job runs alone.
    pub(crate) max_attempts: u32,
    /// How long the running jobs may take after a shutdown.
    pub(crate) drain_timeout: Duration,
    /// The connection.
    pub(crate) fleet: Fleet,
    /// Where it counts.
    pub(crate) stats: Arc<Stats>,
    /// Set when it is ready.
    pub(crate) health: Health,
    /// When to end.
    pub(crate) shutdown: CancellationToken,
    /// For tests: outcomes after which the process dies.
    pub(crate) last_words: Option<u64>,
}

impl Worker {
    /// Answers jobs of this model until the shutdown.
    pub(crate) async fn run<B: Backend>(
        self,
        backend: B,
        model: String,
    ) -> Result<(), gpu_worker::Error> {
        let identity = Identity::new(self.rank, self.device.describe());
        let name = identity.name.clone();
        let over = CancellationToken::new();
        let beating = tokio::spawn(said::say(
            identity,
            self.fleet.clone(),
            Arc::clone(&self.stats),
            over.clone(),
        ));
        let config = gpu_worker::Config {
            rank: self.rank,
            name: name.clone(),
            max_attempts: self.max_attempts,
            drain_timeout: self.drain_timeout,
        };
        let fleet = self.fleet.with_worker(&name);
        let outcomes = LastWords::new(fleet.outcomes(None), self.last_words);
        let queues = (fleet.jobs(&model), outcomes);
        let (rank, health) = (self.rank, self.health);
        let ready = |model: &str| {
            tracing::info!(worker = rank, name, model, "worker is ready");
            health.set(Ok(()));
        };
        let done =
            gpu_worker::run(config, backend, queues, (self.stats, self.shutdown), ready).await;
        over.cancel();
        // Whether the fleet was told or not, this worker is over.
        drop(beating.await);
        done
    }
}

/// What a worker's end means where so many are left.
pub(crate) fn note_end(
    ended: Result<Result<(), gpu_worker::Error>, JoinError>,
    num_left: usize,
) -> anyhow::Result<()> {
    let error = match ended {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => anyhow::Error::new(error),
        Err(panic) => anyhow!("a worker panicked: {panic}"),
    };
    if num_left > 0 {
        tracing::error!("a worker cannot go on, {num_left} are left: {error:#}");
    }
    Err(error)
}

/// Waits for all workers to end; the error of the first that could not go on, once none is left.
pub(crate) async fn supervise(
    mut workers: Workers,
    interruption: &CancellationToken,
) -> anyhow::Result<()> {
    let mut first_error = None;
    let mut told = false;
    loop {
        let joined = tokio::select! {
            joined = workers.join_next() => joined,
            () = interruption.cancelled(), if !told => {
                told = true;
                tracing::warn!(
                    "finishing the running jobs; interrupt again to stop at once"
                );
                continue;
            }
        };
        let Some(ended) = joined else { break };
        if let Err(error) = note_end(ended, workers.len()) {
            first_error.get_or_insert(error);
        }
    }
    match first_error {
        Some(error) => Err(error.context("no worker is left")),
        None => Ok(()),
    }
}
