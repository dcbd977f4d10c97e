//! When a run is complete: its producer has published everything, and nothing of it is queued or on
//! its way.

use std::time::Duration;

use shared::RunId;
use shared::queue::nats::{Fleet, FleetError};
use shared::status::Role;
use tokio::time::MissedTickBehavior;

use super::tally::Tally;

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(200);

/// Ready when the run is complete.
pub(super) async fn until_done(fleet: &Fleet, run: &RunId, tally: &Tally) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match is_done(fleet, run, tally).await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => tracing::debug!(%error, "cannot see whether the run is done"),
        }
    }
}

async fn is_done(fleet: &Fleet, run: &RunId, tally: &Tally) -> Result<bool, FleetError> {
    // In the order in which a job moves on: what has left one place is in the next.
    let statuses = fleet.runs().await?;
    let mut producers =
        statuses.iter().filter(|status| status.run == *run && status.role == Role::Producer);
    let Some(producer) = producers.next().filter(|status| status.finished) else {
        return Ok(false);
    };
    if fleet.num_jobs_queued().await?.iter().any(|((_, of), count)| of == run && *count > 0) {
        return Ok(false);
    }
    if fleet.num_outcomes_queued().await?.get(run).is_some_and(|count| *count > 0) {
        return Ok(false);
    }
    let lines = tally.counts().lines;
    if lines < producer.published {
        tracing::error!(
            run = run.0,
            lines,
            published = producer.published,
            "the queue is empty but lines are missing: it lost jobs; flotilla reconcile finds them"
        );
    }
    Ok(true)
}
