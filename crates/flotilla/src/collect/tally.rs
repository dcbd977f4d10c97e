//! What collectors count: written by each as it writes lines, read by heartbeats and metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use collector::{Observer, Report};
use shared::{Outcome, RunId, Settled};

/// Between two lines in the log.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Upper bounds of the buckets of sync times, in seconds.
const SYNC_BOUNDS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];

/// The tallies of all runs of this process.
#[derive(Clone, Default)]
pub(crate) struct Tallies(Arc<Mutex<BTreeMap<String, Arc<Tally>>>>);

impl Tallies {
    /// That of one more run.
    pub(super) fn add(&self, run: &RunId) -> Arc<Tally> {
        let tally = Arc::<Tally>::default();
        self.lock().insert(run.0.clone(), Arc::clone(&tally));
        tally
    }

    /// That of a run whose output is open.
    pub(super) fn get(&self, run: &str) -> Option<Arc<Tally>> {
        self.lock().get(run).cloned()
    }

    /// A run's output is no longer open.
    pub(super) fn remove(&self, run: &RunId) {
        self.lock().remove(&run.0);
    }

    /// Those of all runs.
    pub(super) fn all(&self) -> Vec<(String, Arc<Tally>)> {
        self.lock().iter().map(|(run, tally)| (run.clone(), Arc::clone(tally))).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Tally>>> {
        // No code panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The counts of one run.
#[derive(Default)]
pub(super) struct Tally {
    lines: AtomicU64,
    failed: AtomicU64,
    written: AtomicU64,
    repeated: AtomicU64,
    /// Of each bucket, without those below it; the last is above all bounds.
    syncs: [AtomicU64; SYNC_BOUNDS.len() + 1],
    sync_nanos: AtomicU64,
}

/// The counts of one run at a moment.
#[derive(Clone, Debug)]
pub(super) struct Counts {
    /// Lines of the output.
    pub(super) lines: u64,
    /// Lines of jobs that failed.
    pub(super) failed: u64,
    /// Lines that this process wrote.
    pub(super) written: u64,
    /// Outcomes that had their line already.
    pub(super) repeated: u64,
    /// Upper bounds of sync times, and how many syncs took at most that.
    pub(super) syncs: Vec<(f64, u64)>,
    /// How many syncs there were.
    pub(super) num_syncs: u64,
    /// Seconds of them all.
    pub(super) sync_seconds: f64,
}

impl Tally {
    /// The output as it was found.
    pub(super) fn opened(&self, lines: u64, failed: u64) {
        self.lines.store(lines, Ordering::Relaxed);
        self.failed.store(failed, Ordering::Relaxed);
    }

    /// Failed lines have left the output.
    pub(super) fn removed(&self, count: u64) {
        self.lines.fetch_sub(count, Ordering::Relaxed);
        self.failed.fetch_sub(count, Ordering::Relaxed);
    }

    /// Whether any outcome came to its end.
    pub(super) fn has_settled_any(&self) -> bool {
        let settled = [&self.written, &self.repeated];
        settled.iter().any(|count| count.load(Ordering::Relaxed) > 0)
    }

    /// The counts now.
    pub(super) fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut num_syncs = 0;
        let syncs = SYNC_BOUNDS.iter().zip(&self.syncs).map(|(bound, count)| {
            num_syncs += read(count);
            (*bound, num_syncs)
        });
        let syncs = syncs.collect();
        Counts {
            lines: read(&self.lines),
            failed: read(&self.failed),
            written: read(&self.written),
            repeated: read(&self.repeated),
            syncs,
            num_syncs: num_syncs + self.syncs.last().map_or(0, read),
            sync_seconds: read(&self.sync_nanos) as f64 / 1e9,
        }
    }
}

/// Counts what one collector does, and tells it in the log.
pub(super) struct Observed {
    run: String,
    tally: Arc<Tally>,
    report: Report,
    started: Instant,
    last_line: Instant,
    told: u64,
}

impl Observed {
    /// Starts the clock.
    pub(super) fn new(run: &RunId, tally: Arc<Tally>) -> Self {
        let now = Instant::now();
        let report = Report::default();
        Self { run: run.0.clone(), tally, report, started: now, last_line: now, told: 0 }
    }

    /// What was counted, and in how much time.
    pub(super) fn finish(self) -> (Report, Duration) {
        (self.report, self.started.elapsed())
    }

    /// Says now and then how far it is, if there is anything new.
    fn tell(&mut self) {
        let counts = self.tally.counts();
        if self.last_line.elapsed() < LINE_INTERVAL || counts.written == self.told {
            return;
        }
        let seconds = self.last_line.elapsed().as_secs_f64();
        let rate = (counts.written - self.told) as f64 / seconds;
        self.last_line = Instant::now();
        self.told = counts.written;
        tracing::info!(
            run = self.run,
            "{} lines, {} of them failed, {rate:.1}/s",
            counts.lines,
            counts.failed
        );
    }
}

impl Observer for Observed {
    fn written(&mut self, outcomes: &[Settled]) {
        for settled in outcomes {
            tracing::debug!(
                job_id = %settled.context.id,
                run = self.run,
                worker = settled.worker_rank,
                attempt = settled.attempts,
                elapsed_ms = (settled.inference_time * 1e3) as u64,
                success = matches!(settled.outcome, Outcome::Completed(_)),
                "written"
            );
            self.report.add(settled);
        }
        let count = outcomes.len() as u64;
        let failed = outcomes.iter().filter(|s| matches!(s.outcome, Outcome::Failed(_))).count();
        self.tally.lines.fetch_add(count, Ordering::Relaxed);
        self.tally.written.fetch_add(count, Ordering::Relaxed);
        self.tally.failed.fetch_add(failed as u64, Ordering::Relaxed);
        self.tell();
    }

    fn repeated(&mut self, outcomes: u64) {
        self.tally.repeated.fetch_add(outcomes, Ordering::Relaxed);
    }

    fn synced(&mut self, elapsed: Duration) {
        // Nothing new, nothing synced.
        if elapsed.is_zero() {
            return;
        }
        let bucket = SYNC_BOUNDS.partition_point(|bound| *bound < elapsed.as_secs_f64());
        self.tally.syncs[bucket].fetch_add(1, Ordering::Relaxed);
        let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        self.tally.sync_nanos.fetch_add(nanos, Ordering::Relaxed);
    }
}
