//! The engine that computes nothing: for measuring what the queue costs, and for tests of the fleet.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use shared::{Completed, FinishReason, Job, JobId};

use super::{Answer, Backend, Counters, Failure, Progress, Serving};
use crate::Error;

/// Stands for the hash of a prompt where there is no prompt.
const NO_PROMPT: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Answers each job with a text made from its id, at once or after a latency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Noop {
    /// How long an answer takes.
    pub latency: Duration,
    /// Jobs to hold at a time.
    pub slots: usize,
    /// Name to give as the model's.
    pub model: String,
}

impl Noop {
    /// What it answers to the job of this id.
    pub fn answer_to(id: &JobId) -> String {
        format!("no answer to {id}")
    }
}

impl Backend for Noop {
    type Engine = NoopEngine;

    async fn start(&self) -> Result<NoopEngine, Error> {
        Ok(NoopEngine {
            settings: self.clone(),
            num_running: AtomicU64::new(0),
            num_answered: AtomicU64::new(0),
        })
    }
}

/// A started [`Noop`].
#[derive(Debug)]
pub struct NoopEngine {
    settings: Noop,
    num_running: AtomicU64,
    num_answered: AtomicU64,
}

impl Serving for NoopEngine {
    fn model_name(&self) -> &str {
        &self.settings.model
    }

    fn num_slots(&self) -> usize {
        self.settings.slots
    }

    /// A timer can't hang.
    fn progress(&self) -> Progress {
        Progress { num_steps: self.num_answered.load(Ordering::Relaxed), is_busy: false }
    }

    fn counters(&self) -> Counters {
        let num_answered = self.num_answered.load(Ordering::Relaxed);
        Counters {
            num_running: self.num_running.load(Ordering::Relaxed),
            prompt_tokens: num_answered,
            generation_tokens: num_answered,
            ..Counters::default()
        }
    }

    async fn down(&self) {
        std::future::pending::<()>().await;
    }

    async fn answer(&self, job: &Job) -> Result<Answer, Failure> {
        let latency = self.settings.latency;
        if !latency.is_zero() {
            let _running = Running::new(&self.num_running);
            tokio::time::sleep(latency).await;
        }
        self.num_answered.fetch_add(1, Ordering::Relaxed);
        let completed = Completed {
            answer: Noop::answer_to(job.id()),
            finish_reason: FinishReason::Stop,
            prompt_tokens: 1,
            completion_tokens: 1,
            prompt_sha256: NO_PROMPT.to_owned(),
            context_truncated: false,
            logprobs: None,
        };
        Ok(Answer {
            completed,
            queue_time: Duration::ZERO,
            time_to_first_token: latency,
            generation_time: Duration::ZERO,
        })
    }
}

/// Counts a job as running until dropped.
struct Running<'a>(&'a AtomicU64);

impl<'a> Running<'a> {
    fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
