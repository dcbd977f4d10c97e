//! When a run is complete: all of its producers have published everything, and nothing of it is queued or
//! on its way.

use std::time::Duration;

use shared::RunId;
use shared::queue::nats::{Fleet, FleetError};
use shared::status::unix_now;
use tokio::time::{Instant, MissedTickBehavior};

use super::tally::Tally;
use crate::producers::{self, Producers};

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(200);
/// Between two words about producers that are missed.
const MISSING_INTERVAL: Duration = Duration::from_secs(60);
/// Between two times that records of producers are kept from being forgotten: four a day.
const KEEP_INTERVAL: Duration = Duration::from_secs(6 * 3600);

/// Ready when the run is complete, with how many lines are missing all the same: some at least, for sure.
pub(super) async fn until_done(fleet: &Fleet, run: &RunId, tally: &Tally) -> u64 {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told_at = None;
    loop {
        ticks.tick().await;
        match is_done(fleet, run, tally, &mut told_at).await {
            Ok(Some(missing)) => return missing,
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "cannot see whether the run is done"),
        }
    }
}

/// Keeps, for ever, the records of producers that are gone.
pub(super) async fn keep_producers(fleet: &Fleet, run: &RunId) {
    let mut ticks = tokio::time::interval(KEEP_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = fleet.keep_producers(run).await {
            tracing::debug!(%error, "cannot keep the records of producers");
        }
    }
}

async fn is_done(
    fleet: &Fleet,
    run: &RunId,
    tally: &Tally,
    told_at: &mut Option<Instant>,
) -> Result<Option<u64>, FleetError> {
    // In the order in which a job moves on: what has left one place is in the next.
    let said = fleet.run(run).await?;
    let producers = Producers::of(&said, run, unix_now());
    if !producers.have_finished() {
        tell_gone(&producers, run, told_at);
        return Ok(None);
    }
    if fleet.num_jobs_queued().await?.iter().any(|((_, of), count)| of == run && *count > 0) {
        return Ok(None);
    }
    if fleet.num_outcomes_queued().await?.get(run).is_some_and(|count| *count > 0) {
        return Ok(None);
    }
    Ok(Some(check_lines(&producers, run, tally.counts().lines)))
}

/// Says now and then whom the run waits for in vain.
fn tell_gone(producers: &Producers<'_>, run: &RunId, told_at: &mut Option<Instant>) {
    if told_at.is_some_and(|at| at.elapsed() < MISSING_INTERVAL) {
        return;
    }
    for gone in producers.gone() {
        *told_at = Some(Instant::now());
        tracing::warn!(
            run = run.0,
            producer = gone.id,
            "the producer of {} is gone and has not published everything: the run waits for the \
             same command to be run again there, or for flotilla reconcile",
            producers::label(gone)
        );
    }
}

/// How many lines are missing at least; where that is a matter of belief, it is only told.
fn check_lines(producers: &Producers<'_>, run: &RunId, lines: u64) -> u64 {
    let published = producers.published().unwrap_or(0);
    let missing = producers.least_lines().saturating_sub(lines);
    if missing > 0 {
        tracing::error!(
            run = run.0,
            lines,
            published,
            "the queue is empty but {missing} lines are missing: it lost jobs, or they are in another \
             output; flotilla reconcile publishes them again"
        );
    } else if lines < published {
        tracing::warn!(
            run = run.0,
            lines,
            published,
            "fewer lines than were published: several producers published the same queries, or the \
             queue lost jobs; flotilla reconcile tells"
        );
    }
    missing
}
