//! Jobs in, outcomes out: pulls as many jobs as it has free slots, answers them, publishes each
//! outcome and only then acks the job.
//!
//! [`run`] is the role: it starts a [`Backend`]'s engine, and another whenever one goes down. `pull` takes jobs
//! from the queue, `serve` is one job's way and decides what a failure means for it, `quarantine` which jobs
//! run alone, `lease` keeps them this worker's, [`Stats`] counts. For the engine of this machine `engine_thread`
//! owns the device and `prompt` turns a job into tokens.

mod backend;
mod device;
mod engine_thread;
mod generation;
mod lease;
mod prompt;
mod pull;
mod quarantine;
mod serve;
mod stats;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use shared::{Job, Queue, QueueError, Settled};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

pub use backend::{
    Answer, Backend, Counters, EngineBackend, Failure, LocalEngine, Noop, NoopEngine, Progress,
    Serving,
};
pub use device::devices;
pub use stats::{FailureKind, HistogramSnapshot, Snapshot, Stats};

use pull::{Stop, serve_until_stopped};
use quarantine::Quarantine;
use serve::{Broken, Keeping, Server};

/// Engine failures in a row, without an outcome between them, after which the worker gives up: that
/// many more than what it takes to give up a single job.
const SPARE_ENGINE_FAILURES: u32 = 3;

/// Settings of one worker.
#[derive(Clone, Debug)]
pub struct Config {
    /// The worker's number, as it appears on its lines.
    pub rank: u32,
    /// The worker's name, as it appears in logs.
    pub name: String,
    /// The delivery from which on a job is alone in its worker, at least 2. One that takes the engine down
    /// there is given up, and one that takes the process down a few deliveries later.
    pub max_attempts: u32,
    /// How long the jobs that it holds may take after a shutdown. Then they go back to the queue.
    pub drain_timeout: Duration,
}

/// Why a worker cannot go on. Its jobs go back to the queue.
#[derive(Debug, Error)]
pub enum Error {
    /// The engine could not be loaded.
    #[error("cannot load the model")]
    Load(#[source] engine::Error),
    /// The engine panicked before it was ready.
    #[error("the engine panicked while it loaded the model")]
    LoadPanicked,
    /// The engine failed again and again.
    #[error("the engine failed {0} times in a row without an answer between them")]
    Engine(u32),
    /// The engine makes no progress.
    #[error("the engine hangs: it has work but makes no progress")]
    Hung,
    /// The operating system gave no thread for the engine.
    #[error("cannot start the engine's thread")]
    Thread(#[source] std::io::Error),
    /// The queue failed.
    #[error("cannot take jobs from the queue or store their outcomes")]
    Queue(#[from] QueueError),
    /// A device that can't be used.
    #[error("{0}")]
    Device(String),
}

/// Answers the jobs of `queues` into its outcomes until the shutdown, then finishes those it holds
/// within [`Config::drain_timeout`].
///
/// Calls `ready` with the model's name once the engine is up.
pub async fn run<B: Backend, J: Queue<Job>, O: Queue<Settled>>(
    config: Config,
    backend: B,
    queues: (J, O),
    (stats, shutdown): (Arc<Stats>, CancellationToken),
    ready: impl FnOnce(&str) + Send,
) -> Result<(), Error> {
    let (jobs, outcomes) = queues;
    let worker = Worker { config, backend, jobs, outcomes, stats, shutdown };
    let mut kept = Vec::new();
    let ended = worker.run(&mut kept, ready).await;
    serve::give_all_back(kept).await;
    ended
}

struct Worker<B, J, O> {
    config: Config,
    backend: B,
    jobs: J,
    outcomes: O,
    stats: Arc<Stats>,
    shutdown: CancellationToken,
}

impl<B: Backend, J: Queue<Job>, O: Queue<Settled>> Worker<B, J, O> {
    /// Runs one engine after another. What is in `kept` at the end has to go back.
    async fn run(
        &self,
        kept: &mut Vec<Keeping<J::Delivery>>,
        ready: impl FnOnce(&str) + Send,
    ) -> Result<(), Error> {
        let Self { config, stats, shutdown, .. } = self;
        let mut ready = Some(ready);
        let mut failures = 0;
        loop {
            let engine = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                engine = self.backend.start() => engine?,
                never = serve::keep_all(kept) => match never {},
            };
            if let Some(ready) = ready.take() {
                ready(engine.model_name());
            }
            let server = Arc::new(server(config, engine, self.outcomes.clone(), stats));
            let source = Arc::downgrade(&server);
            stats.engine_started(server.engine.model_name(), server.engine.num_slots(), source);
            let again = std::mem::take(kept);
            let (stop, tally) = serve_until_stopped(&server, &self.jobs, shutdown, again).await;
            *kept = tally.kept;
            stats.engine_ended();
            if let Some(error) = server.broken.take() {
                return Err(error.into());
            }
            match stop {
                Stop::Hung => return Err(Error::Hung),
                Stop::Shutdown | Stop::Broken => return Ok(()),
                Stop::EngineDown if shutdown.is_cancelled() => return Ok(()),
                Stop::EngineDown => {}
            }
            failures = if tally.settled_any { 1 } else { failures + 1 };
            if failures >= config.max_attempts.saturating_add(SPARE_ENGINE_FAILURES) {
                return Err(Error::Engine(failures));
            }
            tracing::warn!(
                worker = config.name,
                failures,
                "the engine went down; starting it again"
            );
        }
    }
}

/// What the jobs of one engine's life share.
fn server<E: Serving, O: Queue<Settled>>(
    config: &Config,
    engine: E,
    outcomes: O,
    stats: &Arc<Stats>,
) -> Server<E, O> {
    Server {
        config: config.clone(),
        engine,
        outcomes,
        stats: Arc::clone(stats),
        quarantine: Quarantine::default(),
        give_back: CancellationToken::new(),
        hung_at: Mutex::new(None),
        broken: Broken::default(),
    }
}

#[cfg(test)]
mod tests;
