//! A message that came from a stream, and settling it: every settlement is confirmed by the server,
//! and tried again until it is or the lease is over.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::Message as NatsMessage;
use async_nats::client::{Request, RequestErrorKind};
use async_nats::{Subject, jetstream};
use bytes::Bytes;
use serde::Deserialize;
use tokio::time::Instant;

use super::Fleet;
use super::publish::Backoff;
use super::pull::Unreadable;
use super::queue::Inner;
use crate::message::WIRE_VERSION;
use crate::queue::{Delivery, Message, QueueError};

const ACK: &[u8] = b"+ACK";
const TERMINATE: &[u8] = b"+TERM";
const IN_PROGRESS: &[u8] = b"+WPI";
/// A message given back without a delay comes again at once, to the same worker.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(10);
/// How long one answer is waited for.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(3);
/// A settlement is tried at least so long, however short the lease.
const MIN_SETTLE_TIME: Duration = Duration::from_secs(5);
/// Answers that the consumer is gone, until that is believed: a server may just be starting.
const MAX_ABSENT: u32 = 5;
const RETRY_DELAY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A message as it came.
pub(super) struct Received {
    pub(super) payload: Bytes,
    pub(super) subject: Subject,
    /// Where settlements go.
    reply: Subject,
    pub(super) stream: String,
    pub(super) attempt: u32,
    /// Number and time of the message in its stream: one message, whoever has it.
    pub(super) key: String,
}

#[derive(Deserialize)]
struct Version {
    version: u16,
}

impl Received {
    /// `None` if no stream sent it.
    pub(super) fn new(message: NatsMessage, context: &jetstream::Context) -> Option<Self> {
        let message = jetstream::Message { message, context: context.clone() };
        let info = message.info().ok()?;
        let (stream, attempt) = (info.stream.to_owned(), info.delivered);
        let key =
            format!("{stream}:{}:{}", info.stream_sequence, info.published.unix_timestamp_nanos());
        let NatsMessage { payload, subject, reply, .. } = message.message;
        let attempt = u32::try_from(attempt).unwrap_or(u32::MAX);
        Some(Self { payload, subject, reply: reply?, stream, attempt, key })
    }

    /// The message itself, if this program can read it.
    pub(super) fn decode<T: Message>(&self) -> Result<T, Unreadable> {
        let garbage = |error: rmp_serde::decode::Error| {
            Unreadable::Garbage(format!("expected a message of version {WIRE_VERSION}: {error}"))
        };
        // The version first: a newer message may look quite different.
        let Version { version } = rmp_serde::from_slice(&self.payload).map_err(garbage)?;
        if version > WIRE_VERSION {
            return Err(Unreadable::Newer(version));
        }
        if version < WIRE_VERSION {
            return Err(Unreadable::Garbage(format!(
                "expected a message of version {WIRE_VERSION}, given version {version}"
            )));
        }
        rmp_serde::from_slice(&self.payload).map_err(garbage)
    }

    /// Gives it back; it comes again after `delay`.
    pub(super) async fn give_back(
        &self,
        fleet: &Fleet,
        delay: Duration,
        lease: Duration,
    ) -> Result<(), QueueError> {
        let nanos = delay.max(MIN_RETRY_DELAY).as_nanos();
        let body = format!(r#"-NAK {{"delay":{nanos}}}"#);
        self.settle(fleet, Bytes::from(body), lease).await
    }

    /// Makes a dead letter of it: stored first, then gone from its stream.
    pub(super) async fn bury(
        &self,
        fleet: &Fleet,
        reason: &str,
        lease: Duration,
    ) -> Result<(), QueueError> {
        let letter = super::dead::letter(self, fleet, reason);
        let storing = fleet.shared.store(&letter);
        let mut storing = std::pin::pin!(storing);
        let mut signs = tokio::time::interval((lease / 3).max(MIN_RETRY_DELAY));
        loop {
            tokio::select! {
                stored = &mut storing => {
                    stored?;
                    break;
                }
                // The dead letters may be full for long, and nobody else is to start on it meanwhile.
                _ = signs.tick() => { self.keep_alive(fleet).await; }
            }
        }
        self.settle(fleet, Bytes::from_static(TERMINATE), lease).await
    }

    /// Whether a sign of life could be sent. It is not confirmed: the next one is soon.
    async fn keep_alive(&self, fleet: &Fleet) -> bool {
        let shared = &fleet.shared;
        let sending = shared.client.publish(self.reply.clone(), Bytes::from_static(IN_PROGRESS));
        shared.link.is_up() && sending.await.is_ok()
    }

    /// Tells the server what becomes of it, until the server confirms that or the lease is over.
    async fn settle(&self, fleet: &Fleet, body: Bytes, lease: Duration) -> Result<(), QueueError> {
        let settling = self.settle_until_confirmed(fleet, body);
        let limit = lease.max(MIN_SETTLE_TIME);
        let settled = tokio::time::timeout(limit, settling).await.unwrap_or(false);
        if settled { Ok(()) } else { Err(QueueError::LeaseExpired(self.key.clone())) }
    }

    async fn settle_until_confirmed(&self, fleet: &Fleet, body: Bytes) -> bool {
        let shared = &fleet.shared;
        let mut backoff = Backoff::new(RETRY_DELAY);
        let mut absent = 0;
        loop {
            let connection = shared.link.up().await;
            let request = Request::new().payload(body.clone()).timeout(Some(SETTLE_TIMEOUT));
            let answer = tokio::select! {
                answer = shared.client.send_request(self.reply.clone(), request) => answer,
                () = shared.link.lost(connection) => continue,
            };
            match answer {
                Ok(_) => return true,
                Err(error) if error.kind() == RequestErrorKind::NoResponders => absent += 1,
                Err(error) => {
                    tracing::debug!(%error, "a settlement is not confirmed; trying again");
                }
            }
            if absent >= MAX_ABSENT {
                // The stream was wiped: there is nothing left to settle.
                return false;
            }
            backoff.wait().await;
        }
    }
}

/// A message from a [`NatsQueue`](super::NatsQueue).
pub struct NatsDelivery<T: Message> {
    queue: Arc<Inner<T>>,
    message: T,
    received: Received,
    lease: Duration,
    /// When the lease began, as far as this side knows.
    alive_at: Mutex<Instant>,
}

impl<T: Message> NatsDelivery<T> {
    pub(super) fn new(queue: &Arc<Inner<T>>, message: T, received: Received) -> Self {
        let alive_at = Mutex::new(Instant::now());
        Self { queue: Arc::clone(queue), message, received, lease: queue.lease(), alive_at }
    }

    fn named(&self, error: QueueError) -> QueueError {
        match error {
            QueueError::LeaseExpired(_) => QueueError::LeaseExpired(self.message.message_id()),
            other => other,
        }
    }
}

impl<T: Message> Delivery<T> for NatsDelivery<T> {
    fn message(&self) -> &T {
        &self.message
    }

    fn attempt(&self) -> u32 {
        self.received.attempt
    }

    fn lease(&self) -> Duration {
        self.lease
    }

    async fn keep_alive(&self) -> Result<(), QueueError> {
        let is_sent = self.received.keep_alive(&self.queue.fleet).await;
        let mut alive_at = self.alive_at.lock().unwrap_or_else(PoisonError::into_inner);
        if is_sent {
            *alive_at = Instant::now();
        } else if alive_at.elapsed() >= self.lease {
            return Err(QueueError::LeaseExpired(self.message.message_id()));
        }
        Ok(())
    }

    async fn ack(self) -> Result<(), QueueError> {
        let acked =
            self.received.settle(&self.queue.fleet, Bytes::from_static(ACK), self.lease).await;
        acked.map_err(|error| self.named(error))
    }

    async fn retry(self, delay: Duration) -> Result<(), QueueError> {
        let given = self.received.give_back(&self.queue.fleet, delay, self.lease).await;
        given.map_err(|error| self.named(error))
    }

    async fn reject(self, reason: String) -> Result<(), QueueError> {
        let buried = self.received.bury(&self.queue.fleet, &reason, self.lease).await;
        buried.map_err(|error| self.named(error))
    }
}
