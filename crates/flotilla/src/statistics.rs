//! The figures of a finished run, for `--statistics-file` and for the benchmarks that read it.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use collector::Report;
use serde::{Deserialize, Serialize};

/// What a run did and took.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Statistics {
    /// Lines with an answer.
    pub(crate) answered: u64,
    /// Lines with an error.
    pub(crate) failed: u64,
    /// Tokens of the prompts.
    pub(crate) prompt_tokens: u64,
    /// Tokens generated.
    pub(crate) completion_tokens: u64,
    /// Seconds from the start of the workers to the last line, loading the model included.
    pub(crate) elapsed_seconds: f64,
    /// Answers per second of `elapsed_seconds`.
    pub(crate) answers_per_second: f64,
    /// Generated tokens per second of `elapsed_seconds`.
    pub(crate) tokens_per_second: f64,
    /// Most memory that the process had resident; 0 where the system doesn't tell.
    pub(crate) peak_memory_bytes: u64,
}

impl Statistics {
    /// The figures of a run that took `elapsed`.
    pub(crate) fn of(report: &Report, elapsed: Duration) -> Self {
        let overall = report.overall();
        let elapsed_seconds = elapsed.as_secs_f64().max(1e-9);
        Self {
            answered: overall.answered,
            failed: overall.failed,
            prompt_tokens: overall.prompt_tokens,
            completion_tokens: overall.completion_tokens,
            elapsed_seconds,
            answers_per_second: overall.answered as f64 / elapsed_seconds,
            tokens_per_second: overall.completion_tokens as f64 / elapsed_seconds,
            peak_memory_bytes: peak_memory_bytes(),
        }
    }

    /// Writes them as JSON.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn peak_memory_bytes() -> u64 {
    peak_memory_bytes_of(std::process::id())
}

/// Most memory that a process had resident; 0 where the system doesn't tell.
pub(crate) fn peak_memory_bytes_of(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.and_then(|text| text.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}
