//! Contexts in, jobs out: gives each context its settings and seed, and publishes it.
//!
//! Bad input with an id becomes a failed outcome, so that its line says why; bad input without one
//! goes to the caller's report. An id that comes twice is published once.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use shared::{
    Context, Generation, IdDigest, Job, JobId, Outcome, Queue, QueueError, RunId, Settled,
    WIRE_VERSION, job_seed,
};
use tokio::sync::mpsc;
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

    fn failed(&self, id: JobId, query: String, reason: String) -> Settled {
        Settled {
            version: WIRE_VERSION,
            run: self.run.clone(),
            seed: job_seed(self.generation.seed, &id),
            context: Context::failed(id, query, reason.clone()),
            model: None,
            worker_rank: 0,
            attempts: 0,
            inference_time: 0.0,
            outcome: Outcome::Failed(reason),
        }
    }
}

/// What became of the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Jobs on the queue.
    pub jobs: u64,
    /// Bad input with an id, published as failed outcomes.
    pub failed: u64,
    /// Bad input that can have no line, given to the report.
    pub rejected: u64,
    /// Exact repeats of an earlier query, left out.
    pub repeated: u64,
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
) -> Result<Published, QueueError> {
    let mut inbox = read_ahead(contexts);
    let mut seen = Seen::default();
    let mut published = Published::default();
    loop {
        let next = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            next = inbox.recv() => next,
        };
        let Some(next) = next else { break };
        match next.and_then(|context| seen.admit(context)) {
            Ok(Some(context)) => {
                jobs.publish(template.job(context)).await?;
                published.jobs += 1;
            }
            Ok(None) => published.repeated += 1,
            Err(BadInput { id: Some(id), query, reason, .. }) if seen.is_new(&id) => {
                seen.0.insert(id.digest(), 0);
                let settled = template.failed(id, query.unwrap_or_default(), reason);
                outcomes.publish(settled).await?;
                published.failed += 1;
            }
            Err(bad) => {
                report(&bad);
                published.rejected += 1;
            }
        }
    }
    Ok(published)
}

/// Reads and retrieves on a thread of its own, a bounded number ahead.
fn read_ahead(
    contexts: impl Iterator<Item = Result<Context, BadInput>> + Send + 'static,
) -> mpsc::Receiver<Result<Context, BadInput>> {
    let (sender, inbox) = mpsc::channel(READ_AHEAD);
    tokio::task::spawn_blocking(move || {
        for context in contexts {
            // The receiver is gone when the run is over.
            if sender.blocking_send(context).is_err() {
                break;
            }
        }
    });
    inbox
}

/// The ids of this input, each with a hash of its query: 24 bytes an id.
#[derive(Default)]
struct Seen(HashMap<IdDigest, u64>);

impl Seen {
    fn is_new(&self, id: &JobId) -> bool {
        !self.0.contains_key(&id.digest())
    }

    /// The context if its id is new, nothing if the same query came before, an error if another did.
    fn admit(&mut self, context: Context) -> Result<Option<Context>, BadInput> {
        let mut hasher = DefaultHasher::new();
        (&context.query, &context.target_api, &context.dependencies).hash(&mut hasher);
        let body = hasher.finish();
        match self.0.insert(context.id.digest(), body) {
            None => Ok(Some(context)),
            Some(earlier) if earlier == body => Ok(None),
            Some(_) => Err(BadInput {
                file: "input".into(),
                line: 0,
                reason: format!("id '{}' is already used by another query", context.id),
                id: Some(context.id),
                query: Some(context.query),
            }),
        }
    }
}
