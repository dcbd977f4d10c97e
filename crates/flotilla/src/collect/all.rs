//! Collects every run, each into a file of its own in one folder.

use std::collections::HashSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use shared::RunId;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::Roles;
use crate::FAILED;

/// Between two looks for new runs.
const INTERVAL: Duration = Duration::from_secs(1);

/// Collects all runs that the queues hold, and those that begin later, until the shutdown.
///
/// A run that cannot be written stays uncollected until the command is started again; the others
/// go on.
pub(super) async fn collect_all(roles: &Roles, dir: &Path) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut known = HashSet::new();
    let mut runs = JoinSet::new();
    let mut has_failed = false;
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = roles.shutdown.cancelled() => break,
            _ = ticks.tick() => {}
        }
        for run in queued_runs(roles).await {
            if known.insert(run.0.clone()) {
                let output = dir.join(file_name(&run));
                let roles = roles.clone();
                runs.spawn(async move { (run.clone(), roles.collect(run, output).await) });
            }
        }
        while let Some(ended) = runs.try_join_next() {
            has_failed |= !is_well(ended.context("a collector panicked")?);
        }
    }
    while let Some(ended) = runs.join_next().await {
        has_failed |= !is_well(ended.context("a collector panicked")?);
    }
    Ok(if has_failed { ExitCode::from(FAILED) } else { ExitCode::SUCCESS })
}

/// The runs that have anything queued.
async fn queued_runs(roles: &Roles) -> Vec<RunId> {
    let looked = async {
        let jobs = roles.fleet.num_jobs_queued().await?;
        let outcomes = roles.fleet.num_outcomes_queued().await?;
        let runs = jobs.into_keys().map(|(_, run)| run).chain(outcomes.into_keys());
        Ok::<_, shared::queue::nats::FleetError>(runs.collect())
    };
    looked.await.unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot look for new runs");
        Vec::new()
    })
}

fn is_well<T>((run, collected): (RunId, anyhow::Result<T>)) -> bool {
    match collected {
        Ok(_) => true,
        Err(error) => {
            tracing::error!(run = run.0, "this run is no longer collected: {error:#}");
            false
        }
    }
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
