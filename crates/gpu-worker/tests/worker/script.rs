//! A backend that does what the query of a job says, and a process around the worker that can die.

use std::future::pending;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flotilla_gpu_worker::{
    Answer, Backend, Config, Counters, Error, Failure, Progress, Serving, Stats, run,
};
use shared::queue::conformance;
use shared::{Completed, FinishReason, Job, MemoryQueue, Queue, Settled};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const LEASE: Duration = Duration::from_secs(60);
/// What a quick answer takes.
pub(crate) const QUICK: Duration = Duration::from_millis(100);

/// What the engine does with a job, as its query says.
pub(crate) mod query {
    /// Answers after [`super::QUICK`].
    pub(crate) const QUICK: &str = "quick";
    /// Answers after ten leases, and makes progress all the while.
    pub(crate) const LONG: &str = "long";
    /// Answers after ten leases in which the engine has nothing to do.
    pub(crate) const IDLE: &str = "idle";
    /// Makes no progress until told to.
    pub(crate) const HANG: &str = "hang";
    /// Can't be answered.
    pub(crate) const REFUSE: &str = "refuse";
    /// Takes the engine down.
    pub(crate) const CRASH: &str = "crash";
    /// Takes the engine down after [`super::QUICK`].
    pub(crate) const CRASH_LATER: &str = "crash later";
    /// Takes the process down.
    pub(crate) const KILL: &str = "kill";
}

/// A job with this query.
pub(crate) fn job(id: &str, query: &str) -> Job {
    let mut job = conformance::job(id);
    job.context.query = query.to_owned();
    job
}

#[derive(Clone)]
pub(crate) struct Script {
    pub(crate) slots: usize,
    pub(crate) shared: Arc<Shared>,
}

/// What tests see and steer of all engines of a script.
#[derive(Default)]
pub(crate) struct Shared {
    num_steps: AtomicU64,
    num_busy: AtomicU64,
    /// Answers being computed.
    pub(crate) num_answering: AtomicU64,
    /// Answers that were dropped before they were there.
    pub(crate) num_aborted: AtomicU64,
    /// Whether a job that was dropped while it hung leaves the engine hanging.
    pub(crate) stuck: AtomicBool,
    /// Lets what hangs go on.
    pub(crate) released: AtomicBool,
    pub(crate) num_starts: AtomicU64,
    /// Jobs held at each death of the process.
    pub(crate) held_at_death: Mutex<Vec<u64>>,
    /// Kills the process.
    process: Mutex<CancellationToken>,
    pub(crate) stats: Mutex<Arc<Stats>>,
}

impl Script {
    pub(crate) fn new(slots: usize) -> Self {
        Self { slots, shared: Arc::default() }
    }
}

impl Backend for Script {
    type Engine = Engine;

    async fn start(&self) -> Result<Engine, Error> {
        self.shared.num_starts.fetch_add(1, Ordering::Relaxed);
        Ok(Engine { script: self.clone(), down: CancellationToken::new() })
    }
}

pub(crate) struct Engine {
    script: Script,
    down: CancellationToken,
}

impl Serving for Engine {
    fn model_name(&self) -> &str {
        "script"
    }

    fn num_slots(&self) -> usize {
        self.script.slots
    }

    fn progress(&self) -> Progress {
        let shared = &self.script.shared;
        Progress {
            num_steps: shared.num_steps.load(Ordering::Relaxed),
            is_busy: shared.num_busy.load(Ordering::Relaxed) > 0
                || shared.stuck.load(Ordering::Relaxed),
        }
    }

    fn counters(&self) -> Counters {
        let num_running = self.script.shared.num_answering.load(Ordering::Relaxed);
        Counters { num_running, ..Counters::default() }
    }

    async fn down(&self) {
        self.down.cancelled().await;
    }

    async fn answer(&self, job: &Job) -> Result<Answer, Failure> {
        let shared = &self.script.shared;
        if self.down.is_cancelled() {
            return Err(Failure::Down { held: false });
        }
        let _counted = Count::new(&shared.num_answering);
        let mut aborted = Aborted(Some(&shared.num_aborted));
        let result = tokio::select! {
            result = self.act(&job.context.query) => result,
            () = self.down.cancelled() => Err(Failure::Down { held: true }),
        };
        aborted.0 = None;
        result.map(|()| answer(job))
    }
}

impl Engine {
    async fn act(&self, query: &str) -> Result<(), Failure> {
        let shared = &self.script.shared;
        match query {
            query::LONG => {
                let _busy = Count::new(&shared.num_busy);
                for _ in 0..60 {
                    tokio::time::sleep(LEASE / 6).await;
                    shared.num_steps.fetch_add(1, Ordering::Relaxed);
                }
            }
            query::IDLE => tokio::time::sleep(LEASE * 10).await,
            query::HANG => {
                let _busy = Count::new(&shared.num_busy);
                while !shared.released.load(Ordering::Relaxed) {
                    tokio::time::sleep(QUICK).await;
                }
                shared.num_steps.fetch_add(1, Ordering::Relaxed);
            }
            query::REFUSE => return Err(Failure::Rejected("refused".into())),
            query::CRASH | query::CRASH_LATER => {
                if query == query::CRASH_LATER {
                    tokio::time::sleep(QUICK).await;
                }
                self.down.cancel();
                return Err(Failure::Down { held: true });
            }
            query::KILL => {
                tokio::time::sleep(QUICK / 2).await;
                let held = shared.stats.lock().unwrap().snapshot().num_held();
                shared.held_at_death.lock().unwrap().push(held);
                shared.process.lock().unwrap().cancel();
                pending::<()>().await;
            }
            _ => {
                tokio::time::sleep(QUICK).await;
                shared.num_steps.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

/// Counts up until dropped.
struct Count<'a>(&'a AtomicU64);

impl<'a> Count<'a> {
    fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Aborted<'a>(Option<&'a AtomicU64>);

impl Drop for Aborted<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.0 {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn answer(job: &Job) -> Answer {
    Answer {
        completed: Completed {
            answer: format!("answer to {}", job.id()),
            finish_reason: FinishReason::Stop,
            prompt_tokens: 1,
            completion_tokens: 1,
            prompt_sha256: String::new(),
            context_truncated: false,
            logprobs: None,
        },
        queue_time: Duration::ZERO,
        time_to_first_token: QUICK,
        generation_time: Duration::ZERO,
    }
}

pub(crate) fn config(max_attempts: u32, drain_timeout: Duration) -> Config {
    Config { rank: 0, name: "tested".into(), max_attempts, drain_timeout }
}

/// A worker in a task of its own.
pub(crate) struct Worker {
    pub(crate) shutdown: CancellationToken,
    pub(crate) stats: Arc<Stats>,
    pub(crate) task: JoinHandle<Result<(), Error>>,
}

impl Worker {
    pub(crate) fn start<J: Queue<Job>, O: Queue<Settled>>(
        config: Config,
        script: &Script,
        queues: (&J, &O),
    ) -> Self {
        let (shutdown, stats) = (CancellationToken::new(), Arc::new(Stats::default()));
        *script.shared.stats.lock().unwrap() = Arc::clone(&stats);
        let queues = (queues.0.clone(), queues.1.clone());
        let control = (Arc::clone(&stats), shutdown.clone());
        let task = tokio::spawn(run(config, script.clone(), queues, control, |_model| ()));
        Self { shutdown, stats, task }
    }

    /// Tells it to stop, and waits until it has.
    pub(crate) async fn stop(self) -> Result<(), Error> {
        self.shutdown.cancel();
        self.task.await.unwrap()
    }
}

/// A worker's process: dies of jobs that kill it, and is started again, until dropped. All that it
/// held comes again when the leases run out.
pub(crate) struct Process {
    pub(crate) script: Script,
    supervisor: JoinHandle<()>,
}

impl Process {
    pub(crate) fn start(max_attempts: u32, slots: usize, queues: Queues) -> Self {
        let script = Script::new(slots);
        let supervised = script.clone();
        let supervisor = tokio::spawn(async move {
            loop {
                let process = CancellationToken::new();
                *supervised.shared.process.lock().unwrap() = process.clone();
                let config = config(max_attempts, Duration::MAX);
                let worker = Worker::start(config, &supervised, (&queues.jobs, &queues.outcomes));
                let mut task = AbortOnDrop(worker.task);
                tokio::select! {
                    ended = &mut task.0 => ended.unwrap().unwrap(),
                    () = process.cancelled() => {}
                }
            }
        });
        Self { script, supervisor }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Clone)]
pub(crate) struct Queues {
    pub(crate) jobs: MemoryQueue<Job>,
    pub(crate) outcomes: MemoryQueue<Settled>,
}

impl Queues {
    pub(crate) fn new() -> Self {
        Self { jobs: MemoryQueue::new(1_000, LEASE), outcomes: MemoryQueue::new(1_000, LEASE) }
    }

    pub(crate) async fn publish(&self, jobs: impl IntoIterator<Item = (&str, &str)>) {
        for (id, query) in jobs {
            self.jobs.publish(job(id, query)).await.unwrap();
        }
    }

    /// The next `count` outcomes.
    pub(crate) async fn collect(&self, count: usize) -> Vec<Settled> {
        collect(&self.outcomes, count).await
    }
}

/// The next `count` outcomes, in the order of their ids.
pub(crate) async fn collect<Q: Queue<Settled>>(outcomes: &Q, count: usize) -> Vec<Settled> {
    use shared::Delivery;
    let mut settled = Vec::new();
    while settled.len() < count {
        let pulled = outcomes.pull(count, LEASE * 10_000).await.unwrap();
        assert!(!pulled.is_empty(), "{} of {count} outcomes came", settled.len());
        for delivery in pulled {
            settled.push(delivery.message().clone());
            delivery.ack().await.unwrap();
        }
    }
    settled.sort_by(|a, b| a.context.id.cmp(&b.context.id));
    settled
}

/// Waits until it is true.
pub(crate) async fn until(what: &str, is_true: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + LEASE * 50;
    while !is_true() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(QUICK / 10).await;
    }
}
