//! What the roles tell about themselves while they run, and what they ask of one another beside the
//! queues. Plain data; nothing that the protocol of delivery relies on.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::message::{JobId, RunId};

/// A worker's word about itself, told every few seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerStatus {
    /// Its name, one in the fleet.
    pub id: String,
    /// Name of its machine.
    pub host: String,
    /// The device that it computes on.
    pub device: String,
    /// Name of its model.
    pub model: String,
    /// Jobs that it can run at once.
    pub slots: u32,
    /// Jobs that it runs now.
    pub running: u32,
    /// Jobs that it holds, by run: running, waiting for a slot, or waiting to be confirmed.
    pub held: BTreeMap<RunId, u64>,
    /// Jobs that it has answered.
    pub answered: u64,
    /// Jobs that it has failed.
    pub failed: u64,
    /// Tokens that it has generated.
    pub generated_tokens: u64,
    /// Tokens a second, lately.
    pub tokens_per_second: f64,
    /// Answers a second, lately.
    pub answers_per_second: f64,
    /// When it began, in seconds since 1970.
    pub started_at: f64,
    /// When it told this, in seconds since 1970.
    pub seen_at: f64,
    /// Seconds until it tells again.
    pub stats_interval: f64,
}

/// Who tells about a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Who puts its jobs into the queue.
    #[default]
    Producer,
    /// Who writes its output.
    Collector,
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Producer => "producer",
            Self::Collector => "collector",
        }
    }
}

/// A producer's or a collector's word about a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunStatus {
    /// The run.
    pub run: RunId,
    /// Who tells this.
    pub role: Role,
    /// Model of its jobs.
    pub model: Option<String>,
    /// Jobs and failed outcomes that the queue has confirmed.
    pub published: u64,
    /// Jobs that there will be, where that is known.
    pub total: Option<u64>,
    /// Lines written.
    pub done: u64,
    /// Of these, failed ones.
    pub failed: u64,
    /// Jobs published, or lines written, a second, lately.
    pub rate: f64,
    /// Whether the producer has published everything.
    pub finished: bool,
    /// The output file.
    pub output: Option<String>,
    /// When it told this, in seconds since 1970.
    pub seen_at: f64,
    /// When it began, in seconds since 1970.
    pub started_at: f64,
}

impl Default for RunStatus {
    fn default() -> Self {
        Self {
            run: RunId(String::new()),
            role: Role::default(),
            model: None,
            published: 0,
            total: None,
            done: 0,
            failed: 0,
            rate: 0.0,
            finished: false,
            output: None,
            seen_at: 0.0,
            started_at: 0.0,
        }
    }
}

/// What a run's collector can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Takes the failed lines of these jobs out of the output.
    RemoveFailed {
        /// The jobs.
        ids: Vec<JobId>,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// So many lines were taken out.
    Removed(u64),
    /// It can't; the reason.
    Refused(String),
}

/// The time, in seconds since 1970.
pub fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
