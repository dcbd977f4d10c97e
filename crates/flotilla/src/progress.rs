//! How far a run is: a bar on a terminal, a line every ten seconds elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use collector::{Observer, Report};
use indicatif::{ProgressBar, ProgressStyle};
use shared::Settled;
use tokio::sync::watch;

use crate::telemetry;

/// Between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Counts what is written and shows it.
pub(crate) struct Progress {
    report: Report,
    started: Instant,
    /// Lines this run will write, once the input has been counted.
    total: watch::Receiver<Option<u64>>,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Progress {
    /// Starts the clock.
    pub(crate) fn start(total: watch::Receiver<Option<u64>>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{spinner} {pos}/{len} [{bar:30}] {msg}";
            let style = ProgressStyle::with_template(style)
                .unwrap_or_else(|_wrong| ProgressStyle::default_bar())
                .progress_chars("=> ");
            let bar = ProgressBar::no_length().with_style(style);
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        telemetry::set_bar(bar.clone());
        let now = Instant::now();
        Self { report: Report::default(), started: now, total, bar, last_line: now }
    }

    /// Takes the bar away and gives what was counted, with the time it took.
    pub(crate) fn finish(self) -> (Report, Duration) {
        telemetry::set_bar(None);
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        (self.report, self.started.elapsed())
    }

    /// Done, failed, tokens per second and the time left, as text.
    fn state(&self) -> String {
        let overall = self.report.overall();
        let done = overall.answered + overall.failed;
        let seconds = self.started.elapsed().as_secs_f64().max(1e-3);
        let rate = overall.completion_tokens as f64 / seconds;
        let eta = match *self.total.borrow() {
            Some(total) if done > 0 => {
                let left = total.saturating_sub(done) as f64 * seconds / done as f64;
                format!("ETA {}", clock(left))
            }
            _ => "ETA unknown".to_owned(),
        };
        format!(
            "{} failed, {:.1} answers/s, {rate:.0} tokens/s, {eta}",
            overall.failed,
            done as f64 / seconds
        )
    }

    fn show(&mut self) {
        let overall = self.report.overall();
        let done = overall.answered + overall.failed;
        let total = *self.total.borrow();
        if let Some(bar) = &self.bar {
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(done);
            bar.set_message(self.state());
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            let of = total.map(|total| format!(" of {total}")).unwrap_or_default();
            tracing::info!("{done}{of} done, {}", self.state());
        }
    }
}

impl Observer for Progress {
    fn written(&mut self, outcomes: &[Settled]) {
        for settled in outcomes {
            tracing::debug!(
                job_id = %settled.context.id,
                worker = settled.worker_rank,
                attempt = settled.attempts,
                elapsed_ms = (settled.inference_time * 1e3) as u64,
                success = matches!(settled.outcome, shared::Outcome::Completed(_)),
                "written"
            );
            self.report.add(settled);
        }
        self.show();
    }
}

/// `4073` → `1:07:53`.
pub(crate) fn clock(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}
