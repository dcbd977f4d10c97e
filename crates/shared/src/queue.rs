//! What flotilla needs of a queue: at-least-once delivery with leases, redelivery and dead letters.
//!
//! Two queues connect the roles: jobs (producer → workers) and outcomes (workers → collector).
//! Every implementation passes the suite in `queue/conformance.rs`. The collector makes "at least once"
//! into "exactly once"; nothing here tries to.

use std::future::Future;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::message::{Job, RunId, Settled};

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod memory;
#[cfg(feature = "nats")]
pub mod nats;

/// Something a queue can carry.
pub trait Message: Clone + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Id under which the queue recognises a repeated publish: `run/id`.
    fn message_id(&self) -> String;

    /// The run it belongs to.
    fn run(&self) -> &RunId;

    /// Its wire version.
    fn version(&self) -> u16;
}

impl Message for Job {
    fn message_id(&self) -> String {
        format!("{}/{}", self.run.0, self.id())
    }

    fn run(&self) -> &RunId {
        &self.run
    }

    fn version(&self) -> u16 {
        self.version
    }
}

impl Message for Settled {
    fn message_id(&self) -> String {
        format!("{}/{}", self.run.0, self.context.id)
    }

    fn run(&self) -> &RunId {
        &self.run
    }

    fn version(&self) -> u16 {
        self.version
    }
}

/// Why a queue could not do what it was asked. Passing trouble, such as a lost connection, is
/// waited out and logged instead.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The lease of this delivery ran out: the message is, or will be, delivered to somebody else.
    #[error("the lease of message '{0}' ran out and it was given back to the queue")]
    LeaseExpired(String),
    /// The message is larger than the queue takes; it always will be.
    #[error("message '{message_id}' is too large: expected at most {limit} bytes, given {bytes}")]
    TooLarge {
        /// The message.
        message_id: String,
        /// Its size.
        bytes: usize,
        /// The most that the queue takes.
        limit: usize,
    },
    /// The server behind the queue can't serve this, now or later.
    #[error("the queue's server cannot serve this")]
    Server(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What a message that is stored was to the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// A new one.
    New,
    /// One that it had already, by its id: nothing was added.
    Repeated,
}

/// What became of a publish that doesn't wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publishing {
    /// The message is stored.
    Stored,
    /// The queue is full, or can't be reached now. Try again later; it may have been stored.
    Full,
}

/// A queue of `T`. Clones are handles to the same queue.
pub trait Queue<T: Message>: Clone + Send + Sync + 'static {
    /// A message received and not yet settled.
    type Delivery: Delivery<T>;

    /// Stores `message`, waiting while the queue is full. Returns once it is as durable as this
    /// queue can make it. A message whose id the queue still holds is not stored again, whatever else
    /// is in it.
    fn publish(&self, message: T) -> impl Future<Output = Result<Stored, QueueError>> + Send;

    /// The same without waiting for room.
    fn try_publish(
        &self,
        message: T,
    ) -> impl Future<Output = Result<Publishing, QueueError>> + Send;

    /// Takes up to `max` messages: as soon as there is one, or none after `wait`. Dropping the
    /// future before it is ready strands none: what was on its way goes to the next pull.
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
