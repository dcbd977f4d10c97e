//! The contract between flotilla's roles: the messages they exchange and the queue between them.
//!
//! Depends on nothing heavy, and on none of the roles.

pub mod message;
pub mod queue;

pub use message::{
    Completed, Context, Dependencies, DocumentRef, FinishReason, Generation, IdDigest, Job, JobId,
    Outcome, Query, RetrievalMethod, RunId, Settled, WIRE_VERSION, job_seed,
};
pub use queue::memory::MemoryQueue;
pub use queue::{Delivery, Message, Queue, QueueError};
