//! What the roles tell about themselves while they run, and what they ask of one another beside the
//! queues. Plain data; nothing that the protocol of delivery relies on.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
    /// Seconds that its jobs stay its own without a sign of life.
    pub lease: f64,
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

/// Words of a worker that may be missing before it counts as silent.
const MAX_MISSED: f64 = 4.0;

/// Silence after which whoever tells something every few seconds is taken for gone.
pub const MIN_SILENCE: Duration = Duration::from_secs(10);

/// A producer's or a collector's word about a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunStatus {
    /// The run.
    pub run: RunId,
    /// Who tells this.
    pub role: Role,
    /// The process of a producer, one in the fleet: each has a record of its own.
    pub id: String,
    /// Name of its machine.
    pub host: String,
    /// What it publishes: a file, stdin, an address that it listens at.
    pub input: Option<String>,
    /// Model of its jobs.
    pub model: Option<String>,
    /// Jobs and failed outcomes that the queue has confirmed, or that had their line already.
    pub published: u64,
    /// Of these, jobs that the queue had already, from this input or another.
    pub repeated: u64,
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
    /// Whether these are its last words.
    pub ended: bool,
    /// The output file, links followed.
    pub output: Option<String>,
    /// Number of the output's inode: the same wherever its disk is mounted.
    pub output_inode: Option<u64>,
    /// Why its lines can't be written now.
    pub error: Option<String>,
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
            id: String::new(),
            host: String::new(),
            input: None,
            model: None,
            published: 0,
            repeated: 0,
            total: None,
            done: 0,
            failed: 0,
            rate: 0.0,
            finished: false,
            ended: false,
            output: None,
            output_inode: None,
            error: None,
            seen_at: 0.0,
            started_at: 0.0,
        }
    }
}

impl WorkerStatus {
    /// Whether, at the time of `now` in unix seconds, it has been silent for so long that it may be gone.
    pub fn is_silent(&self, now: f64) -> bool {
        let patience = MAX_MISSED * self.stats_interval;
        now - self.seen_at > patience.max(MIN_SILENCE.as_secs_f64())
    }

    /// Whether the jobs that it held at its last word are still its own.
    pub fn holds_jobs(&self, now: f64) -> bool {
        !self.is_silent(now) || now - self.seen_at <= self.lease
    }
}

impl RunStatus {
    /// Whether, at the time of `now` in unix seconds, nobody is there any more who would tell more.
    pub fn is_gone(&self, now: f64) -> bool {
        self.ended || now - self.seen_at > MIN_SILENCE.as_secs_f64()
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
    /// Counts the failed lines of bad input, or takes them out of the output.
    BadInput {
        /// Only of these ids; of all where there are none.
        ids: Vec<JobId>,
        /// Whether they leave the output.
        remove: bool,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// So many lines were taken out.
    Removed(u64),
    /// So many lines there are.
    Found(u64),
    /// It can't; the reason.
    Refused(String),
}

/// What a run's collector knows of the jobs that it was asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Lines of the output.
    pub num_lines: u64,
    /// Of each job, whether its line is among them, synced.
    pub written: Vec<bool>,
}

/// The time, in seconds since 1970.
pub fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_were_written() {
        // The last digit of one in eight is read wrongly by a parser that takes the fast way.
        for i in 0..1000 {
            let seen_at = 1_795_409_540.0 + f64::from(i) * 0.000_731_1;
            let status = RunStatus { seen_at, ..RunStatus::default() };
            let text = serde_json::to_string(&status).unwrap();
            assert_eq!(serde_json::from_str::<RunStatus>(&text).unwrap(), status, "{text}");
        }
    }
}
