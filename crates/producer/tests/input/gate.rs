//! A queue whose confirmations the test gives one by one, or all at once.

use std::sync::Arc;
use std::time::Duration;

use shared::queue::Publishing;
use shared::queue::memory::MemoryDelivery;
use shared::{Delivery, Job, MemoryQueue, Message, Queue, QueueError, Settled, Stored};
use tokio::sync::{Semaphore, watch};

use crate::soon;

const LEASE: Duration = Duration::from_secs(600);

/// Publishes that wait, now and at most so far.
#[derive(Clone, Copy, Default)]
pub(crate) struct Waiting {
    pub(crate) now: usize,
    pub(crate) peak: usize,
}

#[derive(Clone)]
pub(crate) struct Gate<T> {
    inner: MemoryQueue<T>,
    permits: Arc<Semaphore>,
    waiting: watch::Sender<Waiting>,
    /// The most characters of a message's texts that it takes.
    pub(crate) max_bytes: usize,
    /// Whether its server can't serve it.
    pub(crate) is_broken: bool,
}

/// What the size of a message is taken for.
pub(crate) trait Sized {
    fn bytes(&self) -> usize;
}

impl Sized for Job {
    fn bytes(&self) -> usize {
        self.context.context.len() + self.context.query.len()
    }
}

impl Sized for Settled {
    fn bytes(&self) -> usize {
        self.context.context.len() + self.context.query.len()
    }
}

impl<T: Message> Gate<T> {
    /// Confirms nothing until it is told to.
    pub(crate) fn closed() -> Self {
        Self {
            inner: MemoryQueue::new(100_000, LEASE),
            permits: Arc::new(Semaphore::new(0)),
            waiting: watch::Sender::default(),
            max_bytes: usize::MAX,
            is_broken: false,
        }
    }

    /// Confirms everything.
    pub(crate) fn open() -> Self {
        let gate = Self::closed();
        gate.confirm(Semaphore::MAX_PERMITS);
        gate
    }

    pub(crate) fn confirm(&self, number: usize) {
        self.permits.add_permits(number);
    }

    /// Waits until so many publishes wait; their peak.
    pub(crate) async fn until_waiting(&self, number: usize) -> usize {
        let mut waiting = self.waiting.subscribe();
        soon(waiting.wait_for(|waiting| waiting.now == number)).await.unwrap().peak
    }

    pub(crate) fn peak(&self) -> usize {
        self.waiting.borrow().peak
    }

    /// All that was published, in its order.
    pub(crate) async fn take(&self) -> Vec<T> {
        let mut all = Vec::new();
        for delivery in self.inner.pull(usize::MAX, Duration::ZERO).await.unwrap() {
            all.push(delivery.message().clone());
            delivery.ack().await.unwrap();
        }
        all
    }
}

impl Gate<Job> {
    pub(crate) async fn ids(&self) -> Vec<String> {
        self.take().await.into_iter().map(|job| job.id().0.clone()).collect()
    }
}

impl<T: Message + Sized> Queue<T> for Gate<T> {
    type Delivery = MemoryDelivery<T>;

    async fn publish(&self, message: T) -> Result<Stored, QueueError> {
        if self.is_broken {
            return Err(QueueError::Server("no such stream".into()));
        }
        let (message_id, bytes) = (message.message_id(), message.bytes());
        if bytes > self.max_bytes {
            return Err(QueueError::TooLarge { message_id, bytes, limit: self.max_bytes });
        }
        self.waiting.send_modify(|waiting| {
            waiting.now += 1;
            waiting.peak = waiting.peak.max(waiting.now);
        });
        let _gone = Gone(&self.waiting);
        self.permits.acquire().await.unwrap().forget();
        self.inner.publish(message).await
    }

    async fn try_publish(&self, message: T) -> Result<Publishing, QueueError> {
        self.inner.try_publish(message).await
    }

    async fn pull(&self, max: usize, wait: Duration) -> Result<Vec<Self::Delivery>, QueueError> {
        self.inner.pull(max, wait).await
    }
}

struct Gone<'w>(&'w watch::Sender<Waiting>);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| waiting.now -= 1);
    }
}
