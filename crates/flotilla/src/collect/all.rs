//! Collects every run, each into a file of its own in one folder.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use shared::RunId;
use shared::queue::nats::FleetError;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{Collected, Roles};
use crate::{FAILED, heartbeat};

/// Between two looks for new runs.
const INTERVAL: Duration = Duration::from_secs(1);

/// Collects all runs that the queues hold, and those that begin later, until the shutdown.
///
/// A run that cannot be written is tried again and again, while the others go on.
pub(super) async fn collect_all(roles: &Roles, dir: &Path) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let over = CancellationToken::new();
    let saying = heartbeat::beat(over.clone(), 1, || {
        let (uncollected, fleet) = (roles.uncollected.clone(), roles.fleet.clone());
        let tallies = roles.tallies.clone();
        async move { uncollected.say(&fleet, &tallies).await }
    });
    let mut all = All { roles, dir, running: JoinSet::new(), names: HashSet::new() };
    let collecting = async {
        let collected = all.collect().await;
        over.cancel();
        collected
    };
    let (collected, ()) = tokio::join!(collecting, saying);
    collected?;
    let is_well = roles.uncollected.runs().is_empty();
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// The collectors of a folder.
struct All<'a> {
    roles: &'a Roles,
    dir: &'a Path,
    running: JoinSet<(RunId, anyhow::Result<Option<Collected>>)>,
    /// Names of the runs that have a collector.
    names: HashSet<String>,
}

impl All<'_> {
    async fn collect(&mut self) -> anyhow::Result<()> {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.roles.shutdown.cancelled() => break,
                _ = ticks.tick() => {}
            }
            while let Some(ended) = self.running.try_join_next() {
                self.note(ended.context("a collector panicked")?);
            }
            match queued_runs(self.roles).await {
                Ok(queued) => self.look_after(&queued),
                Err(error) => tracing::debug!(%error, "cannot look for new runs"),
            }
        }
        while let Some(ended) = self.running.join_next().await {
            self.note(ended.context("a collector panicked")?);
        }
        Ok(())
    }

    /// A collector has ended.
    fn note(&mut self, (run, collected): (RunId, anyhow::Result<Option<Collected>>)) {
        self.names.remove(&run.0);
        if let Err(error) = collected {
            self.roles.tallies.remove(&run);
            self.roles.uncollected.failed(&run, &error);
        }
    }

    /// Starts the collectors that are missing. What failed is well again once its collector gets
    /// something done or has nothing to do.
    fn look_after(&mut self, queued: &BTreeMap<RunId, u64>) {
        let roles = self.roles;
        roles.uncollected.retain(|run| match (queued.get(run), roles.tallies.get(&run.0)) {
            (None, _) => false,
            (Some(outcomes), Some(tally)) => *outcomes > 0 && !tally.has_settled_any(),
            (Some(_), None) => true,
        });
        for run in queued.keys() {
            if !self.names.contains(&run.0) && roles.uncollected.is_due(run) {
                self.names.insert(run.0.clone());
                let output = self.dir.join(file_name(run));
                let (run, roles) = (run.clone(), roles.clone());
                self.running.spawn(async move { (run.clone(), roles.collect(run, output).await) });
            }
        }
    }
}

/// The runs that have anything queued, and how many outcomes.
async fn queued_runs(roles: &Roles) -> Result<BTreeMap<RunId, u64>, FleetError> {
    let jobs = roles.fleet.num_jobs_queued().await?;
    let mut runs: BTreeMap<RunId, u64> = jobs.into_keys().map(|(_, run)| (run, 0)).collect();
    runs.extend(roles.fleet.num_outcomes_queued().await?);
    Ok(runs)
}

/// The output of a run: its name where that is a plain one, with `%` and two digits for each byte
/// that a file name can't have or that would hide it.
fn file_name(run: &RunId) -> String {
    let mut name = String::new();
    for (index, byte) in run.0.bytes().enumerate() {
        let is_plain = byte.is_ascii_alphanumeric()
            || matches!(byte, b'-' | b'_' | b'#' | b'@' | b'+' | b'=' | b',')
            || (byte == b'.' && index > 0);
        if is_plain {
            name.push(char::from(byte));
        } else {
            name += &format!("%{byte:02X}");
        }
    }
    // A file system's names are shorter than a run's may be.
    if name.len() > MAX_NAME {
        let digest = shared::JobId(run.0.clone()).digest().0;
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        name.truncate(MAX_NAME - digest.len() - 1);
        name = format!("{name}-{digest}");
    }
    name + ".jsonl"
}

/// Longest name of a run in a file's name, so that the files beside the output fit too.
const MAX_NAME: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_with_different_names_have_different_plain_file_names() {
        let name = |run: &str| file_name(&RunId(run.to_owned()));
        assert_eq!(name("results-2_b.v1"), "results-2_b.v1.jsonl");
        assert_eq!(name("../a b/é"), "%2E.%2Fa%20b%2F%C3%A9.jsonl");
        assert_ne!(name("a%2Fb"), name("a/b"));
        let long = |end: &str| name(&format!("{}{end}", "x".repeat(300)));
        assert_ne!(long("a"), long("b"));
        assert!(long("a").len() < 220);
    }
}
