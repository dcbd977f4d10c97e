//! What goes wrong in a worker under test: a job that takes its process down, a device that hangs,
//! a death right after an outcome is stored. Without an option that asks for it, nothing does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use gpu_worker::{Answer, Backend, Counters, Error, Failure, Progress, Serving};
use shared::{Job, Publishing, Queue, QueueError, Settled, Stored};

/// A backend of which some jobs are the end; otherwise what it wraps.
#[derive(Clone, Debug)]
pub(super) struct Faulty<B> {
    /// What answers.
    pub(super) backend: B,
    /// Id of a job that aborts the process.
    pub(super) poison: Option<String>,
    /// Id of a job with which the device hangs for good, while the process lives on.
    pub(super) hang: Option<String>,
}

impl<B: Backend> Backend for Faulty<B> {
    type Engine = FaultyEngine<B::Engine>;

    async fn start(&self) -> Result<Self::Engine, Error> {
        Ok(FaultyEngine {
            engine: self.backend.start().await?,
            poison: self.poison.clone(),
            hang: self.hang.clone(),
            hangs: AtomicBool::new(false),
        })
    }
}

/// A started [`Faulty`].
pub(super) struct FaultyEngine<E> {
    engine: E,
    poison: Option<String>,
    hang: Option<String>,
    hangs: AtomicBool,
}

impl<E: Serving> Serving for FaultyEngine<E> {
    fn model_name(&self) -> &str {
        self.engine.model_name()
    }

    fn num_slots(&self) -> usize {
        self.engine.num_slots()
    }

    fn progress(&self) -> Progress {
        if self.hangs.load(Ordering::Relaxed) {
            return Progress { num_steps: u64::MAX, is_busy: true };
        }
        self.engine.progress()
    }

    fn counters(&self) -> Counters {
        self.engine.counters()
    }

    async fn down(&self) {
        self.engine.down().await;
    }

    async fn answer(&self, job: &Job) -> Result<Answer, Failure> {
        let id = Some(&job.id().0);
        if self.poison.as_ref() == id {
            std::process::abort();
        }
        if self.hang.as_ref() == id {
            self.hangs.store(true, Ordering::Relaxed);
        }
        if self.hangs.load(Ordering::Relaxed) {
            return std::future::pending().await;
        }
        self.engine.answer(job).await
    }
}

/// Outcomes of which the n-th, once it is stored, is the process' last deed.
#[derive(Clone)]
pub(super) struct LastWords<Q> {
    queue: Q,
    left: Option<Arc<AtomicU64>>,
}

impl<Q> LastWords<Q> {
    /// Aborts after `count` outcomes, if that is asked for.
    pub(super) fn new(queue: Q, count: Option<u64>) -> Self {
        Self { queue, left: count.map(|count| Arc::new(AtomicU64::new(count))) }
    }
}

impl<Q: Queue<Settled>> Queue<Settled> for LastWords<Q> {
    type Delivery = Q::Delivery;

    async fn publish(&self, outcome: Settled) -> Result<Stored, QueueError> {
        let stored = self.queue.publish(outcome).await?;
        if self.left.as_ref().is_some_and(|left| left.fetch_sub(1, Ordering::Relaxed) == 1) {
            std::process::abort();
        }
        Ok(stored)
    }

    async fn try_publish(&self, outcome: Settled) -> Result<Publishing, QueueError> {
        self.queue.try_publish(outcome).await
    }

    async fn pull(&self, max: usize, wait: Duration) -> Result<Vec<Q::Delivery>, QueueError> {
        self.queue.pull(max, wait).await
    }
}
