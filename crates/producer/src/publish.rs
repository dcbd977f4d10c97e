//! Contexts in, jobs out: gives each context its settings and seed, and publishes it.
//!
//! Bad input with an id becomes a failed outcome, so that its line says why; bad input without one
//! goes to the caller's report.

use shared::{
    Context, Generation, Job, Outcome, Queue, QueueError, RunId, Settled, WIRE_VERSION, job_seed,
};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::BadInput;

/// Contexts read ahead of the queue.
const READ_AHEAD: usize = 64;

/// What all jobs of a run have in common.
#[derive(Clone, Debug)]
pub struct JobTemplate {
    /// The run.
    pub run: RunId,
    /// Template of the user message; `None` for the model's own, or flotilla's.
    pub prompt_template: Option<String>,
    /// System prompt.
    pub system_prompt: Option<String>,
    /// How to generate; `seed` is the run's, from which each job's own is made.
    pub generation: Generation,
}

impl JobTemplate {
    fn job(&self, context: Context) -> Job {
        let seed = job_seed(self.generation.seed, &context.id);
        Job {
            version: WIRE_VERSION,
            run: self.run.clone(),
            context,
            prompt_template: self.prompt_template.clone(),
            system_prompt: self.system_prompt.clone(),
            generation: Generation { seed, ..self.generation.clone() },
        }
    }

    fn failed(&self, context: Context) -> Settled {
        let unnamed = || "its context failed without naming an error".to_owned();
        let reason = context.error.clone().unwrap_or_else(unnamed);
        Settled {
            version: WIRE_VERSION,
            run: self.run.clone(),
            seed: job_seed(self.generation.seed, &context.id),
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
    /// Jobs on the queue.
    pub jobs: u64,
    /// Input that has no context to answer from, published as failed outcomes.
    pub failed: u64,
    /// Bad input that can have no line, given to the report.
    pub rejected: u64,
}

impl Published {
    /// Lines that the output will gain.
    pub fn lines(&self) -> u64 {
        self.jobs + self.failed
    }
}

/// Publishes all of `contexts` in order, until they end or `shutdown`. Waits while a queue is full.
///
/// `report` is called for each bad input that has no line of its own.
pub async fn publish<J: Queue<Job>, O: Queue<Settled>>(
    contexts: impl Iterator<Item = Result<Context, BadInput>> + Send + 'static,
    template: &JobTemplate,
    (jobs, outcomes): (&J, &O),
    shutdown: &CancellationToken,
    report: &mut impl FnMut(&BadInput),
) -> Result<Published, PublishError> {
    let (mut inbox, reader) = read_ahead(contexts);
    let mut published = Published::default();
    loop {
        let publishing = async {
            let Some(next) = inbox.recv().await else {
                return Ok::<_, QueueError>(false);
            };
            match next.or_else(BadInput::into_context) {
                Ok(context) if context.success => {
                    jobs.publish(template.job(context)).await?;
                    published.jobs += 1;
                }
                Ok(context) => {
                    outcomes.publish(template.failed(context)).await?;
                    published.failed += 1;
                }
                Err(bad) => {
                    report(&bad);
                    published.rejected += 1;
                }
            }
            Ok(true)
        };
        // What a shutdown leaves unpublished, the same command publishes.
        let more = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(published),
            more = publishing => more?,
        };
        if !more {
            reader.await?;
            return Ok(published);
        }
    }
}

/// Reads and retrieves on a thread of its own, a bounded number ahead.
fn read_ahead(
    contexts: impl Iterator<Item = Result<Context, BadInput>> + Send + 'static,
) -> (mpsc::Receiver<Result<Context, BadInput>>, JoinHandle<()>) {
    let (sender, inbox) = mpsc::channel(READ_AHEAD);
    let reader = tokio::task::spawn_blocking(move || {
        for context in contexts {
            // The receiver is gone when the run is over.
            if sender.blocking_send(context).is_err() {
                break;
            }
        }
    });
    (inbox, reader)
}
