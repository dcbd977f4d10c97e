//! One pull: asks the consumer for messages, gathers what comes, and leaves nothing behind.
//!
//! It asks in the server's one-shot way: all that is there now, else the first that comes, and then
//! the request is over. So nothing is left open that could bring messages nobody waits for. Where it
//! has to be cut short, it unsubscribes and takes what was on its way. Heartbeats are not asked for: with
//! them the client's own batches lose messages.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use async_nats::{Message as NatsMessage, StatusCode, Subscriber};
use futures_util::StreamExt;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::ANSWER_TIMEOUT;
use super::delivery::{NatsDelivery, Received};
use super::publish::Backoff;
use super::queue::{Inner, runtime};
use crate::message::WIRE_VERSION;
use crate::queue::{Message, QueueError};

/// How much later than asked the server may say that nothing came.
const GRACE: Duration = Duration::from_secs(2);
/// Messages of one request follow one another closely.
const REST_TIMEOUT: Duration = Duration::from_secs(1);
/// How long what came for a dropped pull waits for the next one, before it goes back.
const KEEP: Duration = Duration::from_millis(300);
/// Delay with which it goes back.
const GIVE_BACK_DELAY: Duration = Duration::from_millis(10);
/// How long a message for newer workers is left alone.
const NEWER_DELAY: Duration = Duration::from_secs(30);
/// Between two requests when something is wrong.
const RETRY_DELAY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What a pull brought. What is still in it when it is dropped goes to the next pull.
pub(super) struct Parcel<T: Message> {
    queue: Arc<Inner<T>>,
    deliveries: Vec<NatsDelivery<T>>,
}

impl<T: Message> Parcel<T> {
    /// Takes it over.
    pub(super) fn open(mut self) -> Vec<NatsDelivery<T>> {
        std::mem::take(&mut self.deliveries)
    }
}

impl<T: Message> Drop for Parcel<T> {
    fn drop(&mut self) {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        if self.deliveries.is_empty() {
            return;
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let deliveries = std::mem::take(&mut self.deliveries);
        let mut leftovers = self.queue.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        leftovers.extend(deliveries.into_iter().map(|delivery| (number, delivery)));
        drop(leftovers);
        // Without a runtime the leases run out, as if this process had died.
        if let Some(runtime) = runtime() {
            runtime.spawn(give_back(Arc::clone(&self.queue), number));
        }
    }
}

/// Gives back what no pull has taken in time.
async fn give_back<T: Message>(queue: Arc<Inner<T>>, number: u64) {
    tokio::time::sleep(KEEP.min(queue.lease() / 4)).await;
    let mut old = Vec::new();
    {
        let mut leftovers = queue.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        for (came, delivery) in std::mem::take(&mut *leftovers) {
            if came <= number { old.push(delivery) } else { leftovers.push_back((came, delivery)) }
        }
    }
    for delivery in old {
        let given = crate::queue::Delivery::retry(delivery, GIVE_BACK_DELAY).await;
        if let Err(error) = given {
            tracing::debug!(%error, "a delivery that nobody took could not be given back");
        }
    }
}

/// Tells that nobody waits for the pull any more.
type Waiter<T> = oneshot::Sender<Result<Parcel<T>, QueueError>>;

/// Why a request is over.
enum End {
    /// All that was asked for, or all there is.
    Done,
    /// Others wait for what there is: ask for one, in line.
    Busy,
    /// There is no such consumer, or it has just changed.
    Missing,
    /// The connection was lost, or nobody waits any more, or the server keeps silent.
    Cut,
    /// The server does not take the request; in its words.
    Odd(String),
}

/// A pull on its way.
pub(super) struct Puller<T: Message> {
    queue: Arc<Inner<T>>,
    max: usize,
    deadline: Instant,
}

impl<T: Message> Puller<T> {
    pub(super) fn new(queue: &Arc<Inner<T>>, max: usize, wait: Duration) -> Self {
        Self { queue: Arc::clone(queue), max, deadline: Instant::now() + wait }
    }

    pub(super) async fn run(self, mut waiter: Waiter<T>) {
        let queue = Arc::clone(&self.queue);
        let pulled = self.pull(&mut waiter).await;
        let parcel = pulled.map(|deliveries| Parcel { queue, deliveries });
        // If nobody waits any more the parcel is dropped, and sees to it.
        drop(waiter.send(parcel));
    }

    async fn pull(&self, waiter: &mut Waiter<T>) -> Result<Vec<NatsDelivery<T>>, QueueError> {
        let mut backoff = Backoff::new(RETRY_DELAY);
        let mut one_shot = true;
        loop {
            let shared = &self.queue.fleet.shared;
            let connection = tokio::select! {
                connection = shared.link.up() => connection,
                () = tokio::time::sleep_until(self.deadline) => return Ok(Vec::new()),
                () = waiter.closed() => return Ok(Vec::new()),
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
                    if self.is_over_after(&mut backoff, waiter).await {
                        return Ok(Vec::new());
                    }
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            let (messages, end) = self.request(one_shot, connection, waiter).await?;
            let deliveries = self.sort(messages).await;
            if !deliveries.is_empty() {
                return Ok(deliveries);
            }
            one_shot = true;
            match end {
                End::Done | End::Cut => {
                    if Instant::now() >= self.deadline || waiter.is_closed() {
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
            if self.is_over_after(&mut backoff, waiter).await {
                return Ok(Vec::new());
            }
        }
    }

    /// Waits a little; whether the pull's time is over or nobody waits any more.
    async fn is_over_after(&self, backoff: &mut Backoff, waiter: &mut Waiter<T>) -> bool {
        tokio::select! {
            () = backoff.wait() => Instant::now() >= self.deadline,
            () = waiter.closed() => true,
        }
    }

    /// One request for messages, to its end.
    async fn request(
        &self,
        one_shot: bool,
        connection: u64,
        waiter: &mut Waiter<T>,
    ) -> Result<(Vec<NatsMessage>, End), QueueError> {
        let shared = &self.queue.fleet.shared;
        let source = self.queue.source()?;
        let left = self.deadline.saturating_duration_since(Instant::now());
        let left = left.max(Duration::from_millis(1));
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
                () = waiter.closed() => break End::Cut,
                () = shared.link.lost(connection) => break End::Cut,
                () = tokio::time::sleep_until(give_up) => break End::Cut,
            }
        };
        if matches!(end, End::Cut) {
            drain(&mut subscriber, &mut messages).await;
        }
        Ok((messages, end))
    }

    /// Deliveries of the messages that can be read; the others are dealt with here.
    async fn sort(&self, messages: Vec<NatsMessage>) -> Vec<NatsDelivery<T>> {
        let mut deliveries = Vec::with_capacity(messages.len());
        let mut others = Vec::new();
        for message in messages {
            let context = &self.queue.fleet.shared.jetstream;
            let Some(received) = Received::new(message, context) else {
                tracing::debug!("a message that no stream sent was ignored");
                continue;
            };
            match received.decode::<T>() {
                Ok(message) => deliveries.push(NatsDelivery::new(&self.queue, message, received)),
                Err(unreadable) => others.push((received, unreadable)),
            }
        }
        if !others.is_empty() {
            // What can't be dealt with in time comes again.
            drop(tokio::time::timeout(ANSWER_TIMEOUT, self.put_aside(others)).await);
        }
        deliveries
    }

    async fn put_aside(&self, others: Vec<(Received, Unreadable)>) {
        for (received, unreadable) in others {
            let done = match unreadable {
                Unreadable::Newer(version) => {
                    tracing::warn!(
                        "left a message of version {version} to a newer program; this one reads {WIRE_VERSION}"
                    );
                    received.give_back(&self.queue.fleet, NEWER_DELAY, self.queue.lease()).await
                }
                Unreadable::Garbage(reason) => {
                    tracing::error!(
                        error = reason,
                        "a message that cannot be read is now a dead letter"
                    );
                    received.bury(&self.queue.fleet, &reason, self.queue.lease()).await
                }
            };
            if let Err(error) = done {
                tracing::debug!(%error, "a message that cannot be read comes again");
            }
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

/// Unsubscribes, and takes what was on its way.
async fn drain(subscriber: &mut Subscriber, messages: &mut Vec<NatsMessage>) {
    let draining = async {
        if subscriber.drain().await.is_err() {
            return;
        }
        while let Some(message) = subscriber.next().await {
            if message.status.is_none_or(|status| status == StatusCode::OK) {
                messages.push(message);
            }
        }
    };
    // While the connection is gone nothing is on its way.
    drop(tokio::time::timeout(GRACE, draining).await);
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
