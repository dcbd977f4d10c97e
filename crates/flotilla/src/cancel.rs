//! `flotilla cancel`: drops what is queued of a run. What is written stays, and what workers hold may still
//! get its line: nothing tells them.
//!
//! The producers' records are replaced by one that says that no more comes, so that the run has an end. It
//! counts what is left of the run: its lines, and the answers on their way.

use std::process::ExitCode;

use anyhow::{Context, bail};
use shared::queue::nats::Fleet;
use shared::status::{Role, RunStatus, unix_now};

use crate::cli::fleet::CancelOptions;
use crate::{INTERRUPTED, fleet, producers, signals, telemetry};

/// Runs `flotilla cancel`.
pub(crate) fn main(options: &CancelOptions) -> anyhow::Result<ExitCode> {
    fleet::block_on(async {
        let interruption = signals::interruption()?;
        tokio::select! {
            done = cancel(options) => done,
            () = interruption.cancelled() => Ok(ExitCode::from(INTERRUPTED)),
        }
    })
}

async fn cancel(options: &CancelOptions) -> anyhow::Result<ExitCode> {
    let (fleet, run) = (fleet::connect_soon(&options.nats).await?, &options.run);
    fleet::check_run(&fleet, run).await?;
    let said = fleet.run(run).await?;
    let now = unix_now();
    let is_producer = |status: &&RunStatus| status.role == Role::Producer;
    if let Some(live) = said.iter().filter(is_producer).find(|status| !status.is_gone(now)) {
        bail!(
            "run '{}' is still being published from {}: end that first",
            run.0,
            producers::label(live)
        );
    }
    let dropped = fleet.drop_jobs(run).await?;
    end_publishing(&fleet, &said, options).await.context("cannot tell that no more comes")?;
    let text = format!(
        "{dropped} jobs dropped; the same queries can be published again in half a minute, when the \
         server has forgotten them\n"
    );
    telemetry::print(&text).context("cannot write to stdout")?;
    Ok(ExitCode::SUCCESS)
}

/// Puts one record in place of all producers'.
async fn end_publishing(
    fleet: &Fleet,
    said: &[RunStatus],
    options: &CancelOptions,
) -> anyhow::Result<()> {
    let run = &options.run;
    let unwritten = fleet.num_outcomes_queued().await?.get(run).copied().unwrap_or(0);
    let lines: u64 = said.iter().filter(|s| s.role == Role::Collector).map(|s| s.done).sum();
    let now = unix_now();
    let record = RunStatus {
        run: run.clone(),
        role: Role::Producer,
        id: fleet::process_name(),
        host: fleet::host(),
        input: Some("flotilla cancel".to_owned()),
        published: lines + unwritten,
        total: Some(lines + unwritten),
        finished: true,
        ended: true,
        started_at: now,
        seen_at: now,
        ..RunStatus::default()
    };
    // The new one first: without any, the run would have no end.
    fleet.put_run(&record).await?;
    for old in said.iter().filter(|status| status.role == Role::Producer) {
        fleet.remove_run(old).await?;
    }
    Ok(())
}
