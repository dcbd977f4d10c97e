//! Jobs in, outcomes out: pulls as many jobs as it has free slots, answers them, publishes each
//! outcome and only then acks the job.
//!
//! [`run`] is the role. [`engine_thread`] owns the device, [`prompt`] turns a job into tokens,
//! [`serve`] is one job's way through the worker and decides what a failure means for it.

mod engine_thread;
mod prompt;
mod serve;

use std::sync::Arc;
use std::time::Duration;

use engine::EngineConfig;
use shared::{Job, Queue, QueueError, Settled};
use thiserror::Error;
use tokio::sync::{RwLock, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use engine_thread::EngineThread;
use serve::Server;

/// How long one pull waits for jobs before it looks around.
const PULL_WAIT: Duration = Duration::from_secs(5);
/// Engine failures in a row, without an answer between them, after which the worker gives up.
const MAX_ENGINE_FAILURES: u32 = 8;

/// Settings of one worker.
#[derive(Clone, Debug)]
pub struct Config {
    /// The worker's number, as it appears on its lines.
    pub rank: u32,
    /// The engine's settings.
    pub engine: EngineConfig,
    /// Deliveries after which a job that keeps failing is given up.
    pub max_attempts: u32,
}

/// Why a worker cannot go on. Its jobs go back to the queue.
#[derive(Debug, Error)]
pub enum Error {
    /// The engine could not be loaded.
    #[error("cannot load the model")]
    Load(#[source] engine::Error),
    /// The engine failed again and again.
    #[error("the engine failed {MAX_ENGINE_FAILURES} times in a row")]
    Engine,
    /// The operating system gave no thread for the engine.
    #[error("cannot start the engine's thread")]
    Thread(#[source] std::io::Error),
    /// The queue failed.
    #[error("cannot take jobs from the queue")]
    Queue(#[from] QueueError),
}

/// Answers the jobs of `jobs` into `outcomes` until `shutdown`, then finishes those it holds.
///
/// Calls `ready` once the model is loaded.
pub async fn run<J: Queue<Job>, O: Queue<Settled>>(
    config: Config,
    jobs: J,
    outcomes: O,
    shutdown: CancellationToken,
    ready: impl FnOnce(&str) + Send,
) -> Result<(), Error> {
    let mut engine = EngineThread::start(config.engine.clone()).await?;
    ready(engine.model_name());
    let mut failures = 0;
    loop {
        let server = Arc::new(Server {
            rank: config.rank,
            max_attempts: config.max_attempts,
            engine,
            outcomes: outcomes.clone(),
            alone: RwLock::new(()),
        });
        let answered = serve_until_down(&server, &jobs, &shutdown).await?;
        if shutdown.is_cancelled() {
            return Ok(());
        }
        failures = if answered { 1 } else { failures + 1 };
        if failures >= MAX_ENGINE_FAILURES {
            return Err(Error::Engine);
        }
        tracing::warn!(worker = config.rank, failures, "the engine went down; starting it again");
        engine = EngineThread::start(config.engine.clone()).await?;
    }
}

/// Serves until the shutdown or until the engine is down, then lets the jobs it holds settle;
/// whether any of them was answered.
async fn serve_until_down<J: Queue<Job>, O: Queue<Settled>>(
    server: &Arc<Server<O>>,
    jobs: &J,
    shutdown: &CancellationToken,
) -> Result<bool, Error> {
    let capacity = server.engine.capacity();
    let slots = Arc::new(Semaphore::new(capacity));
    let mut held = JoinSet::new();
    let mut answered = false;
    loop {
        let free = tokio::select! {
            () = shutdown.cancelled() => break,
            () = server.engine.down() => break,
            // Never closed, so this waits for a slot and leaves it free.
            _slot = slots.acquire() => slots.available_permits() + 1,
        };
        let deliveries = tokio::select! {
            () = shutdown.cancelled() => break,
            () = server.engine.down() => break,
            pulled = jobs.pull(free.min(capacity), PULL_WAIT) => pulled?,
        };
        for delivery in deliveries {
            let slot = Arc::clone(&slots).try_acquire_owned();
            let server = Arc::clone(server);
            held.spawn(async move {
                let _slot = slot;
                server.serve(delivery).await
            });
        }
        while let Some(joined) = held.try_join_next() {
            answered |= joined.unwrap_or(false);
        }
    }
    while let Some(joined) = held.join_next().await {
        answered |= joined.unwrap_or(false);
    }
    Ok(answered)
}
