//! The contract between flotilla's roles: the messages they exchange, the queue between them, and
//! what they tell about themselves.
//!
//! Depends on nothing heavy, and on none of the roles. The queue on NATS JetStream is a feature, `nats`.

pub mod generation;
pub mod id_table;
pub mod json;
pub mod message;
pub mod queue;
pub mod status;
pub mod token;

pub use generation::Generation;
pub use id_table::IdTable;
pub use message::{
    Completed, Context, Dependencies, DocumentRef, FinishReason, GeneratedToken, IdDigest, Job,
    JobId, Logprobs, Outcome, Query, RetrievalMethod, RunId, Settled, TokenLogprob, WIRE_VERSION,
    job_seed,
};
pub use queue::memory::MemoryQueue;
pub use queue::{Delivery, Message, Publishing, Queue, QueueError, Stored};
