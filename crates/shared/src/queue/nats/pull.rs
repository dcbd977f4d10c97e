//! One pull: asks the consumer for messages and gathers what comes, on a task of its own.
//!
//! It asks in the server's one-shot way: all that is there now, else the first that comes, and then
//! the request is over. So nothing is left open that could bring messages nobody waits for. A request is
//! never cut short: the client's own way to do that loses what is on its way, and with heartbeats
//! its batches lose messages.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Message as NatsMessage, StatusCode, Subscriber};
use futures_util::StreamExt;
use serde_json::json;
use tokio::time::Instant;

use super::ANSWER_TIMEOUT;
use super::delivery::{NatsDelivery, Received};
use super::handover::{Giving, Parcel};
use super::publish::Backoff;
use super::queue::Inner;
use crate::message::WIRE_VERSION;
use crate::queue::{Message, QueueError};

/// How much later than asked the server may say that nothing came.
const GRACE: Duration = Duration::from_secs(2);
/// Messages of one request follow one another closely.
const REST_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest that one request waits. A pull makes another one then, if it is still wanted.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// How long messages of a request that was given up are still expected.
const STRAGGLE_TIME: Duration = Duration::from_secs(30);
/// How long a message for newer workers is left alone.
const NEWER_DELAY: Duration = Duration::from_secs(30);
/// Between two requests when something is wrong.
const RETRY_DELAY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Why a request is over.
enum End {
    /// All that was asked for, or all there is.
    Done,
    /// Others wait for what there is: ask for one, in line.
    Busy,
    /// There is no such consumer, or it has just changed.
    Missing,
    /// The connection was lost, or the server keeps silent.
    Cut,
    /// The server does not take the request; in its words.
    Odd(String),
}

/// A pull on its way.
pub(super) struct Puller<T: Message> {
    queue: Arc<Inner<T>>,
    max: usize,
    deadline: Instant,
    giving: Giving<T>,
}

impl<T: Message> Puller<T> {
    pub(super) fn new(
        queue: &Arc<Inner<T>>,
        max: usize,
        deadline: Instant,
        giving: Giving<T>,
    ) -> Self {
        Self { queue: Arc::clone(queue), max, deadline, giving }
    }

    pub(super) async fn run(self) {
        self.giving.give(self.pull().await);
    }

    async fn pull(&self) -> Result<Vec<NatsDelivery<T>>, QueueError> {
        let mut backoff = Backoff::new(RETRY_DELAY);
        let mut one_shot = true;
        loop {
            let shared = &self.queue.fleet.shared;
            let connection = tokio::select! {
                connection = shared.link.up() => connection,
                () = tokio::time::sleep_until(self.deadline) => return Ok(Vec::new()),
            };
            match self.queue.ensure_consumer().await {
                Ok(()) => {}
                Err(error) if error.is_passing() => {
                    if shared.notices.trouble.is_due() {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "cannot pull now; trying again"
                        );
                    }
                    if self.is_over_after(&mut backoff).await {
                        return Ok(Vec::new());
                    }
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            let (messages, end) = self.request(one_shot, connection).await?;
            let deliveries = sort(&self.queue, messages).await;
            if !deliveries.is_empty() {
                return Ok(deliveries);
            }
            one_shot = true;
            match end {
                End::Done | End::Cut => {
                    if self.is_over() {
                        return Ok(Vec::new());
                    }
                    continue;
                }
                End::Busy => {
                    one_shot = false;
                    continue;
                }
                End::Missing => self.queue.forget_consumer(),
                End::Odd(text) => {
                    if shared.notices.trouble.is_due() {
                        tracing::warn!(error = text, "the NATS server takes no pull; trying again");
                    }
                }
            }
            if self.is_over_after(&mut backoff).await {
                return Ok(Vec::new());
            }
        }
    }

    /// Whether its time is over or nobody waits any more.
    fn is_over(&self) -> bool {
        Instant::now() >= self.deadline || !self.giving.slot.is_watched()
    }

    /// The same after a little while.
    async fn is_over_after(&self, backoff: &mut Backoff) -> bool {
        backoff.wait().await;
        self.is_over()
    }

    /// One request for messages, to its end.
    async fn request(
        &self,
        one_shot: bool,
        connection: u64,
    ) -> Result<(Vec<NatsMessage>, End), QueueError> {
        let shared = &self.queue.fleet.shared;
        let source = self.queue.source()?;
        let left = self.deadline.saturating_duration_since(Instant::now());
        let left = left.clamp(Duration::from_millis(1), REQUEST_TIME);
        let nanos = u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
        let (max, body) = if one_shot {
            (self.max, json!({ "batch": self.max, "expires": nanos, "no_wait": true }))
        } else {
            (1, json!({ "batch": 1, "expires": nanos }))
        };
        let inbox = shared.client.new_inbox();
        let path = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", source.stream, source.consumer);
        let asking = async {
            let subscriber = shared.client.subscribe(inbox.clone()).await.ok()?;
            let body = body.to_string().into();
            shared.client.publish_with_reply(path, inbox, body).await.ok()?;
            Some(subscriber)
        };
        let Ok(Some(mut subscriber)) = tokio::time::timeout(ANSWER_TIMEOUT, asking).await else {
            return Ok((Vec::new(), End::Odd("the client takes no request".to_owned())));
        };
        let mut messages = Vec::new();
        let mut give_up = Instant::now() + left + GRACE;
        let end = loop {
            tokio::select! {
                message = subscriber.next() => match message {
                    None => break End::Cut,
                    Some(message) => match ended_by(&message) {
                        Some(end) => break end,
                        None if message.status.is_some_and(|s| s != StatusCode::OK) => {}
                        None => {
                            messages.push(message);
                            give_up = give_up.min(Instant::now() + REST_TIMEOUT);
                            if messages.len() == max {
                                break End::Done;
                            }
                        }
                    },
                },
                // What was on its way is lost with the connection, until its lease runs out.
                () = shared.link.lost(connection) => break End::Cut,
                () = tokio::time::sleep_until(give_up) => {
                    tokio::spawn(straggle(Arc::clone(&self.queue), subscriber));
                    break End::Cut;
                }
            }
        };
        Ok((messages, end))
    }
}

/// Takes what comes for a request that was given up because the server kept silent.
async fn straggle<T: Message>(queue: Arc<Inner<T>>, mut subscriber: Subscriber) {
    let deadline = Instant::now() + STRAGGLE_TIME;
    while let Ok(Some(message)) = tokio::time::timeout_at(deadline, subscriber.next()).await {
        if ended_by(&message).is_some() {
            return;
        }
        drop(Parcel::new(&queue, sort(&queue, vec![message]).await));
    }
}

/// Deliveries of the messages that can be read; the others are dealt with here.
async fn sort<T: Message>(
    queue: &Arc<Inner<T>>,
    messages: Vec<NatsMessage>,
) -> Vec<NatsDelivery<T>> {
    let context = &queue.fleet.shared.jetstream;
    let mut deliveries = Vec::with_capacity(messages.len());
    let mut others = Vec::new();
    for message in messages {
        let Some(received) = Received::new(message, context) else {
            tracing::debug!("a message that no stream sent was ignored");
            continue;
        };
        match received.decode::<T>() {
            Ok(message) => deliveries.push(NatsDelivery::new(queue, message, received)),
            Err(unreadable) => others.push((received, unreadable)),
        }
    }
    if !others.is_empty() {
        // What can't be dealt with in time comes again.
        drop(tokio::time::timeout(ANSWER_TIMEOUT, put_aside(queue, others)).await);
    }
    deliveries
}

async fn put_aside<T: Message>(queue: &Inner<T>, others: Vec<(Received, Unreadable)>) {
    for (received, unreadable) in others {
        let done = match unreadable {
            Unreadable::Newer(version) => {
                tracing::warn!(
                    "left a message of version {version} to a newer program; this one reads {WIRE_VERSION}"
                );
                received.give_back(&queue.fleet, NEWER_DELAY, queue.lease()).await
            }
            Unreadable::Garbage(reason) => {
                tracing::error!(
                    error = reason,
                    "a message that cannot be read is now a dead letter"
                );
                received.bury(&queue.fleet, &reason, queue.lease()).await
            }
        };
        if let Err(error) = done {
            tracing::debug!(%error, "a message that cannot be read comes again");
        }
    }
}

/// Why a message can't be read.
pub(super) enum Unreadable {
    /// A newer program wrote it.
    Newer(u16),
    /// Nobody will ever read it; the reason.
    Garbage(String),
}

/// Whether a message of the server's own ends the request, and how.
fn ended_by(message: &NatsMessage) -> Option<End> {
    let status = message.status?;
    let text = message.description.as_deref().unwrap_or_default();
    match status {
        StatusCode::OK | StatusCode::IDLE_HEARTBEAT => None,
        StatusCode::REQUEST_TERMINATED if text.starts_with("Exceeded") => {
            Some(End::Odd(text.to_owned()))
        }
        // Consumer Deleted, Leadership Change, Server Shutdown, …
        StatusCode::NO_RESPONDERS | StatusCode::REQUEST_TERMINATED => Some(End::Missing),
        _ if text == "Requests Pending" => Some(End::Busy),
        StatusCode::TIMEOUT | StatusCode::NOT_FOUND => Some(End::Done),
        _ => Some(End::Odd(format!("{status} {text}"))),
    }
}
