//! One queue of a [`Fleet`]: which subject a message goes to, which consumer it comes from.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, Info, pull};
use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::error::ApiError;
use super::handover::{Pending, Watching};
use super::publish::Envelope;
use super::pull::Puller;
use super::streams::{Nothing, code, is_absent};
use super::{Fleet, FleetError, JOBS, NatsDelivery, RESULTS, job_subject, outcome_subject};
use crate::message::{Job, RunId, Settled};
use crate::queue::{Message, Publishing, Queue, QueueError, Stored};
use crate::token;

/// Above all slots of a fleet together: reached, it stalls without a word.
const MAX_ACK_PENDING: i64 = 200_000;
/// Above the workers that wait for jobs at once.
const MAX_WAITING: i64 = 10_000;
/// A consumer that nobody used for so long is removed; the next pull makes it anew.
const INACTIVE_THRESHOLD: Duration = Duration::from_secs(7 * 24 * 3600);
/// The server refuses longer names.
const MAX_NAME_BYTES: usize = 200;

/// How much later than asked a pull of its own may end.
const SLACK: Duration = Duration::from_secs(1);

/// A queue on JetStream. Clones share what is on its way to them.
pub struct NatsQueue<T: Message> {
    pub(super) inner: Arc<Inner<T>>,
}

impl<T: Message> Clone for NatsQueue<T> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

/// Where messages go.
enum Target {
    /// To a model's subject; the same id within the duplicate window is the same job.
    Jobs { model_token: String },
    /// To the run's subject; every publish is another outcome, since a job that is put back has two.
    Outcomes,
}

/// Where messages come from.
pub(super) struct Source {
    pub(super) stream: &'static str,
    pub(super) consumer: String,
    subject: String,
}

pub(super) struct Inner<T: Message> {
    pub(super) fleet: Fleet,
    target: Target,
    pub(super) source: Option<Source>,
    /// The consumer's lease, once it is known to exist.
    lease: Mutex<Option<Duration>>,
    pub(super) pending: Pending<T>,
}

impl NatsQueue<Job> {
    pub(super) fn jobs(fleet: &Fleet, model: &str) -> Self {
        let model_token = token::encode(model);
        let source = Source {
            stream: JOBS,
            consumer: name("jobs", &model_token),
            subject: format!("flotilla.jobs.{model_token}.*"),
        };
        Self::new(fleet, Target::Jobs { model_token }, Some(source))
    }

    /// Publishes a job that may have been published before, as another one.
    pub(super) async fn republish(&self, job: &Job) -> Result<(), QueueError> {
        let fresh_id = self.inner.fleet.shared.client.new_inbox();
        let envelope = self.inner.envelope(job, Some(&fresh_id))?;
        self.inner.fleet.shared.store(&envelope).await.map(drop)
    }
}

impl NatsQueue<Settled> {
    pub(super) fn outcomes(fleet: &Fleet, run: Option<&RunId>) -> Self {
        let source = run.map(|run| Source {
            stream: RESULTS,
            consumer: name("results", &token::encode(&run.0)),
            subject: outcome_subject(run),
        });
        Self::new(fleet, Target::Outcomes, source)
    }
}

/// A consumer's name; hashed where it would be too long.
fn name(prefix: &str, token: &str) -> String {
    if token.len() <= MAX_NAME_BYTES {
        return format!("{prefix}-{token}");
    }
    let digest = Sha256::digest(token.as_bytes());
    digest
        .iter()
        .take(16)
        .fold(format!("{prefix}-sha256-"), |name, byte| name + &format!("{byte:02x}"))
}

impl<T: Message> NatsQueue<T> {
    fn new(fleet: &Fleet, target: Target, source: Option<Source>) -> Self {
        let inner = Inner {
            fleet: fleet.clone(),
            target,
            source,
            lease: Mutex::new(None),
            pending: Pending::default(),
        };
        Self { inner: Arc::new(inner) }
    }
}

impl<T: Message> Queue<T> for NatsQueue<T> {
    type Delivery = NatsDelivery<T>;

    async fn publish(&self, message: T) -> Result<Stored, QueueError> {
        let envelope = self.inner.envelope(&message, self.inner.message_id(&message).as_deref())?;
        drop(message);
        self.inner.fleet.shared.store(&envelope).await
    }

    async fn try_publish(&self, message: T) -> Result<Publishing, QueueError> {
        let envelope = self.inner.envelope(&message, self.inner.message_id(&message).as_deref())?;
        self.inner.fleet.shared.try_store(&envelope).await
    }

    async fn pull(&self, max: usize, wait: Duration) -> Result<Vec<NatsDelivery<T>>, QueueError> {
        let deadline = Instant::now() + wait;
        loop {
            let left = self.inner.pending.take_leftovers(max);
            if !left.is_empty() || max == 0 {
                return Ok(left);
            }
            // One that was begun for a pull which is gone, else a new one.
            let (watching, limit) = match Watching::adopt(&self.inner) {
                Some(adopted) => (adopted, deadline),
                None => {
                    let (watching, giving) = Watching::new(&self.inner);
                    tokio::spawn(Puller::new(&self.inner, max, deadline, giving).run());
                    // It ends by itself, unless the server can't be reached.
                    (watching, deadline + SLACK)
                }
            };
            let pulled = match watching.result(limit).await {
                Some(parcel) => parcel?.take(max),
                None => return Ok(Vec::new()),
            };
            if !pulled.is_empty() || Instant::now() >= deadline {
                return Ok(pulled);
            }
        }
    }
}

impl<T: Message> Inner<T> {
    fn envelope(&self, message: &T, id: Option<&str>) -> Result<Envelope, QueueError> {
        let bytes =
            rmp_serde::to_vec_named(message).map_err(|error| QueueError::Server(error.into()))?;
        let (stream, subject) = match &self.target {
            Target::Jobs { model_token } => (JOBS, job_subject(model_token, message.run())),
            Target::Outcomes => (RESULTS, outcome_subject(message.run())),
        };
        Ok(Envelope::new(stream, subject, Bytes::from(bytes), message.message_id()).with_id(id))
    }

    /// What makes a repeated publish known to the server. The stream holds all models and runs, so that these belong
    /// to it, in a form that keeps run `a/b` with id `c` apart from run `a` with id `b/c`.
    ///
    /// Outcomes have none: that of a job which was put back within the duplicate window must not be dropped, and a server
    /// keeps each id in memory that long. The collector drops repeats.
    fn message_id(&self, message: &T) -> Option<String> {
        match &self.target {
            Target::Jobs { model_token } => {
                let run_token = token::encode(&message.run().0);
                Some(format!("{model_token}/{run_token}/{}", message.message_id()))
            }
            Target::Outcomes => None,
        }
    }

    fn lease_slot(&self) -> MutexGuard<'_, Option<Duration>> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a delivery is kept for its holder.
    pub(super) fn lease(&self) -> Duration {
        self.lease_slot().unwrap_or(self.fleet.lease)
    }

    /// Looks for the consumer again before the next pull.
    pub(super) fn forget_consumer(&self) {
        *self.lease_slot() = None;
    }

    /// Makes sure that the consumer exists and is as it should be.
    pub(super) async fn ensure_consumer(&self) -> Result<(), FleetError> {
        let source = self.source()?;
        if self.lease_slot().is_some() {
            return Ok(());
        }
        let shared = &self.fleet.shared;
        let path = format!("CONSUMER.INFO.{}.{}", source.stream, source.consumer);
        let found = match shared.api::<Info>(path, &Nothing {}).await {
            Ok(info) => Some(info),
            Err(error) if error.code() == Some(code::CONSUMER_NOT_FOUND) => None,
            Err(error) => {
                if is_absent(&error) || error.code() == Some(code::STREAM_NOT_FOUND) {
                    shared.repair().await?;
                }
                return Err(self.untold(error));
            }
        };
        let lease = match found {
            Some(found) if self.check(source, &found)? => found.config.ack_wait,
            found => self.create_consumer(source, found.as_ref()).await?,
        };
        *self.lease_slot() = Some(lease);
        Ok(())
    }

    pub(super) fn source(&self) -> Result<&Source, FleetError> {
        let missing =
            || FleetError::Options("expected a run to take outcomes of, given none".to_owned());
        self.source.as_ref().ok_or_else(missing)
    }

    fn untold(&self, error: ApiError) -> FleetError {
        let consumer = self.source.as_ref().map_or("", |source| &source.consumer);
        FleetError::server(format!("tell about consumer {consumer}"), error)
    }

    /// Whether a consumer that exists can stay as it is; an error if it can't be made to fit.
    fn check(&self, source: &Source, found: &Info) -> Result<bool, FleetError> {
        let config = &found.config;
        let same = |field, expected: &str, found: String| {
            if expected == found {
                return Ok(());
            }
            let stream = format!("{} consumer {}", source.stream, source.consumer);
            Err(FleetError::Mismatch { stream, field, expected: expected.to_owned(), found })
        };
        same("filter subject", &source.subject, config.filter_subject.clone())?;
        same("ack policy", "explicit", format!("{:?}", config.ack_policy).to_lowercase())?;
        same("deliver policy", "all", format!("{:?}", config.deliver_policy).to_lowercase())?;
        same("deliver subject", "", config.deliver_subject.clone().unwrap_or_default())?;
        if config.ack_wait > self.fleet.lease {
            tracing::info!(
                consumer = source.consumer,
                "the consumer's lease of {:?} holds, since others count on it",
                config.ack_wait
            );
        }
        Ok(config.ack_wait >= self.fleet.lease
            && config.max_deliver <= 0
            && config.max_ack_pending >= MAX_ACK_PENDING
            && config.max_waiting >= MAX_WAITING)
    }

    /// Creates the consumer, or raises its limits to ours; its lease then.
    async fn create_consumer(
        &self,
        source: &Source,
        found: Option<&Info>,
    ) -> Result<Duration, FleetError> {
        let lease =
            found.map_or(self.fleet.lease, |found| found.config.ack_wait.max(self.fleet.lease));
        // The server does not let this be changed; whatever it was, it stays.
        let max_waiting = found.map_or(MAX_WAITING, |found| found.config.max_waiting);
        if max_waiting < MAX_WAITING {
            tracing::warn!(
                consumer = source.consumer,
                "the consumer lets {max_waiting} workers wait, expected {MAX_WAITING}; remove it to have it made anew"
            );
        }
        let config = pull::Config {
            durable_name: Some(source.consumer.clone()),
            filter_subject: source.subject.clone(),
            ack_policy: AckPolicy::Explicit,
            deliver_policy: DeliverPolicy::All,
            ack_wait: lease,
            max_deliver: -1,
            max_ack_pending: MAX_ACK_PENDING,
            max_waiting,
            inactive_threshold: INACTIVE_THRESHOLD,
            ..pull::Config::default()
        };
        let created =
            self.fleet.shared.jetstream.create_consumer_on_stream(config, source.stream).await;
        let created = created
            .map_err(|e| FleetError::server(format!("create consumer {}", source.consumer), e))?;
        let config = &created.cached_info().config;
        if config.max_ack_pending < MAX_ACK_PENDING {
            tracing::warn!(
                consumer = source.consumer,
                "the server lets {} deliveries be out at once, expected {MAX_ACK_PENDING}",
                config.max_ack_pending
            );
        }
        Ok(config.ack_wait)
    }
}
