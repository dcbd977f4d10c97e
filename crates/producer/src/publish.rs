//! Contexts in, jobs out: gives each context its settings and seed, and publishes it.
//!
//! Bad input with an id becomes a failed outcome, so that its line says why; bad input without one
//! goes to the caller's report. A bounded number of publishes wait for the queue's confirmation at
//! a time, and only what is confirmed counts.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use shared::{
    Context, Generation, Job, Outcome, Queue, QueueError, RunId, Settled, Stored, WIRE_VERSION,
    job_seed,
};
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;

use crate::BadInput;
use crate::read_ahead::{Budget, Entry, Held, read_ahead};
use crate::stats::Stats;

/// Characters of a question that still fit into the outcome of a job that is too large.
const MAX_CUT_QUERY: usize = 1000;

/// What all jobs of a run have in common.
#[derive(Clone, Debug)]
pub struct JobTemplate {
    /// The run.
    pub run: RunId,
    /// Template of the user message; `None` for the model's own, or flotilla's.
    pub prompt_template: Option<String>,
    /// System prompt.
    pub system_prompt: Option<String>,
    /// How to generate, where a query doesn't say it; `seed` is the run's, from which each job's own
    /// is made.
    pub generation: Generation,
}

impl JobTemplate {
    /// The job that asks for an answer to this context.
    pub fn job(&self, mut context: Context) -> Job {
        let seed = Some(self.seed(&context));
        let asked = std::mem::take(&mut context.generation);
        Job {
            version: WIRE_VERSION,
            run: self.run.clone(),
            context,
            prompt_template: self.prompt_template.clone(),
            system_prompt: self.system_prompt.clone(),
            generation: Generation { seed, ..asked.or(&self.generation) },
        }
    }

    /// The seed that a query asks for, or one made from the run's and its id.
    fn seed(&self, context: &Context) -> u64 {
        let run_seed = self.generation.seed.unwrap_or_default();
        context.generation.seed.unwrap_or_else(|| job_seed(run_seed, &context.id))
    }

    /// The outcome of a context that failed, which never becomes a job.
    pub fn failed(&self, context: Context) -> Settled {
        let unnamed = || "its context failed without naming an error".to_owned();
        let reason = context.error.clone().unwrap_or_else(unnamed);
        Settled {
            version: WIRE_VERSION,
            run: self.run.clone(),
            seed: self.seed(&context),
            context,
            model: None,
            worker_rank: 0,
            attempts: 0,
            inference_time: 0.0,
            outcome: Outcome::Failed(reason),
        }
    }
}

/// Why publishing ended before the input did. What is published stays published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A queue failed.
    #[error("cannot publish a job")]
    Queue(#[from] QueueError),
    /// The thread that reads and retrieves panicked.
    #[error("reading the input broke off")]
    Reader(#[from] JoinError),
}

/// What became of the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Jobs put on the queue.
    pub jobs: u64,
    /// Jobs that the queue had already, from this input or another.
    pub repeated: u64,
    /// Input that can't become a job, published as failed outcomes.
    pub failed: u64,
    /// Bad input that can have no line, given to the report.
    pub rejected: u64,
}

impl Published {
    /// Lines that the output will have for it.
    pub fn lines(&self) -> u64 {
        self.jobs + self.repeated + self.failed
    }

    pub(crate) fn add(&mut self, put: Put) {
        match put {
            Put::Job => self.jobs += 1,
            Put::Repeated => self.repeated += 1,
            Put::Failed => self.failed += 1,
        }
    }
}

/// As what a context is on a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    Job,
    /// As a job, and it was there already.
    Repeated,
    Failed,
}

/// Publishes contexts as jobs of one run. What [`publish`] and [`crate::Server`] have in common.
pub struct Publisher<J, O> {
    template: JobTemplate,
    jobs: J,
    outcomes: O,
    window: usize,
    drain_timeout: Duration,
    stats: Arc<Stats>,
    pub(crate) budget: Arc<Budget>,
}

impl<J: Queue<Job>, O: Queue<Settled>> Publisher<J, O> {
    /// Publishes that may wait for their confirmation at a time, if not told otherwise.
    pub const DEFAULT_WINDOW: usize = 256;
    /// How long a shutdown waits for confirmations, if not told otherwise.
    pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

    /// Publishes jobs made after `template`.
    pub fn new(template: JobTemplate, (jobs, outcomes): (J, O)) -> Self {
        Self {
            template,
            jobs,
            outcomes,
            window: Self::DEFAULT_WINDOW,
            drain_timeout: Self::DEFAULT_DRAIN_TIMEOUT,
            stats: Arc::default(),
            budget: Arc::default(),
        }
    }

    /// Lets `window` publishes wait for their confirmation at a time; at least one. With one, jobs
    /// are on the queue in the order of the input; with more, they are sent in it, and which of
    /// them a full queue takes first is the queue's choice.
    pub fn with_window(self, window: usize) -> Self {
        Self { window: window.max(1), ..self }
    }

    /// Waits this long at a shutdown for the publishes that have begun. A full queue may never
    /// confirm them; those given up may be stored all the same, and the same input published again
    /// adds nothing then.
    pub fn with_drain_timeout(self, drain_timeout: Duration) -> Self {
        Self { drain_timeout, ..self }
    }

    /// Counts into `stats`.
    pub fn with_stats(self, stats: Arc<Stats>) -> Self {
        Self { stats, ..self }
    }

    /// Where this publisher counts.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    pub(crate) fn window(&self) -> usize {
        self.window
    }

    /// Publishes one context and waits for the confirmation.
    pub(crate) async fn put(&self, context: Context, held: Held) -> Result<Put, QueueError> {
        let _waiting = self.stats.waiting();
        let put = if context.success {
            self.put_job(context).await?
        } else {
            self.put_failed(context).await?
        };
        match put {
            Put::Job => self.stats.add_published(),
            Put::Repeated => self.stats.add_repeated(),
            Put::Failed => self.stats.add_failed(),
        }
        drop(held);
        Ok(put)
    }

    async fn put_job(&self, context: Context) -> Result<Put, QueueError> {
        let question = without_text(&context);
        match self.jobs.publish(self.template.job(context)).await {
            Ok(Stored::New) => Ok(Put::Job),
            Ok(Stored::Repeated) => Ok(Put::Repeated),
            Err(QueueError::TooLarge { bytes, limit, .. }) => {
                let reason = format!(
                    "the job is too large for the queue: expected at most {limit} bytes, given \
                     {bytes}"
                );
                tracing::warn!(job_id = %question.id, bytes, limit, "job is too large for the queue");
                let error = Some(reason);
                self.put_failed(Context { success: false, error, ..question }).await
            }
            Err(error) => Err(error),
        }
    }

    /// Publishes a failed outcome; without its texts, and with a piece of its question, where
    /// nothing more fits. That is a few kilobytes: a queue that can't take them can't take any
    /// job, and its error ends the publishing.
    async fn put_failed(&self, context: Context) -> Result<Put, QueueError> {
        let query: String = context.query.chars().take(MAX_CUT_QUERY).collect();
        let reason = context.error.as_deref().unwrap_or_default();
        let reason = reason.chars().take(MAX_CUT_QUERY).collect();
        let cut = Context::failed(context.id.clone(), query, reason);
        match self.outcomes.publish(self.template.failed(context)).await {
            Err(QueueError::TooLarge { .. }) => {
                self.outcomes.publish(self.template.failed(cut)).await?;
            }
            published => drop(published?),
        }
        Ok(Put::Failed)
    }
}

/// A context without what makes it large.
fn without_text(context: &Context) -> Context {
    Context {
        id: context.id.clone(),
        query: context.query.clone(),
        target_api: context.target_api.clone(),
        dependencies: context.dependencies.clone(),
        retrieval_method: context.retrieval_method,
        context: String::new(),
        context_length: 0,
        retrieval_time: context.retrieval_time,
        success: context.success,
        error: context.error.clone(),
        documents: Vec::new(),
        generation: Generation::default(),
    }
}

/// Publishes all of `contexts`, until they end or `shutdown`. Waits while a queue is full.
///
/// `report` is called for each bad input that has no line of its own. A shutdown stops the
/// reading and waits for the publishes that have begun; what it leaves unpublished, the same
/// command publishes. The thread that reads may then still be waiting for input: it isn't waited
/// for, and a runtime that is to end must not either (`shutdown_background`).
pub async fn publish<J: Queue<Job>, O: Queue<Settled>>(
    contexts: impl Iterator<Item = Result<Context, BadInput>> + Send + 'static,
    publisher: &Publisher<J, O>,
    shutdown: &CancellationToken,
    report: &mut impl FnMut(&BadInput),
) -> Result<Published, PublishError> {
    let (mut inbox, reader) = read_ahead(contexts, &publisher.budget);
    let mut published = Published::default();
    let mut in_flight = FuturesUnordered::new();
    let mut open = true;
    while open || !in_flight.is_empty() {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {
                drop(inbox);
                let draining = async {
                    while let Some(put) = in_flight.next().await {
                        published.add(put?);
                    }
                    Ok::<(), QueueError>(())
                };
                match tokio::time::timeout(publisher.drain_timeout, draining).await {
                    Ok(drained) => drained?,
                    Err(_late) => tracing::debug!("the queue is full; some jobs stay unpublished"),
                }
                return Ok(published);
            }
            Some(put) = in_flight.next() => published.add(put?),
            entry = inbox.recv(), if open && in_flight.len() < publisher.window => {
                let Some(Entry { item, held }) = entry else {
                    open = false;
                    continue;
                };
                match item.or_else(BadInput::into_context) {
                    Ok(context) => in_flight.push(publisher.put(context, held)),
                    Err(bad) => {
                        report(&bad);
                        publisher.stats.add_rejected();
                        published.rejected += 1;
                    }
                }
            }
        }
    }
    reader.await?;
    Ok(published)
}
