//! What answers jobs: the engine of this machine, or nothing at all.
//!
//! A [`Backend`] starts [`Serving`]s, one after another: the worker starts a new one when one goes
//! down. What a failure means for a job is decided in `serve`, not here.

mod local;
mod noop;

use std::future::Future;
use std::time::Duration;

use shared::{Completed, Job};

use crate::Error;

pub use local::{EngineBackend, LocalEngine};
pub use noop::{Noop, NoopEngine};

/// Starts what answers jobs.
pub trait Backend: Clone + Send + Sync + 'static {
    /// What it starts.
    type Engine: Serving;

    /// Starts an engine and waits until it can answer.
    fn start(&self) -> impl Future<Output = Result<Self::Engine, Error>> + Send;
}

/// An engine that is up. Answers jobs, many at a time.
pub trait Serving: Send + Sync + 'static {
    /// Name of the model.
    fn model_name(&self) -> &str;

    /// Jobs to hold at a time.
    fn num_slots(&self) -> usize;

    /// What the renewal of leases is bound to.
    fn progress(&self) -> Progress;

    /// Its numbers.
    fn counters(&self) -> Counters;

    /// Waits until it is down: it answers nothing any more.
    fn down(&self) -> impl Future<Output = ()> + Send;

    /// Answers one job. Dropping the future ends the work on it.
    fn answer(&self, job: &Job) -> impl Future<Output = Result<Answer, Failure>> + Send;
}

/// How far an engine is. It hangs when it is busy and `num_steps` stays the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Grows with every piece of work done, be it for whichever job.
    pub num_steps: u64,
    /// Whether there is work. Without any, no progress is no sign of trouble.
    pub is_busy: bool,
}

/// An answer, and how long it took from the call of [`Serving::answer`].
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The answer.
    pub completed: Completed,
    /// Until the first step that computed something of it.
    pub queue_time: Duration,
    /// Until its first token.
    pub time_to_first_token: Duration,
    /// From its first to its last token.
    pub generation_time: Duration,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// This job can never be answered; the reason.
    Rejected(String),
    /// The engine is gone.
    Down {
        /// Whether it may have been this job that took it down.
        held: bool,
    },
}

/// Numbers of an engine since its start. Those named `num_*` and the blocks are of now, the others
/// only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Jobs that are being computed.
    pub num_running: u64,
    /// Tokens of prompts whose answers have begun.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Those of `prompt_tokens` that prefix caching spared.
    pub cached_prompt_tokens: u64,
    /// Times that a job lost its KV blocks to an older one.
    pub preemptions: u64,
    /// KV blocks in use.
    pub kv_blocks_used: u64,
    /// KV blocks.
    pub kv_blocks_total: u64,
}
