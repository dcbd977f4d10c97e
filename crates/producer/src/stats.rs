//! What the producer has done so far, for metrics and status lines.
//!
//! Written by publishing, listening and retrieval; read by whoever shows it. Nothing here decides
//! anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counters that only grow, and one gauge. Shared; reading them costs nothing.
#[derive(Debug, Default)]
pub struct Stats {
    published: AtomicU64,
    repeated: AtomicU64,
    failed: AtomicU64,
    rejected: AtomicU64,
    answered: AtomicU64,
    waiting: AtomicU64,
    retrievals: AtomicU64,
    retrieval_micros: AtomicU64,
}

/// The figures at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Jobs that the queue confirmed.
    pub published: u64,
    /// Jobs that the queue had already: nothing was added.
    pub repeated: u64,
    /// Failed outcomes that the queue confirmed: input that never became a job.
    pub failed: u64,
    /// Bad input that can have no line.
    pub rejected: u64,
    /// Input left out since a collector said that it has its line.
    pub answered: u64,
    /// Publishes begun and not yet confirmed.
    pub waiting: u64,
    /// Queries that a context was looked up for.
    pub retrievals: u64,
    /// Seconds that looking up took, summed over threads.
    pub retrieval_seconds: f64,
}

impl Stats {
    /// The figures now.
    pub fn snapshot(&self) -> Snapshot {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Snapshot {
            published: read(&self.published),
            repeated: read(&self.repeated),
            failed: read(&self.failed),
            rejected: read(&self.rejected),
            answered: read(&self.answered),
            waiting: read(&self.waiting),
            retrievals: read(&self.retrievals),
            retrieval_seconds: Duration::from_micros(read(&self.retrieval_micros)).as_secs_f64(),
        }
    }

    pub(crate) fn add_published(&self) {
        self.published.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_repeated(&self) {
        self.repeated.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_rejected(&self) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
    }

    /// So many queries more have their line already and are left out.
    pub fn add_answered(&self, count: u64) {
        self.answered.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn add_retrieval(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.retrievals.fetch_add(1, Ordering::Relaxed);
        self.retrieval_micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// Counts a publish as waiting until what it returns is dropped.
    pub(crate) fn waiting(self: &Arc<Self>) -> Waiting {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(Arc::clone(self))
    }
}

/// A publish that is under way.
pub(crate) struct Waiting(Arc<Stats>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
