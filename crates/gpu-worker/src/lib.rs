//! Jobs in, outcomes out: pulls as many jobs as it has free slots, answers them, publishes each
//! outcome and only then acks the job.
//!
//! [`run`] is the role. [`engine_thread`] owns the device, [`prompt`] turns a job into tokens,
//! [`serve`] is one job's way through the worker and decides what a failure means for it.

mod engine_thread;
mod prompt;
mod serve;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use engine::EngineConfig;
use shared::{Job, Queue, QueueError, Settled};
use thiserror::Error;
use tokio::sync::{RwLock, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use engine_thread::EngineThread;
use serve::{MAX_RENDERING, Server};

/// How long one pull waits for jobs before it looks around.
const PULL_WAIT: Duration = Duration::from_secs(5);
/// Engine failures in a row, without an outcome between them, after which the worker gives up: that
/// many more than what it takes to give up a single job.
const SPARE_ENGINE_FAILURES: u32 = 3;

/// Settings of one worker.
#[derive(Clone, Debug)]
pub struct Config {
    /// The worker's number, as it appears on its lines.
    pub rank: u32,
    /// The engine's settings.
    pub engine: EngineConfig,
    /// Deliveries after which a job that keeps taking the engine down is given up, at least 2: the
    /// last one is alone in the engine.
    pub max_attempts: u32,
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
    let start = || EngineThread::start(config.engine.clone());
    let engine = start().await?;
    ready(engine.model_name());
    run_engines(&config, (engine, start), (jobs, outcomes), shutdown).await
}

/// Serves with `engine`, and with another from `start` whenever one goes down.
async fn run_engines<J: Queue<Job>, O: Queue<Settled>, F>(
    config: &Config,
    (mut engine, start): (EngineThread, impl Fn() -> F),
    (jobs, outcomes): (J, O),
    shutdown: CancellationToken,
) -> Result<(), Error>
where
    F: Future<Output = Result<EngineThread, Error>>,
{
    let mut failures = 0;
    loop {
        let server = Arc::new(Server {
            rank: config.rank,
            max_attempts: config.max_attempts,
            engine,
            outcomes: outcomes.clone(),
            alone: RwLock::new(()),
            rendering: Semaphore::new(MAX_RENDERING),
        });
        let settled_any = serve_until_down(&server, &jobs, &shutdown).await?;
        if shutdown.is_cancelled() {
            return Ok(());
        }
        failures = if settled_any { 1 } else { failures + 1 };
        if failures >= config.max_attempts.saturating_add(SPARE_ENGINE_FAILURES) {
            return Err(Error::Engine(failures));
        }
        tracing::warn!(worker = config.rank, failures, "the engine went down; starting it again");
        engine = start().await?;
    }
}

/// Serves until the shutdown or until the engine is down, then lets the jobs it holds settle;
/// whether any of them was settled.
async fn serve_until_down<J: Queue<Job>, O: Queue<Settled>>(
    server: &Arc<Server<O>>,
    jobs: &J,
    shutdown: &CancellationToken,
) -> Result<bool, Error> {
    let capacity = server.engine.capacity();
    let slots = Arc::new(Semaphore::new(capacity));
    let mut held = JoinSet::new();
    let mut settled_any = false;
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
            settled_any |= joined.unwrap_or(false);
        }
    }
    while let Some(joined) = held.join_next().await {
        settled_any |= joined.unwrap_or(false);
    }
    Ok(settled_any)
}

#[cfg(test)]
mod tests {
    use shared::queue::conformance::job;
    use shared::{Delivery, MemoryQueue, Outcome};

    use super::*;

    const POISON: &str = "poison";
    const LEASE: Duration = Duration::from_secs(600);

    fn config(max_attempts: u32) -> Config {
        let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/llama-mha");
        let engine = EngineConfig { model_path: fixture.into(), ..EngineConfig::default() };
        Config { rank: 3, engine, max_attempts }
    }

    /// Takes `count` outcomes, then shuts the worker down.
    async fn collect(
        outcomes: &MemoryQueue<Settled>,
        count: usize,
        shutdown: &CancellationToken,
    ) -> Vec<Settled> {
        let mut settled = Vec::new();
        while settled.len() < count {
            for delivery in outcomes.pull(count, LEASE).await.unwrap() {
                settled.push(delivery.message().clone());
                delivery.ack().await.unwrap();
            }
        }
        shutdown.cancel();
        settled
    }

    /// Jobs `0` to `num_jobs - 1`, of which those in `poison` take the engine down; their outcomes.
    async fn outcomes_of(num_jobs: usize, poison: &[usize], max_attempts: u32) -> Vec<Settled> {
        let (jobs, outcomes) = (MemoryQueue::new(1_000, LEASE), MemoryQueue::new(1_000, LEASE));
        for number in 0..num_jobs {
            let mut job = job(&number.to_string());
            if poison.contains(&number) {
                job.context.query = POISON.to_owned();
            }
            jobs.publish(job).await.unwrap();
        }
        let shutdown = CancellationToken::new();
        let config = config(max_attempts);
        let start = || EngineThread::start_poisonable(config.engine.clone(), POISON);
        let engine = start().await.unwrap();
        let queues = (jobs.clone(), outcomes.clone());
        let working = run_engines(&config, (engine, start), queues, shutdown.clone());
        let (worked, settled) = tokio::join!(working, collect(&outcomes, num_jobs, &shutdown));
        worked.unwrap();
        assert!(jobs.is_empty(), "every job is settled");
        settled
    }

    fn failed(settled: &[Settled]) -> Vec<(&str, &str, u32)> {
        let failed = settled.iter().filter_map(|settled| match &settled.outcome {
            Outcome::Completed(_) => None,
            Outcome::Failed(reason) => {
                Some((settled.context.id.0.as_str(), reason.as_str(), settled.attempts))
            }
        });
        failed.collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn jobs_that_take_the_engine_down_harm_no_other() {
        let settled = outcomes_of(40, &[7, 21], 3).await;
        let mut ids: Vec<&str> = settled.iter().map(|s| s.context.id.0.as_str()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 40);
        let mut failed = failed(&settled);
        failed.sort_unstable();
        let guilty: Vec<&str> = failed.iter().map(|(id, ..)| *id).collect();
        assert_eq!(guilty, ["21", "7"], "{failed:?}");
        for (_, reason, attempts) in failed {
            assert!(reason.ends_with("with no other job in it") && attempts >= 3, "{reason}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_single_poisonous_job_is_given_up_and_the_worker_goes_on() {
        for max_attempts in [2, 12] {
            let settled = outcomes_of(1, &[0], max_attempts).await;
            assert_eq!(failed(&settled).len(), 1);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_prompt_that_cannot_fit_is_rejected_and_its_mates_are_answered() {
        let (jobs, outcomes) = (MemoryQueue::new(10, LEASE), MemoryQueue::new(10, LEASE));
        let mut long = job("long");
        long.context.query = "many words ".repeat(10_000);
        jobs.publish(long).await.unwrap();
        jobs.publish(job("short")).await.unwrap();
        let shutdown = CancellationToken::new();
        let working = run(config(5), jobs.clone(), outcomes.clone(), shutdown.clone(), |_| ());
        let (worked, settled) = tokio::join!(working, collect(&outcomes, 2, &shutdown));
        worked.unwrap();
        let failed = failed(&settled);
        assert_eq!((failed.len(), failed[0].0), (1, "long"));
        assert!(failed[0].1.contains("window"), "{failed:?}");
        let dead: Vec<String> =
            jobs.dead_letters().into_iter().map(|dead| dead.message.id().0.clone()).collect();
        assert_eq!(dead, ["long"]);
    }
}
