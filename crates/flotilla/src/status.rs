//! `flotilla status`: what the fleet is doing, from the queues and the roles' own words.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use shared::queue::nats::Fleet;
use shared::status::unix_now;

use crate::cli::fleet::StatusOptions;
use crate::{fleet, heartbeat, signals, telemetry};

mod table;
mod view;

use view::{Gathered, View};

/// Clears a terminal and puts the cursor at its top.
const CLEAR: &str = "\x1b[2J\x1b[H";
/// Longest time that one look may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(30);

/// How much later than usual a role's next words may come.
const SLACK: Duration = Duration::from_millis(500);

/// Runs `flotilla status`.
pub(crate) fn main(options: &StatusOptions) -> anyhow::Result<ExitCode> {
    fleet::block_on(status(options))
}

async fn status(options: &StatusOptions) -> anyhow::Result<ExitCode> {
    let interruption = signals::interruption()?;
    let connecting = fleet::connect_soon(&options.nats);
    let fleet = tokio::select! {
        fleet = connecting => fleet?,
        () = interruption.cancelled() => return Ok(ExitCode::from(crate::INTERRUPTED)),
    };
    let Some(interval) = options.watch else {
        telemetry::print(&look(&fleet, options).await?).context("cannot write to stdout")?;
        return Ok(ExitCode::SUCCESS);
    };
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // Watching has no other end.
            () = interruption.cancelled() => return Ok(ExitCode::SUCCESS),
        }
        let text = match look(&fleet, options).await {
            Ok(text) if options.json => text,
            Ok(text) => format!("{CLEAR}{text}"),
            Err(error) => {
                tracing::warn!("{error:#}");
                continue;
            }
        };
        if !telemetry::print_live(&text).context("cannot write to stdout")? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// One look, as text to print.
async fn look(fleet: &Fleet, options: &StatusOptions) -> anyhow::Result<String> {
    let mut view = View::of(&gather_in_time(fleet).await?, options.run.as_ref());
    if view.runs.iter().any(|run| run.missing > 0 && run.is_collected) {
        // What left the queue just now is in the collector's next words.
        tokio::time::sleep(heartbeat::INTERVAL + SLACK).await;
        view = View::of(&gather_in_time(fleet).await?, options.run.as_ref());
    }
    if let (Some(run), true) = (&options.run, view.runs.is_empty() && options.watch.is_none()) {
        let all = View::of(&gather_in_time(fleet).await?, None);
        bail!("{}", fleet::unknown_run(run, all.runs.iter().map(|run| run.run.as_str())));
    }
    Ok(if options.json { serde_json::to_string(&view)? + "\n" } else { table::table(&view) })
}

async fn gather_in_time(fleet: &Fleet) -> anyhow::Result<Gathered> {
    tokio::time::timeout(LOOK_TIMEOUT, gather(fleet))
        .await
        .context("the NATS server did not answer in time")?
}

async fn gather(fleet: &Fleet) -> anyhow::Result<Gathered> {
    Ok(Gathered {
        // Jobs first: what leaves them afterwards is among the outcomes.
        jobs: fleet.num_jobs_queued().await?,
        outcomes: fleet.num_outcomes_queued().await?,
        dead: fleet.num_dead().await?,
        runs: fleet.runs().await?,
        workers: fleet.workers().await?,
        now: unix_now(),
    })
}
