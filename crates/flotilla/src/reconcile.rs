//! `flotilla reconcile`: publishes the queries again that are neither in the output nor among the dead
//! letters. For what no setting of a server can mend: a store that lost what it had confirmed.
//!
//! It cannot see which queries are still queued, so it refuses while anything of the run is, unless
//! forced: what is queued and published again is computed twice and written once.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::StreamExt;
use producer::{BadInput, JobTemplate, Publisher, Retriever};
use serde::Deserialize;
use shared::queue::nats::{Fleet, NatsQueue};
use shared::status::{Role, RunStatus, unix_now};
use shared::{IdDigest, Job, JobId, Message, Publishing, Queue, QueueError, RunId};

use crate::cli::fleet::ReconcileOptions;
use crate::rejects::Rejects;
use crate::{FINISHED_WITH_FAILURES, INTERRUPTED, files, fleet, produce, signals, telemetry};

/// Runs `flotilla reconcile`.
pub(crate) fn main(options: &ReconcileOptions) -> anyhow::Result<ExitCode> {
    options.retrieval.validate()?;
    let (input, _) = options.source.file()?;
    let run = fleet::run_id(&options.run, Some(&options.output_file))?;
    files::check(input, &options.output_file)?;
    let template = produce::template(run, &options.generation)?;
    let retriever =
        produce::retriever(&options.retrieval, &options.source, options.model_path.as_ref())?;
    fleet::block_on(reconcile(options, template, retriever))
}

async fn reconcile(
    options: &ReconcileOptions,
    template: JobTemplate,
    retriever: Option<Arc<Retriever>>,
) -> anyhow::Result<ExitCode> {
    let interruption = signals::interruption()?;
    let Some(fleet) = fleet::connect_unless(&interruption, &options.nats).await? else {
        return Ok(ExitCode::from(INTERRUPTED));
    };
    check_queues(&fleet, &template.run, options.force).await?;
    // The output last: what leaves the queues is in it.
    let mut known = dead(&fleet, &template.run).await?;
    let num_dead = known.len();
    let num_lines = read_output(&options.output_file, &mut known)?;
    let skip = move |id: &JobId| known.contains(&id.digest());
    let contexts = producer::contexts(&options.source, retriever, skip)?;
    let again = Again { fleet: fleet.clone(), model: options.model.model.clone() };
    let run = template.run.clone();
    let publisher = Publisher::new(template, (again, fleet.outcomes(None)));
    let mut rejects = Rejects::shown();
    let mut report = |bad: &BadInput| rejects.add(bad);
    let published = producer::publish(contexts, &publisher, &interruption, &mut report).await?;
    if !interruption.is_cancelled() {
        let status = RunStatus {
            run,
            role: Role::Producer,
            model: Some(options.model.model.clone()),
            published: num_lines + published.lines(),
            total: Some(num_lines + published.lines()),
            finished: true,
            seen_at: unix_now(),
            started_at: unix_now(),
            ..RunStatus::default()
        };
        // What the producer said is lost with the rest, and a collector may wait for it.
        fleet.put_run(&status).await.context("cannot tell that the run is published")?;
    }
    let text = format!(
        "{} jobs published again, {} failed; {num_lines} have their line, {num_dead} are dead \
         letters\n",
        published.jobs, published.failed
    );
    telemetry::print(&text).context("cannot write to stdout")?;
    Ok(if interruption.is_cancelled() {
        ExitCode::from(INTERRUPTED)
    } else if published.rejected > 0 || published.failed > 0 {
        ExitCode::from(FINISHED_WITH_FAILURES)
    } else {
        ExitCode::SUCCESS
    })
}

async fn check_queues(fleet: &Fleet, run: &RunId, force: bool) -> anyhow::Result<()> {
    let jobs = fleet.num_jobs_queued().await?;
    let jobs: u64 = jobs.iter().filter(|((_, of), _)| of == run).map(|(_, count)| count).sum();
    let outcomes = fleet.num_outcomes_queued().await?.get(run).copied().unwrap_or(0);
    match (jobs + outcomes, force) {
        (0, _) => {}
        (_, true) => tracing::warn!(
            "{jobs} jobs and {outcomes} outcomes of run '{}' are still queued; those that have no \
             line yet are computed twice and written once",
            run.0
        ),
        (_, false) => bail!(
            "{jobs} jobs and {outcomes} outcomes of run '{}' are still queued: wait until they are \
             done, or give --force to have those without a line computed twice",
            run.0
        ),
    }
    Ok(())
}

/// Ids of the run's dead letters.
async fn dead(fleet: &Fleet, run: &RunId) -> anyhow::Result<HashSet<IdDigest>> {
    let mut ids = HashSet::new();
    let mut letters = std::pin::pin!(fleet.dead_letters(run));
    while let Some(letter) = letters.next().await {
        let letter = letter.context("cannot read the dead letters")?;
        if let Ok(job) = letter.job {
            ids.insert(job.id().digest());
        }
    }
    Ok(ids)
}

/// What makes a line of the output recognisable.
#[derive(Deserialize)]
struct Identified {
    id: JobId,
}

/// Adds the ids of the output's lines. Its collector may be writing: a last line without its end is
/// none yet.
/// How many there are.
pub(crate) fn read_output(path: &Path, ids: &mut HashSet<IdDigest>) -> anyhow::Result<u64> {
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        opened => opened.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut line = Vec::new();
    let mut num_lines = 0;
    loop {
        line.clear();
        reader
            .read_until(b'\n', &mut line)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if line.last() != Some(&b'\n') {
            return Ok(num_lines);
        }
        num_lines += 1;
        let Identified { id } = serde_json::from_slice(&line).with_context(|| {
            format!("{}:{num_lines}: expected a line of flotilla's results", path.display())
        })?;
        ids.insert(id.digest());
    }
}

/// The jobs queue for what may have been there before: the server would drop it as a repeat.
#[derive(Clone)]
struct Again {
    fleet: Fleet,
    model: String,
}

impl Queue<Job> for Again {
    type Delivery = <NatsQueue<Job> as Queue<Job>>::Delivery;

    async fn publish(&self, job: Job) -> Result<(), QueueError> {
        tracing::debug!(message_id = job.message_id(), "published again");
        self.fleet.republish(&self.model, job).await
    }

    async fn try_publish(&self, job: Job) -> Result<Publishing, QueueError> {
        self.publish(job).await.map(|()| Publishing::Stored)
    }

    async fn pull(&self, max: usize, wait: Duration) -> Result<Vec<Self::Delivery>, QueueError> {
        self.fleet.jobs(&self.model).pull(max, wait).await
    }
}
