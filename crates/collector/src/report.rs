//! What a run did, counted as lines are written: over all and per worker.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use shared::{Outcome, Settled};

/// Width of the rule under a heading.
const RULE_WIDTH: usize = 60;

/// Counts of one worker.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkerReport {
    /// Lines with an answer.
    pub answered: u64,
    /// Lines with an error.
    pub failed: u64,
    /// Tokens of the prompts.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Answers whose context was cut to fit the window.
    pub contexts_truncated: u64,
    /// Deliveries beyond each job's first.
    pub redeliveries: u64,
    /// Sum of the answers' inference times, in seconds.
    pub inference_seconds: f64,
}

impl WorkerReport {
    fn add(&mut self, settled: &Settled) {
        self.redeliveries += u64::from(settled.attempts.saturating_sub(1));
        match &settled.outcome {
            Outcome::Completed(completed) => {
                self.answered += 1;
                self.prompt_tokens += u64::from(completed.prompt_tokens);
                self.completion_tokens += u64::from(completed.completion_tokens);
                self.contexts_truncated += u64::from(completed.context_truncated);
                self.inference_seconds += settled.inference_time;
            }
            Outcome::Failed(_) => self.failed += 1,
        }
    }

    fn total(&self) -> u64 {
        self.answered + self.failed
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, title: &str) -> fmt::Result {
        writeln!(f, "{title}\n{}", "=".repeat(RULE_WIDTH))?;
        writeln!(f, "Total samples processed: {}", self.total())?;
        writeln!(f, "Successful inferences: {}", self.answered)?;
        writeln!(f, "Errors: {}", self.failed)?;
        if self.total() > 0 {
            let rate = 100.0 * self.answered as f64 / self.total() as f64;
            writeln!(f, "Success rate: {rate:.1}%")?;
        }
        if self.answered > 0 {
            let average = self.inference_seconds / self.answered as f64;
            writeln!(f, "Average inference time: {average:.2}s")?;
        }
        Ok(())
    }
}

/// Counts of a run: what this process wrote, not what a resumed output already held.
#[derive(Clone, Debug, Default)]
pub struct Report {
    workers: BTreeMap<u32, WorkerReport>,
    /// Bad input that never reached a worker but has its line.
    unread: WorkerReport,
}

impl Report {
    /// Counts a line that was written.
    pub fn add(&mut self, settled: &Settled) {
        if settled.attempts == 0 {
            self.unread.add(settled);
        } else {
            self.workers.entry(settled.worker_rank).or_default().add(settled);
        }
    }

    /// The counts over all workers, bad input included.
    pub fn overall(&self) -> WorkerReport {
        let mut sum = WorkerReport::default();
        for worker in self.workers.values().chain([&self.unread]) {
            sum.answered += worker.answered;
            sum.failed += worker.failed;
            sum.prompt_tokens += worker.prompt_tokens;
            sum.completion_tokens += worker.completion_tokens;
            sum.contexts_truncated += worker.contexts_truncated;
            sum.redeliveries += worker.redeliveries;
            sum.inference_seconds += worker.inference_seconds;
        }
        sum
    }

    /// The statistics block, per worker and over all, for a run that took `elapsed`.
    pub fn statistics(&self, elapsed: Duration) -> impl fmt::Display {
        Statistics { report: self, elapsed, per_worker: true }
    }

    /// The same over all alone: in a fleet every process counts its workers from 0.
    pub fn overall_statistics(&self, elapsed: Duration) -> impl fmt::Display {
        Statistics { report: self, elapsed, per_worker: false }
    }
}

struct Statistics<'a> {
    report: &'a Report,
    elapsed: Duration,
    per_worker: bool,
}

impl fmt::Display for Statistics<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (rank, worker) in self.report.workers.iter().filter(|_| self.per_worker) {
            worker.write(f, &format!("WORKER {rank} INFERENCE STATISTICS"))?;
            writeln!(f)?;
        }
        let overall = self.report.overall();
        let seconds = self.elapsed.as_secs_f64().max(1e-9);
        overall.write(f, "OVERALL INFERENCE STATISTICS")?;
        writeln!(f, "Elapsed time: {:.2}s", self.elapsed.as_secs_f64())?;
        writeln!(f, "Answers per second: {:.1}", overall.answered as f64 / seconds)?;
        writeln!(
            f,
            "Prompt tokens: {} ({:.0}/s)",
            overall.prompt_tokens,
            overall.prompt_tokens as f64 / seconds
        )?;
        writeln!(
            f,
            "Generated tokens: {} ({:.0}/s)",
            overall.completion_tokens,
            overall.completion_tokens as f64 / seconds
        )?;
        if overall.contexts_truncated > 0 {
            writeln!(f, "Contexts cut to fit the window: {}", overall.contexts_truncated)?;
        }
        if overall.redeliveries > 0 {
            writeln!(f, "Redeliveries: {}", overall.redeliveries)?;
        }
        Ok(())
    }
}
