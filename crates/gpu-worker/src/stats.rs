//! What a worker counts: for its heartbeats and its metrics. Not how either is shown.
//!
//! The worker writes, anybody reads with [`Stats::snapshot`]. Counting never waits, but for the short
//! lock around the jobs held.

mod histogram;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use shared::{Completed, FinishReason, RunId};

use crate::backend::{Answer, Counters};

use histogram::Histogram;
pub use histogram::HistogramSnapshot;

/// Why a job failed for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureKind {
    /// The engine refused or failed it; the next would as well.
    Refused,
    /// It took the engine down when it was alone in it.
    TookEngineDown,
    /// The worker was gone at the end of too many of its deliveries.
    GivenUp,
    /// Its outcome is larger than the queue takes.
    TooLarge,
}

impl FailureKind {
    const ALL: [Self; 4] = [Self::Refused, Self::TookEngineDown, Self::GivenUp, Self::TooLarge];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::TookEngineDown => "took_engine_down",
            Self::GivenUp => "given_up",
            Self::TooLarge => "too_large",
        }
    }
}

/// The counters of one worker.
#[derive(Default)]
pub struct Stats {
    model: Mutex<String>,
    num_slots: AtomicU64,
    held: Mutex<BTreeMap<RunId, u64>>,
    stopped: AtomicU64,
    length: AtomicU64,
    failed: [AtomicU64; FailureKind::ALL.len()],
    given_back: AtomicU64,
    leases_lost: AtomicU64,
    redeliveries: AtomicU64,
    engine_starts: AtomicU64,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    e2e_request_latency: Histogram,
    request_queue_time: Histogram,
    engine: Mutex<EngineNumbers>,
}

/// The numbers of the engine that is up, and of those before it.
#[derive(Default)]
struct EngineNumbers {
    ended: Counters,
    current: Option<Weak<dyn Source>>,
}

/// Where the numbers of the engine come from.
pub(crate) trait Source: Send + Sync {
    fn counters(&self) -> Counters;
}

/// A worker's counters at a moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Name of the model; empty until it is loaded.
    pub model: String,
    /// Jobs it holds at most.
    pub num_slots: u64,
    /// Jobs it holds, by run.
    pub held: BTreeMap<RunId, u64>,
    /// Jobs answered, by the reason why the answer ended: `stop` or `length`.
    pub answered: BTreeMap<&'static str, u64>,
    /// Jobs failed for good, by the reason.
    pub failed: BTreeMap<FailureKind, u64>,
    /// Jobs given back to the queue.
    pub given_back: u64,
    /// Jobs whose lease was lost.
    pub leases_lost: u64,
    /// Jobs received that had been delivered before.
    pub redeliveries: u64,
    /// Times that an engine was started.
    pub engine_starts: u64,
    /// Of all engines so far; `num_running` and the blocks are the current one's.
    pub engine: Counters,
    /// From the delivery to the first token.
    pub time_to_first_token: HistogramSnapshot,
    /// Between two tokens of an answer, as the mean over the answer.
    pub inter_token_latency: HistogramSnapshot,
    /// From the delivery to the outcome.
    pub e2e_request_latency: HistogramSnapshot,
    /// From the delivery to the first step of its computation.
    pub request_queue_time: HistogramSnapshot,
}

impl Snapshot {
    /// Jobs it holds.
    pub fn num_held(&self) -> u64 {
        self.held.values().sum()
    }

    /// Jobs it holds that the engine does not compute: they wait, or their outcome does.
    pub fn num_waiting(&self) -> u64 {
        self.num_held().saturating_sub(self.engine.num_running)
    }

    /// Jobs answered.
    pub fn num_answered(&self) -> u64 {
        self.answered.values().sum()
    }

    /// Jobs failed for good.
    pub fn num_failed(&self) -> u64 {
        self.failed.values().sum()
    }
}

impl Stats {
    /// The counters now. Each is exact; together they may be of slightly different moments.
    pub fn snapshot(&self) -> Snapshot {
        let answered = [("length", count(&self.length)), ("stop", count(&self.stopped))];
        let failed = FailureKind::ALL.into_iter().zip(self.failed.iter().map(count));
        Snapshot {
            model: lock(&self.model).clone(),
            num_slots: count(&self.num_slots),
            held: lock(&self.held).clone(),
            answered: answered.into(),
            failed: failed.collect(),
            given_back: count(&self.given_back),
            leases_lost: count(&self.leases_lost),
            redeliveries: count(&self.redeliveries),
            engine_starts: count(&self.engine_starts),
            engine: lock(&self.engine).now(),
            time_to_first_token: self.time_to_first_token.snapshot(),
            inter_token_latency: self.inter_token_latency.snapshot(),
            e2e_request_latency: self.e2e_request_latency.snapshot(),
            request_queue_time: self.request_queue_time.snapshot(),
        }
    }

    /// Notes a started engine, as the one whose numbers count from now on.
    pub(crate) fn engine_started(&self, model: &str, num_slots: usize, source: Weak<dyn Source>) {
        model.clone_into(&mut lock(&self.model));
        self.num_slots.store(num_slots as u64, Ordering::Relaxed);
        add(&self.engine_starts, 1);
        lock(&self.engine).current = Some(source);
    }

    /// Notes the last numbers of the engine.
    pub(crate) fn engine_ended(&self) {
        let mut engine = lock(&self.engine);
        let last = engine.now();
        let ended = Counters { num_running: 0, kv_blocks_used: 0, kv_blocks_total: 0, ..last };
        *engine = EngineNumbers { ended, current: None };
    }

    /// Counts a job as held until what it returns is dropped.
    pub(crate) fn hold(self: &Arc<Self>, run: &RunId, attempt: u32) -> Held {
        if attempt > 1 {
            add(&self.redeliveries, 1);
        }
        let mut held = lock(&self.held);
        match held.get_mut(run) {
            Some(count) => *count += 1,
            None => drop(held.insert(run.clone(), 1)),
        }
        Held { stats: Arc::clone(self), run: run.clone() }
    }

    pub(crate) fn answered(&self, answer: &Answer) {
        let Completed { finish_reason, completion_tokens, .. } = &answer.completed;
        match finish_reason {
            FinishReason::Stop => add(&self.stopped, 1),
            FinishReason::Length => add(&self.length, 1),
        }
        self.request_queue_time.observe(answer.queue_time, 1);
        self.time_to_first_token.observe(answer.time_to_first_token, 1);
        let num_gaps = completion_tokens.saturating_sub(1);
        if let Some(gap) = answer.generation_time.checked_div(num_gaps) {
            self.inter_token_latency.observe(gap, num_gaps.into());
        }
    }

    pub(crate) fn failed(&self, kind: FailureKind) {
        add(&self.failed[kind as usize], 1);
    }

    pub(crate) fn settled_after(&self, elapsed: Duration) {
        self.e2e_request_latency.observe(elapsed, 1);
    }

    pub(crate) fn gave_back(&self) {
        add(&self.given_back, 1);
    }

    pub(crate) fn lost_lease(&self) {
        add(&self.leases_lost, 1);
    }
}

impl EngineNumbers {
    fn now(&self) -> Counters {
        let current = self.current.as_ref().and_then(Weak::upgrade);
        let Some(now) = current.map(|source| source.counters()) else {
            return self.ended;
        };
        let ended = &self.ended;
        Counters {
            prompt_tokens: ended.prompt_tokens + now.prompt_tokens,
            generation_tokens: ended.generation_tokens + now.generation_tokens,
            cached_prompt_tokens: ended.cached_prompt_tokens + now.cached_prompt_tokens,
            preemptions: ended.preemptions + now.preemptions,
            ..now
        }
    }
}

/// A job that is held.
pub(crate) struct Held {
    stats: Arc<Stats>,
    run: RunId,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = lock(&self.stats.held);
        if let Some(count) = held.get_mut(&self.run) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.run);
            }
        }
    }
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

/// No code panics while it holds one of these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
