//! A queue in memory that takes no large messages, and that can break for good.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shared::queue::Publishing;
use shared::queue::memory::MemoryDelivery;
use shared::{MemoryQueue, Message, Outcome, Queue, QueueError, Settled, Stored};

/// Most bytes of text in an outcome.
pub(crate) const LIMIT: usize = 1_000;

#[derive(Clone)]
pub(crate) struct FaultyQueue<T> {
    pub(crate) inner: MemoryQueue<T>,
    pub(crate) is_broken: Arc<AtomicBool>,
}

impl<T: Message> FaultyQueue<T> {
    pub(crate) fn new(inner: &MemoryQueue<T>) -> Self {
        Self { inner: inner.clone(), is_broken: Arc::default() }
    }

    pub(crate) fn break_down(&self) {
        self.is_broken.store(true, Ordering::Relaxed);
    }

    fn check(&self) -> Result<(), QueueError> {
        if self.is_broken.load(Ordering::Relaxed) {
            return Err(QueueError::Server("the stream is gone".into()));
        }
        Ok(())
    }
}

/// A message of which the size matters.
pub(crate) trait Measured {
    fn num_bytes(&self) -> usize;
}

impl Measured for Settled {
    fn num_bytes(&self) -> usize {
        let text = match &self.outcome {
            Outcome::Completed(completed) => completed.answer.len(),
            Outcome::Failed(reason) => reason.len(),
        };
        text + self.context.context.len() + self.context.query.len()
    }
}

impl Measured for shared::Job {
    fn num_bytes(&self) -> usize {
        0
    }
}

impl<T: Message + Measured> Queue<T> for FaultyQueue<T> {
    type Delivery = MemoryDelivery<T>;

    async fn publish(&self, message: T) -> Result<Stored, QueueError> {
        self.check()?;
        let bytes = message.num_bytes();
        if bytes > LIMIT {
            let message_id = message.message_id();
            return Err(QueueError::TooLarge { message_id, bytes, limit: LIMIT });
        }
        self.inner.publish(message).await
    }

    async fn try_publish(&self, message: T) -> Result<Publishing, QueueError> {
        self.publish(message).await.map(|_| Publishing::Stored)
    }

    async fn pull(&self, max: usize, wait: Duration) -> Result<Vec<Self::Delivery>, QueueError> {
        self.check()?;
        let pulled = self.inner.pull(max, wait).await;
        self.check()?;
        pulled
    }
}
