//! One run's collector, with all that goes on beside it: heartbeats, control requests, the watch
//! for the end.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use collector::{Collector, Dedup, End, Faults, Output, Report};
use shared::RunId;
use shared::status::{Role, RunStatus, unix_now};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::tally::{Observed, Tally};
use super::{Roles, control, elsewhere, forgotten, known, until_done};
use crate::fleet;
use crate::heartbeat::{self, Rate};

/// Requests and questions that wait for the collector at a time.
const MAX_CONTROLS: usize = 4;

/// One run's collector, about to start.
pub(super) struct One {
    pub(super) roles: Roles,
    pub(super) run: RunId,
    pub(super) output_file: PathBuf,
    /// The last words of the run's collector, if they were about another output.
    pub(super) other: Option<RunStatus>,
}

/// What it came to.
pub(crate) struct Collected {
    /// What this process wrote.
    pub(crate) report: Report,
    /// In how much time.
    pub(crate) elapsed: Duration,
    /// Lines of the output.
    pub(crate) lines: u64,
    /// Lines of jobs that failed.
    pub(crate) failed: u64,
    /// Lines that the run lacks, where its end was waited for.
    pub(crate) missing: u64,
}

impl One {
    /// Collects until the end of the run, if that was asked for, or the shutdown.
    pub(super) async fn run<D: Dedup>(
        self,
        output: Output,
        dedup: D,
    ) -> anyhow::Result<Option<Collected>> {
        let shutdown = &self.roles.shutdown;
        let mut collector = tokio::select! {
            opened = Collector::open(output, dedup) => opened?,
            // An index that can't be reached is waited for.
            () = shutdown.cancelled() => return Ok(None),
        };
        let abort_at = self.roles.abort_at.map(|step| (step, 2));
        collector.set_probe(Faults { abort_at }.into());
        let tally = self.roles.tallies.add(&self.run);
        tally.opened(collector.num_lines(), collector.num_failed());
        if let Some(other) = &self.other {
            elsewhere::warn_of_lines(other, &self.output_file, collector.num_lines());
        }
        tracing::info!(run = self.run.0, output = %self.output_file.display(), "collecting");
        let (tell_end, end) = watch::channel(End::Open);
        let (to_collector, controls) = mpsc::channel(MAX_CONTROLS);
        let over = CancellationToken::new();
        let mut observer = Observed::new(&self.run, Arc::clone(&tally));
        let queue = self.roles.fleet.outcomes(Some(&self.run));
        let collecting = async {
            let collected =
                collector::run(&queue, &mut collector, end, controls, &mut observer).await;
            over.cancel();
            collected
        };
        let ending = async {
            tokio::select! {
                () = over.cancelled() => 0,
                missing = self.is_over(&tally) => {
                    tell_end.send_replace(End::Now);
                    over.cancelled().await;
                    missing
                }
            }
        };
        let (fleet, run) = (&self.roles.fleet, &self.run);
        let asked = async {
            tokio::select! {
                () = over.cancelled() => {}
                () = known::serve(fleet, run, to_collector.clone()) => {}
                () = control::serve(fleet, run, (to_collector.clone(), &tally)) => {}
            }
        };
        let remembered = async {
            tokio::select! {
                () = over.cancelled() => {}
                () = forgotten::recall(&self.roles.fleet) => {}
                () = until_done::keep_producers(&self.roles.fleet, &self.run) => {}
            }
        };
        let saying = self.say(&tally, over.clone());
        let (collected, missing, (), (), ()) =
            tokio::join!(collecting, ending, asked, remembered, saying);
        collected?;
        let (report, elapsed) = observer.finish();
        let (lines, failed) = (collector.num_lines(), collector.num_failed());
        Ok(Some(Collected { report, elapsed, lines, failed, missing }))
    }

    /// Ready when there is nothing more to write, or it shall not be written here; how many lines
    /// are missing then.
    async fn is_over(&self, tally: &Tally) -> u64 {
        let shutdown = &self.roles.shutdown;
        let mut missing = 0;
        if self.roles.until_done {
            let done = async {
                self.roles.published.cancelled().await;
                until_done::until_done(&self.roles.fleet, &self.run, tally).await
            };
            tokio::select! {
                found = done => missing = found,
                () = shutdown.cancelled() => {}
            }
        } else {
            shutdown.cancelled().await;
        }
        if shutdown.is_cancelled() {
            tracing::warn!(
                run = self.run.0,
                "ending after the batch in hand; interrupt again to stop at once"
            );
        }
        missing
    }

    async fn say(&self, tally: &Tally, over: CancellationToken) {
        let started_at = unix_now();
        let mut rate = Rate::default();
        let finished = over.clone();
        let fleet = &self.roles.fleet;
        heartbeat::beat(over, 1, || {
            let counts = tally.counts();
            let (output, output_inode) = elsewhere::identity(&self.output_file);
            let status = RunStatus {
                run: self.run.clone(),
                role: Role::Collector,
                host: fleet::host(),
                done: counts.lines,
                failed: counts.failed,
                rate: rate.update(counts.written),
                finished: finished.is_cancelled(),
                ended: finished.is_cancelled(),
                error: self.roles.uncollected.reason(&self.run.0),
                output: Some(output.display().to_string()),
                output_inode,
                seen_at: unix_now(),
                started_at,
                ..RunStatus::default()
            };
            async move { fleet.put_run(&status).await }
        })
        .await;
    }
}
