//! Outcomes in, lines out: every answer exactly once, as a line of a JSONL file.
//!
//! [`Output`] is the file and the truth, a [`Dedup`] an index of the ids in it (in memory, or in
//! Redis), [`Collector`] the machine that keeps the two in step, [`Report`] what was counted.
//! [`run`] is the role: it takes outcomes off the queue and acks each only after its line is on
//! disk and marked, so that a crash at any moment costs a repeated delivery and nothing else.

mod answered;
mod collector;
pub mod dedup;
mod error;
mod faults;
mod line;
pub mod log;
mod output;
mod report;
mod serve;

pub use answered::Answered;
pub use collector::{Collector, Written};
pub use dedup::memory::MemoryDedup;
pub use dedup::redis::{RedisConfig, RedisDedup};
pub use dedup::{Dedup, DedupError, Position, Span};
pub use error::Error;
pub use faults::{Faults, Probe, Step};
pub use line::Line;
pub use log::{Entry, Log};
pub use output::{Lock, Output};
pub use report::{Report, WorkerReport};
pub use serve::{Control, End, Observer, run};
