//! Dead letters: what was rejected, kept with its reason until it is put back or deleted.

use std::collections::BTreeMap;

use async_nats::HeaderMap;
use async_nats::jetstream::message::StreamMessage;
use futures_util::{Stream, TryStreamExt};

use super::delivery::Received;
use super::publish::Envelope;
use super::streams::code;
use super::{DEAD, Fleet, FleetError, JOBS, dead_subject, run_token};
use crate::message::{Job, RunId};
use crate::queue::QueueError;
use crate::token;

const REASON: &str = "Flotilla-Reason";
const ATTEMPTS: &str = "Flotilla-Attempts";
const MODEL: &str = "Flotilla-Model";
const WORKER: &str = "Flotilla-Worker";
const STREAM: &str = "Flotilla-Stream";
/// Longer reasons are cut; a header has to fit into a message beside the job.
const MAX_REASON_CHARS: usize = 2000;

/// A message that was rejected.
#[derive(Clone, Debug)]
pub struct DeadLetter {
    /// Its number among the dead letters.
    pub sequence: u64,
    /// Name of the model that it was for; empty if it was no job.
    pub model: String,
    /// The job, or the bytes of what is none.
    pub job: Result<Job, Vec<u8>>,
    /// Why it was rejected.
    pub reason: String,
    /// Deliveries it took.
    pub attempts: u32,
    /// Who rejected it.
    pub worker: Option<String>,
}

/// The dead letter of a message.
pub(super) fn letter(received: &Received, fleet: &Fleet, reason: &str) -> Envelope {
    let subject = dead_subject(run_token(&received.subject));
    let id = format!("dead/{}", received.key);
    let payload = received.payload.clone();
    let mut envelope = Envelope::new(DEAD, subject, payload, id.clone()).with_id(Some(&id));
    let cut: String = reason.chars().take(MAX_REASON_CHARS).collect();
    envelope.header(REASON, &cut);
    envelope.header(ATTEMPTS, &received.attempt.to_string());
    envelope.header(STREAM, &received.stream);
    if received.stream == JOBS {
        envelope.header(MODEL, &model(&received.subject).unwrap_or_default());
    }
    if let Some(worker) = &fleet.worker {
        envelope.header(WORKER, worker);
    }
    envelope
}

/// Name of the model in a job's subject.
pub(super) fn model(subject: &str) -> Option<String> {
    token::decode(subject.split('.').nth(2)?)
}

fn header(headers: &HeaderMap, name: &'static str) -> Option<String> {
    serde_json::from_str(headers.get(name)?.as_str()).ok()
}

impl From<StreamMessage> for DeadLetter {
    fn from(message: StreamMessage) -> Self {
        let headers = &message.headers;
        Self {
            sequence: message.sequence,
            model: header(headers, MODEL).unwrap_or_default(),
            job: rmp_serde::from_slice(&message.payload).map_err(|_| message.payload.to_vec()),
            reason: header(headers, REASON).unwrap_or_default(),
            attempts: header(headers, ATTEMPTS).and_then(|n| n.parse().ok()).unwrap_or(0),
            worker: header(headers, WORKER),
        }
    }
}

impl Fleet {
    /// The dead letters of a run, oldest first.
    pub fn dead_letters(
        &self,
        run: &RunId,
    ) -> impl Stream<Item = Result<DeadLetter, FleetError>> + Send + use<> {
        let subject = dead_subject(&token::encode(&run.0));
        self.messages(DEAD, subject).map_ok(DeadLetter::from)
    }

    /// How many dead letters each run has.
    pub async fn num_dead(&self) -> Result<BTreeMap<RunId, u64>, FleetError> {
        self.count_by_run(DEAD, &dead_subject("*")).await
    }

    /// Removes a dead letter; one that is gone already is fine.
    pub async fn delete_dead_letter(&self, sequence: u64) -> Result<(), FleetError> {
        let path = format!("STREAM.MSG.DELETE.{DEAD}");
        let body = serde_json::json!({ "seq": sequence });
        match self.shared.api::<serde_json::Value>(path, &body).await {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some(code::NO_MESSAGE) => Ok(()),
            Err(error)
                if error.code() == Some(code::NOT_DELETED)
                    && error.to_string().contains("no message found") =>
            {
                Ok(())
            }
            Err(error) => Err(FleetError::server(format!("delete dead letter {sequence}"), error)),
        }
    }

    /// Publishes a job that may have been published, and even answered, before: as another one,
    /// past what the queue remembers.
    pub async fn republish(&self, model: &str, job: Job) -> Result<(), QueueError> {
        self.jobs(model).republish(&job).await
    }
}
