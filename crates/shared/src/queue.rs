//! What flotilla needs of a queue: at-least-once delivery with leases, redelivery and dead letters.
//!
//! Two queues connect the roles: jobs (producer → workers) and outcomes (workers → collector).
//! Every implementation passes the suite in `queue/conformance.rs`. The collector makes "at least once"
//! into "exactly once"; nothing here tries to.

use std::future::Future;
use std::time::Duration;

use thiserror::Error;

use crate::message::{Job, Settled};

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod memory;

/// Something a queue can carry.
pub trait Message: Clone + Send + Sync + 'static {
    /// Id under which the queue recognises a repeated publish: `run/id`.
    fn message_id(&self) -> String;
}

impl Message for Job {
    fn message_id(&self) -> String {
        format!("{}/{}", self.run.0, self.id())
    }
}

impl Message for Settled {
    fn message_id(&self) -> String {
        format!("{}/{}", self.run.0, self.context.id)
    }
}

/// Why a queue could not do what it was asked.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The lease of this delivery ran out: the message is, or will be, delivered to somebody else.
    #[error("the lease of message '{0}' ran out and it was given back to the queue")]
    LeaseExpired(String),
    /// The message is larger than the queue takes: publishing it can never work.
    #[error("message '{message_id}' has {bytes} bytes, the queue takes {limit} at most")]
    TooLarge {
        /// The message.
        message_id: String,
        /// Its size.
        bytes: usize,
        /// The largest size.
        limit: usize,
    },
    /// The server can't serve this. Passing trouble is waited out and never comes here.
    #[error("the queue's server cannot go on")]
    Server(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A queue of `T`. Clones are handles to the same queue.
pub trait Queue<T: Message>: Clone + Send + Sync + 'static {
    /// A message received and not yet settled.
    type Delivery: Delivery<T>;

    /// Stores `message`, waiting while the queue is full. Returns once it is as durable as this
    /// queue can make it. A message whose id the queue still holds is not stored again.
    fn publish(&self, message: T) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Takes up to `max` messages: as soon as there is one, or none after `wait`. Dropping the
    /// future before it is ready takes none.
    fn pull(
        &self,
        max: usize,
        wait: Duration,
    ) -> impl Future<Output = Result<Vec<Self::Delivery>, QueueError>> + Send;
}

/// A message received and not yet settled. Exactly one of [`ack`](Delivery::ack),
/// [`retry`](Delivery::retry) and [`reject`](Delivery::reject) settles it; one that is dropped is
/// delivered again when its lease runs out.
pub trait Delivery<T: Message>: Send + Sync + 'static {
    /// The message.
    fn message(&self) -> &T;

    /// How many times it has been delivered, this time included.
    fn attempt(&self) -> u32;

    /// How long it stays this holder's without [`keep_alive`](Delivery::keep_alive).
    fn lease(&self) -> Duration;

    /// Starts the lease anew.
    fn keep_alive(&self) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// It is done: removes it.
    fn ack(self) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// It failed but may work elsewhere or later: delivers it again after `delay`.
    fn retry(self, delay: Duration) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// It can never work: removes it and keeps it as a dead letter with the reason.
    fn reject(self, reason: String) -> impl Future<Output = Result<(), QueueError>> + Send;
}
