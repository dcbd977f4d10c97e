//! `flotilla reconcile`: publishes the queries again that have no line in the output. For what no setting
//! of a server can mend: a store that lost what it had confirmed.
//!
//! It cannot see which queries are still queued, so it refuses while anything of the run is, unless
//! forced: what is queued and published again is computed twice and written once.
//!
//! A failed job has its line like any other, and stays as it is. If that line was lost, its dead letter
//! may still be there; it is deleted once the job is published again. Which line was lost is known for
//! sure: an outcome is stored before its dead letter, so with the letters read first, then no outcome
//! found on its way, the output read last has the line or nobody has. With --force outcomes may be on
//! their way, and dead letters stay: `flotilla retry` needs them.

use std::collections::{HashMap, HashSet};
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
use shared::queue::nats::{Fleet, FleetError, NatsQueue};
use shared::status::{RunStatus, unix_now};
use shared::{IdDigest, Job, JobId, Message, Publishing, Queue, QueueError, RunId, Stored};

use crate::cli::fleet::ReconcileOptions;
use crate::hub::Need;
use crate::producers::{self, Producers};
use crate::rejects::Rejects;
use crate::{FINISHED_WITH_FAILURES, INTERRUPTED, files, fleet, produce, signals, telemetry};

/// Runs `flotilla reconcile`.
pub(crate) fn main(options: &ReconcileOptions) -> anyhow::Result<ExitCode> {
    let jobs = &options.jobs;
    jobs.retrieval.validate()?;
    let (input, _) = jobs.source.file()?;
    let run = fleet::run_id(&jobs.run, Some(&options.output_file))?;
    files::check(input, &options.output_file)?;
    let template = produce::template(run, &jobs.generation)?;
    let model = || jobs.model_path.find(Need::Tokenizer);
    let retriever = produce::retriever(&jobs.retrieval, &jobs.source, model)?;
    fleet::block_on(reconcile(options, template, retriever))
}

async fn reconcile(
    options: &ReconcileOptions,
    template: JobTemplate,
    retriever: Option<Arc<Retriever>>,
) -> anyhow::Result<ExitCode> {
    let interruption = signals::interruption()?;
    let fleet = tokio::select! {
        fleet = fleet::connect_soon(&options.nats) => fleet?,
        () = interruption.cancelled() => return Ok(ExitCode::from(INTERRUPTED)),
    };
    let model = &options.jobs.model.model;
    let letters =
        if options.force { HashMap::new() } else { dead_letters(&fleet, &template.run).await? };
    check_queues(&fleet, &template.run, options.force).await?;
    if !options.output_file.exists() {
        tracing::warn!(
            "there is no {}: if that is a slip and not a loss, everything is computed again",
            options.output_file.display()
        );
    }
    // The output last: what leaves the queues is in it.
    let written = read_output(&options.output_file)?;
    let num_lines = written.len() as u64;
    let known = move |id: &JobId| written.contains(&id.digest());
    let contexts = producer::contexts(&options.jobs.source, retriever)?.leaving_out(known);
    let again = Again { fleet: fleet.clone(), model: model.clone(), letters: Arc::new(letters) };
    let about = produce::about(&template.run, model, produce::input_name(&options.jobs.source)?);
    let publisher = Publisher::new(template, (again, fleet.outcomes(None)));
    let mut rejects = Rejects::shown();
    let mut report = |bad: &BadInput| rejects.add(bad);
    let published = producer::publish(contexts, &publisher, &interruption, &mut report).await?;
    if !interruption.is_cancelled() {
        let status = RunStatus {
            published: num_lines + published.lines(),
            total: Some(num_lines + published.lines()),
            finished: true,
            ended: true,
            seen_at: unix_now(),
            ..about
        };
        tell_published(&fleet, &status).await.context("cannot tell that the run is published")?;
    }
    let text = format!(
        "{} jobs published again, {} failed; {num_lines} have their line\n",
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

/// Says that the input is published: what its producer said may be lost with the rest, and a collector
/// wait for it. One that died elsewhere over a file of this name has nothing left to publish either.
async fn tell_published(fleet: &Fleet, status: &RunStatus) -> Result<(), FleetError> {
    fleet.put_run(status).await?;
    producers::remove_replaced(fleet, status).await?;
    let name = |status: &RunStatus| Some(Path::new(status.input.as_ref()?).file_name()?.to_owned());
    let said = fleet.run(&status.run).await?;
    for gone in Producers::of(&said, &status.run, status.seen_at).gone() {
        if name(gone) == name(status) {
            fleet.remove_run(gone).await?;
        }
    }
    Ok(())
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

/// Numbers of the run's dead letters, by job.
async fn dead_letters(fleet: &Fleet, run: &RunId) -> anyhow::Result<HashMap<IdDigest, Vec<u64>>> {
    let mut numbers: HashMap<IdDigest, Vec<u64>> = HashMap::new();
    let mut letters = std::pin::pin!(fleet.dead_letters(run));
    while let Some(letter) = letters.next().await {
        let letter = letter.context("cannot read the dead letters")?;
        if let Ok(job) = letter.job {
            numbers.entry(job.id().digest()).or_default().push(letter.sequence);
        }
    }
    Ok(numbers)
}

/// What makes a line of the output recognisable.
#[derive(Deserialize)]
struct Identified {
    id: JobId,
}

/// The ids of the output's lines; none without an output. Its collector may be writing: a last line
/// without its end is none yet.
pub(crate) fn read_output(path: &Path) -> anyhow::Result<HashSet<IdDigest>> {
    let mut ids = HashSet::new();
    let cannot_read = || format!("cannot read {}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(ids),
        opened => opened.with_context(cannot_read)?,
    };
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut line = Vec::new();
    for number in 1_u64.. {
        line.clear();
        reader.read_until(b'\n', &mut line).with_context(cannot_read)?;
        if line.last() != Some(&b'\n') {
            break;
        }
        let Identified { id } = serde_json::from_slice(&line).with_context(|| {
            format!("{}:{number}: expected a line of flotilla's results", path.display())
        })?;
        ids.insert(id.digest());
    }
    Ok(ids)
}

/// The jobs queue for what may have been there before: the server would drop it as a repeat.
#[derive(Clone)]
struct Again {
    fleet: Fleet,
    model: String,
    /// Numbers of the dead letters that published jobs leave behind.
    letters: Arc<HashMap<IdDigest, Vec<u64>>>,
}

impl Queue<Job> for Again {
    type Delivery = <NatsQueue<Job> as Queue<Job>>::Delivery;

    async fn publish(&self, job: Job) -> Result<Stored, QueueError> {
        tracing::debug!(message_id = job.message_id(), "published again");
        let id = job.id().digest();
        self.fleet.republish(&self.model, job).await?;
        for number in self.letters.get(&id).into_iter().flatten() {
            if let Err(error) = self.fleet.delete_dead_letter(*number).await {
                tracing::warn!(%error, "a dead letter stays; retry would have its job computed again");
            }
        }
        Ok(Stored::New)
    }

    async fn try_publish(&self, job: Job) -> Result<Publishing, QueueError> {
        self.publish(job).await.map(|_| Publishing::Stored)
    }

    async fn pull(&self, max: usize, wait: Duration) -> Result<Vec<Self::Delivery>, QueueError> {
        self.fleet.jobs(&self.model).pull(max, wait).await
    }
}
