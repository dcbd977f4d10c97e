//! The worker with the real engine: one that panics, prompts that don't fit, jobs that are dropped.

use std::time::Duration;

use engine::{EngineConfig, SamplingParams};
use shared::queue::conformance::job;
use shared::{Delivery, MemoryQueue, Outcome};

use super::*;
use crate::engine_thread::EngineThread;

const POISON: &str = "poison";
const LEASE: Duration = Duration::from_secs(600);
/// Longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(60);

fn engine_config() -> EngineConfig {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/fixtures/llama-mha");
    EngineConfig { model_path: fixture.into(), ..EngineConfig::default() }
}

/// An engine that panics when a prompt contains [`POISON`].
#[derive(Clone)]
struct Poisonable;

impl Backend for Poisonable {
    type Engine = LocalEngine;

    async fn start(&self) -> Result<LocalEngine, Error> {
        Ok(LocalEngine::new(EngineThread::start_poisonable(engine_config(), POISON).await?))
    }
}

fn config(max_attempts: u32) -> Config {
    Config { rank: 3, name: "tested".into(), max_attempts, drain_timeout: Duration::MAX }
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

async fn work<B: Backend>(
    backend: B,
    (jobs, num_jobs): (&MemoryQueue<Job>, usize),
    max_attempts: u32,
) -> (Vec<Settled>, Snapshot) {
    let outcomes = MemoryQueue::new(1_000, LEASE);
    let shutdown = CancellationToken::new();
    let stats = Arc::new(Stats::default());
    let queues = (jobs.clone(), outcomes.clone());
    let control = (Arc::clone(&stats), shutdown.clone());
    let working = run(config(max_attempts), backend, queues, control, |_model| ());
    let (worked, settled) = tokio::join!(working, collect(&outcomes, num_jobs, &shutdown));
    worked.unwrap();
    assert!(jobs.is_empty(), "every job is settled");
    (settled, stats.snapshot())
}

/// Jobs `0` to `num_jobs - 1`, of which those in `poison` take the engine down; their outcomes.
async fn outcomes_of(num_jobs: usize, poison: &[usize], max_attempts: u32) -> Vec<Settled> {
    let jobs = MemoryQueue::new(1_000, LEASE);
    for number in 0..num_jobs {
        let mut job = job(&number.to_string());
        if poison.contains(&number) {
            job.context.query = POISON.to_owned();
        }
        jobs.publish(job).await.unwrap();
    }
    let (settled, stats) = work(Poisonable, (&jobs, num_jobs), max_attempts).await;
    assert_eq!(stats.failed[&FailureKind::TookEngineDown], poison.len() as u64);
    assert_eq!(stats.num_answered(), (num_jobs - poison.len()) as u64);
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
    let jobs = MemoryQueue::new(10, LEASE);
    let mut long = job("long");
    long.context.query = "many words ".repeat(10_000);
    jobs.publish(long).await.unwrap();
    jobs.publish(job("short")).await.unwrap();
    let backend = EngineBackend { engine: engine_config() };
    let (settled, stats) = work(backend, (&jobs, 2), 5).await;
    let failed = failed(&settled);
    assert_eq!((failed.len(), failed[0].0), (1, "long"));
    assert!(failed[0].1.contains("window"), "{failed:?}");
    let dead: Vec<String> =
        jobs.dead_letters().into_iter().map(|dead| dead.message.id().0.clone()).collect();
    assert_eq!(dead, ["long"]);
    assert_eq!((stats.model.as_str(), stats.num_failed()), ("llama-mha", 1));
    // The numbers are those of the engine, although it is gone by now.
    assert_eq!(stats.engine.generation_tokens, 8);
    assert!(stats.engine.prompt_tokens > 0);
    assert_eq!((stats.time_to_first_token.count, stats.inter_token_latency.count), (1, 7));
    assert!(stats.time_to_first_token.sum >= stats.request_queue_time.sum);
    assert!(stats.e2e_request_latency.sum >= stats.time_to_first_token.sum);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_answer_ends_the_work_on_it() {
    let engine = EngineThread::start(engine_config()).await.unwrap();
    assert!(!engine.progress().is_busy);
    let endless = SamplingParams {
        max_new_tokens: usize::MAX,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let mut answering = Box::pin(engine.complete(vec![5, 6, 7], endless));
    tokio::select! {
        _ended = &mut answering => {}
        () = until(|| engine.progress().num_steps > 2) => assert!(engine.progress().is_busy),
    }
    drop(answering);
    until(|| !engine.progress().is_busy && engine.stats().num_running == 0).await;
    assert_eq!(engine.stats().kv_blocks_used, 0);
}

/// Waits for something that another thread does.
async fn until(is_true: impl Fn() -> bool) {
    let waiting = async {
        while !is_true() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.expect("it should have come true");
}
