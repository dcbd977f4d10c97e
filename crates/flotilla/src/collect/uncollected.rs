//! The runs that this process should collect and can't: why, and when each is tried again.
//!
//! Told by /healthz, the metrics and `flotilla status`, until lines are written again or nobody needs
//! them any more.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shared::RunId;
use shared::queue::nats::{Fleet, FleetError};
use shared::status::{Role, RunStatus, unix_now};
use tokio::time::Instant;

use super::tally::Tallies;
use crate::observe::Health;

/// Between the end of a collector and its next start: doubles from the first to the second.
const DELAY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Why a run isn't collected.
#[derive(Debug)]
struct Failure {
    reason: String,
    delay: Duration,
    retry_at: Instant,
}

/// The runs that can't be collected now. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Uncollected {
    failures: Arc<Mutex<BTreeMap<String, Failure>>>,
    health: Health,
}

impl Uncollected {
    /// None, told to `health`.
    pub(super) fn new(health: Health) -> Self {
        let new = Self { failures: Arc::default(), health };
        new.tell(&new.lock());
        new
    }

    /// The collector of `run` has ended with `error`.
    pub(super) fn failed(&self, run: &RunId, error: &anyhow::Error) {
        let reason = format!("{error:#}");
        let mut failures = self.lock();
        let before = failures.get(&run.0);
        let delay = before.map_or(DELAY.0, |before| (before.delay * 2).min(DELAY.1));
        let is_new = before.is_none_or(|before| before.reason != reason);
        let failure = Failure { reason: reason.clone(), delay, retry_at: Instant::now() + delay };
        failures.insert(run.0.clone(), failure);
        self.tell(&failures);
        if is_new {
            tracing::error!(
                run = run.0,
                "this run is not collected, its answers stay queued; trying again: {reason}"
            );
        }
    }

    /// Whether a collector of `run` may start.
    pub(super) fn is_due(&self, run: &RunId) -> bool {
        self.lock().get(&run.0).is_none_or(|failure| Instant::now() >= failure.retry_at)
    }

    /// Why `run` isn't collected.
    pub(super) fn reason(&self, run: &str) -> Option<String> {
        self.lock().get(run).map(|failure| failure.reason.clone())
    }

    /// Keeps those runs of which `is_uncollected` still holds.
    pub(super) fn retain(&self, is_uncollected: impl Fn(&RunId) -> bool) {
        let mut failures = self.lock();
        failures.retain(|run, _| {
            let run = RunId(run.clone());
            let stays = is_uncollected(&run);
            if !stays {
                tracing::info!(run = run.0, "nothing keeps this run from being collected any more");
            }
            stays
        });
        self.tell(&failures);
    }

    /// The runs.
    pub(super) fn runs(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// Tells `flotilla status` of the runs that have no collector which could; what was last said of
    /// their lines stays.
    pub(super) async fn say(&self, fleet: &Fleet, tallies: &Tallies) -> Result<(), FleetError> {
        let runs: Vec<String> =
            self.runs().into_iter().filter(|run| tallies.get(run).is_none()).collect();
        if runs.is_empty() {
            return Ok(());
        }
        let said = fleet.runs().await?;
        for run in runs {
            let of_collector = |s: &&RunStatus| s.run.0 == run && s.role == Role::Collector;
            let last = said.iter().find(of_collector).cloned().unwrap_or_default();
            // A collector elsewhere that writes it speaks for itself.
            if last.error.is_none() && !last.is_gone(unix_now()) {
                continue;
            }
            let status = RunStatus {
                run: RunId(run.clone()),
                role: Role::Collector,
                rate: 0.0,
                finished: false,
                ended: false,
                error: self.reason(&run),
                seen_at: unix_now(),
                ..last
            };
            fleet.put_run(&status).await?;
        }
        Ok(())
    }

    fn tell(&self, failures: &BTreeMap<String, Failure>) {
        let reason = |(run, failure): (&String, &Failure)| {
            format!("run '{run}' is not collected: {}", failure.reason)
        };
        let reasons: Vec<String> = failures.iter().map(reason).collect();
        self.health.set(if reasons.is_empty() { Ok(()) } else { Err(reasons.join("\n")) });
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Failure>> {
        // No code panics while it holds this lock.
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn run_that_fails_is_tried_again_after_longer_and_longer_waits() {
        let uncollected = Uncollected::new(Health::default());
        let run = RunId("r".to_owned());
        assert!(uncollected.is_due(&run));
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            uncollected.failed(&run, &anyhow::anyhow!("no room"));
            tokio::time::advance(Duration::from_secs(seconds) - Duration::from_millis(1)).await;
            assert!(!uncollected.is_due(&run), "before {seconds} s");
            tokio::time::advance(Duration::from_millis(1)).await;
            assert!(uncollected.is_due(&run), "after {seconds} s");
        }
        uncollected.retain(|_| false);
        uncollected.failed(&run, &anyhow::anyhow!("no room"));
        tokio::time::advance(DELAY.0).await;
        assert!(uncollected.is_due(&run));
    }
}
