//! `flotilla retry`: puts the failed jobs of a run back to the queue, from its dead letters.
//!
//! For each batch of dead letters: (1) the failed lines of these jobs leave the output, by the
//! collector that owns it, into a file beside it; (2) the jobs are published again, past the
//! queue's memory of what it has seen; (3) the dead letters are deleted. What a crash costs:
//!
//! - before or in (1): nothing; lines leave the output all or none.
//! - between (1) and (2), or in (2): these jobs have no line until the same command is run again:
//!   their dead letters are still there.
//! - between (2) and (3), or in (3): the same command publishes them a second time; they are computed
//!   twice and written once.
//!
//! A line of bad input has no dead letter, since it never was a job: --input-failures takes such lines
//! out, and the corrected input is published like any other.
//!
//! (1) waits until no outcome of the run is on its way: a failed line that is written after it would
//! keep the new answer out.

use std::collections::HashSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use collector::{Collector, Lock, MemoryDedup, Output, RedisDedup};
use futures_util::StreamExt;
use shared::queue::nats::{DeadLetter, Fleet};
use shared::status::{Reply, Request};
use shared::{IdDigest, Job, JobId, RunId};

use crate::cli::fleet::RetryOptions;
use crate::{INTERRUPTED, collect, files, fleet, signals, telemetry};

/// Dead letters put back together.
const BATCH: usize = 1_000;
/// How long outcomes on their way are waited for.
const OUTCOMES_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a collector may take to answer: it may be in the middle of a batch, and the output long.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(120);
/// Between two looks at the outcomes.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Runs `flotilla retry`.
pub(crate) fn main(options: &RetryOptions) -> anyhow::Result<ExitCode> {
    fleet::block_on(retry(options))
}

/// What a retry came to.
#[derive(Debug, Default)]
struct Done {
    /// Jobs put back.
    retried: u64,
    /// Failed lines that left the output.
    removed: u64,
    /// Dead letters that hold no job.
    unreadable: u64,
    /// Failed lines of bad input that stay.
    bad_input: u64,
}

impl Done {
    fn text(&self) -> String {
        let mut text = format!(
            "{} jobs put back, {} failed lines taken out of the output\n",
            self.retried, self.removed
        );
        if self.bad_input > 0 {
            text += &format!(
                "{} failed lines are of bad input, which no job can be put back for: take them out \
                 with --input-failures, then run flotilla produce with the corrected input\n",
                self.bad_input
            );
        }
        text
    }
}

async fn retry(options: &RetryOptions) -> anyhow::Result<ExitCode> {
    let interruption = signals::interruption()?;
    let retrying = async {
        let fleet = fleet::connect_soon(&options.nats).await?;
        // An output outlives what is known of its run.
        if options.output_file.is_none() {
            fleet::check_run(&fleet, &options.run).await?;
        }
        let mut lines = Lines::of(options).await?;
        if options.input_failures {
            let removed = lines.bad_input(&fleet, options, true).await?;
            return anyhow::Ok(Done { removed, ..Done::default() });
        }
        let done = put_back(options, &fleet, &mut lines).await?;
        let bad_input = match lines.bad_input(&fleet, options, false).await {
            Ok(count) => count,
            Err(error) => {
                tracing::debug!("cannot count the lines of bad input: {error:#}");
                0
            }
        };
        Ok(Done { bad_input, ..done })
    };
    let done = tokio::select! {
        done = retrying => done?,
        () = interruption.cancelled() => return Ok(ExitCode::from(INTERRUPTED)),
    };
    if done.unreadable > 0 {
        tracing::warn!("{} dead letters of the run hold no job and stay", done.unreadable);
    }
    telemetry::print(&done.text()).context("cannot write to stdout")?;
    Ok(ExitCode::SUCCESS)
}

/// One dead letter that is to be put back.
struct Letter {
    sequence: u64,
    model: String,
    job: Job,
}

async fn put_back(
    options: &RetryOptions,
    fleet: &Fleet,
    lines: &mut Lines,
) -> anyhow::Result<Done> {
    let mut done = Done::default();
    let mut wanted: HashSet<&str> = options.id.iter().map(String::as_str).collect();
    let is_selective = !wanted.is_empty();
    let mut letters = std::pin::pin!(fleet.dead_letters(&options.run));
    let mut batch = Vec::new();
    let mut found: HashSet<String> = HashSet::new();
    loop {
        let next = letters.next().await.transpose()?;
        let is_last = next.is_none();
        if let Some(DeadLetter { sequence, model, job, .. }) = next {
            let is_model = options.model.as_ref().is_none_or(|only| *only == model);
            match job {
                Ok(job) if is_model && (!is_selective || options.id.contains(&job.id().0)) => {
                    if is_selective {
                        found.insert(job.id().0.clone());
                    }
                    batch.push(Letter { sequence, model, job });
                }
                Ok(_) => {}
                Err(_) => done.unreadable += u64::from(!is_selective),
            }
        }
        if batch.len() >= BATCH || (is_last && !batch.is_empty()) {
            done.removed += lines.remove(fleet, &batch).await?;
            done.retried += publish(fleet, std::mem::take(&mut batch)).await?;
        }
        if is_last {
            break;
        }
    }
    wanted.retain(|id| !found.contains(*id));
    for id in wanted {
        tracing::warn!(job_id = id, "no dead letter of the run is of this job");
    }
    Ok(done)
}

/// Steps (2) and (3).
async fn publish(fleet: &Fleet, batch: Vec<Letter>) -> anyhow::Result<u64> {
    let count = batch.len() as u64;
    for Letter { sequence, model, job } in batch {
        tracing::debug!(job_id = %job.id(), run = job.run.0, "put back");
        fleet.republish(&model, job).await.context("cannot put a job back")?;
        fleet.delete_dead_letter(sequence).await.context("cannot delete a dead letter")?;
    }
    Ok(count)
}

/// How the failed lines leave the output.
enum Lines {
    /// A running collector is asked.
    Asked,
    /// Here, since no collector runs, and with the index in Redis.
    Redis(Box<Collector<RedisDedup>>),
    /// Here, with an index of its own.
    Memory(Box<Collector<MemoryDedup>>),
}

impl Lines {
    async fn of(options: &RetryOptions) -> anyhow::Result<Self> {
        let Some(path) = &options.output_file else { return Ok(Self::Asked) };
        files::check_input(path)?;
        let output = Output::open(path, Lock::Refuse).await?;
        Ok(match &options.redis.redis_url {
            Some(url) => {
                let dedup = collect::redis(url, &options.run, collect::holder(path)).await?;
                Self::Redis(Box::new(Collector::open(output, dedup).await?))
            }
            None => Self::Memory(Box::new(Collector::open(output, MemoryDedup::default()).await?)),
        })
    }

    fn outcomes_timeout(&self) -> Duration {
        match self {
            Self::Asked => OUTCOMES_TIMEOUT,
            // Nobody else writes them, so there is nothing to wait for.
            Self::Redis(_) | Self::Memory(_) => Duration::ZERO,
        }
    }

    /// How many failed lines there are of bad input, or were until they were taken out.
    async fn bad_input(
        &mut self,
        fleet: &Fleet,
        options: &RetryOptions,
        remove: bool,
    ) -> anyhow::Result<u64> {
        if remove {
            wait_for_outcomes(fleet, &options.run, self.outcomes_timeout()).await?;
        }
        let ids: Vec<JobId> = options.id.iter().cloned().map(JobId).collect();
        let digests = ids.iter().map(JobId::digest).collect();
        Ok(match self {
            Self::Redis(collector) => collector.handle_bad_input(&digests, remove).await?,
            Self::Memory(collector) => collector.handle_bad_input(&digests, remove).await?,
            Self::Asked => ask(fleet, &options.run, &Request::BadInput { ids, remove }).await?,
        })
    }

    /// Step (1): how many lines left the output.
    async fn remove(&mut self, fleet: &Fleet, batch: &[Letter]) -> anyhow::Result<u64> {
        let Some(run) = batch.first().map(|letter| &letter.job.run) else { return Ok(0) };
        let ids = || batch.iter().map(|letter| letter.job.id());
        let digests = || ids().map(JobId::digest).collect::<HashSet<IdDigest>>();
        wait_for_outcomes(fleet, run, self.outcomes_timeout()).await?;
        Ok(match self {
            Self::Redis(collector) => collector.remove_failed(&digests()).await?,
            Self::Memory(collector) => collector.remove_failed(&digests()).await?,
            Self::Asked => {
                let request = Request::RemoveFailed { ids: ids().cloned().collect() };
                ask(fleet, run, &request).await?
            }
        })
    }
}

/// Asks the run's collector about failed lines; how many they are.
async fn ask(fleet: &Fleet, run: &RunId, request: &Request) -> anyhow::Result<u64> {
    match fleet.request_control(run, request, CONTROL_TIMEOUT).await {
        Ok(Reply::Removed(lines) | Reply::Found(lines)) => Ok(lines),
        Ok(Reply::Refused(reason)) => bail!("the collector refused: {reason}"),
        Err(error) => Err(error).context(
            "the failed lines are still in the output; start a collector of the run, or give \
             --output-file with the output if none shall run",
        ),
    }
}

/// Waits until every outcome of the run is written.
async fn wait_for_outcomes(fleet: &Fleet, run: &RunId, timeout: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeout;
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    loop {
        ticks.tick().await;
        let queued = fleet.num_outcomes_queued().await?.get(run).copied().unwrap_or(0);
        if queued == 0 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!(
                "{queued} outcomes of run '{}' are not in its output yet: expected a collector \
                 that writes them first, then try again",
                run.0
            );
        }
    }
}
