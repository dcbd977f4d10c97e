//! `flotilla collect`: the answers of a run become lines of its output, each exactly once; or those of
//! all runs, each in a file of its own.
//!
//! What is written is the collector's business; here it gets its queue and its index, is told when to
//! end, and what it says is passed on.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use collector::{Lock, MemoryDedup, Output, RedisConfig, RedisDedup, Step};
use shared::RunId;
use shared::queue::nats::Fleet;
use tokio_util::sync::CancellationToken;

use crate::cli::fleet::CollectOptions;
use crate::observe::{self, Health};
use crate::statistics::Statistics;
use crate::{FAILED, FINISHED_WITH_FAILURES, INTERRUPTED, fleet, signals, telemetry};

mod all;
mod control;
mod elsewhere;
mod forgotten;
mod known;
mod one;
mod page;
mod tally;
mod uncollected;
mod until_done;

pub(crate) use elsewhere::holder;
pub(crate) use one::Collected;
use one::One;
pub(crate) use tally::Tallies;
pub(crate) use uncollected::Uncollected;

/// Runs `flotilla collect`.
pub(crate) fn main(options: &CollectOptions) -> anyhow::Result<ExitCode> {
    fleet::block_on(collect(options))
}

async fn collect(options: &CollectOptions) -> anyhow::Result<ExitCode> {
    let interruption = signals::interruption()?;
    let Some(fleet) = fleet::connect_unless(&interruption, &options.nats).await? else {
        return Ok(ExitCode::SUCCESS);
    };
    let health = Health::default();
    let roles = Roles {
        fleet: fleet.with_lease(options.lease),
        redis_url: options.redis.redis_url.clone(),
        wait: !options.no_wait,
        until_done: options.until_done,
        published: already(),
        abort_at: options.abort_at,
        shutdown: interruption,
        tallies: Tallies::default(),
        // One that waits to take over is as well as one that writes.
        uncollected: Uncollected::new(health.clone()),
    };
    let page = {
        let roles = roles.clone();
        move || page::page(roles.clone())
    };
    observe::serve(options.metrics.metrics_addr, health, page).await?;
    match (&options.output_dir, &options.output_file) {
        (Some(dir), _) => all::collect_all(&roles, dir).await,
        (None, Some(file)) => {
            let run = fleet::run_id(&options.run, Some(file))?;
            collect_one(&roles, run, file.clone(), options.statistics_file.as_ref()).await
        }
        (None, None) => Ok(ExitCode::from(FAILED)),
    }
}

/// Producers elsewhere say for themselves when they are done.
fn already() -> CancellationToken {
    let token = CancellationToken::new();
    token.cancel();
    token
}

/// What all collectors of this process have in common.
#[derive(Clone)]
pub(crate) struct Roles {
    pub(crate) fleet: Fleet,
    pub(crate) redis_url: Option<String>,
    /// Whether to wait for an output that another process writes.
    pub(crate) wait: bool,
    /// Whether to end when the run is complete.
    pub(crate) until_done: bool,
    /// Not complete before this: a producer of this process has published everything.
    pub(crate) published: CancellationToken,
    /// Where a test lets it die.
    pub(crate) abort_at: Option<Step>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tallies: Tallies,
    pub(crate) uncollected: Uncollected,
}

impl Roles {
    /// Collects one run until its end; `None` if that came before the output was this process' own.
    /// A run that another collector writes to another output is refused.
    pub(crate) async fn collect(
        &self,
        run: RunId,
        output_file: PathBuf,
    ) -> anyhow::Result<Option<Collected>> {
        let other = elsewhere::of_another_output(&self.fleet, &run, &output_file).await;
        if let Some(other) = &other {
            elsewhere::refuse_if_live(other, &output_file)?;
        }
        let lock = if self.wait { Lock::Wait(self.shutdown.clone()) } else { Lock::Refuse };
        let output = match Output::open(&output_file, lock).await {
            Err(collector::Error::Interrupted { .. }) => return Ok(None),
            opened => opened?,
        };
        let holder = elsewhere::holder(&output_file);
        let one = One { roles: self.clone(), run: run.clone(), output_file, other };
        let Some(url) = &self.redis_url else {
            return one.run(output, MemoryDedup::default()).await;
        };
        tokio::select! {
            dedup = redis(url, &run, holder) => one.run(output, dedup?).await,
            () = self.shutdown.cancelled() => Ok(None),
        }
    }
}

/// The index in Redis, claimed as `holder`.
pub(crate) async fn redis(url: &str, run: &RunId, holder: String) -> anyhow::Result<RedisDedup> {
    let config = RedisConfig { holder, ..RedisConfig::new(url) };
    RedisDedup::connect(&config, run).await.context("cannot use the Redis server")
}

/// Collects the only run of this process.
async fn collect_one(
    roles: &Roles,
    run: RunId,
    output_file: PathBuf,
    statistics_file: Option<&PathBuf>,
) -> anyhow::Result<ExitCode> {
    let Some(collected) = roles.collect(run, output_file.clone()).await? else {
        return Ok(ExitCode::SUCCESS);
    };
    let Collected { report, elapsed, lines, failed, missing } = collected;
    telemetry::print(&report.overall_statistics(elapsed).to_string())
        .context("cannot write to stdout")?;
    if let Some(path) = statistics_file {
        Statistics::of(&report, elapsed).write(path)?;
    }
    let path = output_file.display();
    tracing::info!("{path} has {lines} lines, {failed} of them failed");
    Ok(match (roles.until_done, roles.shutdown.is_cancelled()) {
        (true, true) => ExitCode::from(INTERRUPTED),
        (true, false) if missing > 0 => ExitCode::from(FAILED),
        (true, false) if failed > 0 => ExitCode::from(FINISHED_WITH_FAILURES),
        // A signal is the usual end of a collector that serves.
        _ => ExitCode::SUCCESS,
    })
}
