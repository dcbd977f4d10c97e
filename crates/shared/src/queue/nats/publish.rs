//! Storing a message in a stream: once the server has confirmed it, however often it takes.
//!
//! A message's id, if it has one, makes a repeated try within the duplicate window a repetition for the server too.
//! A full stream is no trouble: one publisher asks again, the others wait behind it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_nats::client::{Request, RequestErrorKind};
use async_nats::jetstream;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::Info;
use async_nats::{HeaderMap, HeaderValue};
use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::streams::{Nothing, code};
use super::{FleetError, Shared};
use crate::queue::{Publishing, QueueError, Stored};

/// Header by which the server knows a repeated publish.
const MESSAGE_ID: &str = "Nats-Msg-Id";
/// Longest id that goes into the header as it is.
const MAX_PLAIN_ID: usize = 128;
/// How long one confirmation is waited for: a slow disk has a whole window of them to write.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a publish that doesn't wait for room puts up with passing trouble.
const TRY_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks at a full stream.
const FULL_DELAY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// Between two tries after passing trouble.
const TROUBLE_DELAY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// Smaller messages fit into any stream that is of use.
const SURELY_FITS: usize = 64 * 1024;
/// Between two log lines about the same thing.
const NOTICE_INTERVAL: Duration = Duration::from_secs(60);

/// A message ready to be stored.
pub(super) struct Envelope {
    pub(super) stream: &'static str,
    pub(super) subject: String,
    pub(super) payload: Bytes,
    pub(super) headers: HeaderMap,
    /// How people know the message.
    pub(super) label: String,
}

impl Envelope {
    /// An envelope; a repeated publish of it is stored again.
    pub(super) fn new(
        stream: &'static str,
        subject: String,
        payload: Bytes,
        label: String,
    ) -> Self {
        Self { stream, subject, payload, headers: HeaderMap::new(), label }
    }

    /// A repeated publish under `id`, if there is one, adds nothing.
    pub(super) fn with_id(mut self, id: Option<&str>) -> Self {
        if let Some(id) = id {
            self.headers.insert(MESSAGE_ID, header_id(id).as_str());
        }
        self
    }

    /// Adds a header; the value as JSON text, since a header can't hold every character.
    pub(super) fn header(&mut self, name: &'static str, value: &str) {
        let text = serde_json::Value::from(value).to_string();
        self.headers.insert(name, HeaderValue::from(text.as_str()));
    }
}

/// `id` where a header can hold it, else its SHA-256.
fn header_id(id: &str) -> String {
    let is_plain = id.bytes().all(|byte| byte.is_ascii_graphic()) && id.len() <= MAX_PLAIN_ID;
    if is_plain && !id.is_empty() {
        return id.to_owned();
    }
    let digest = Sha256::digest(id.as_bytes());
    digest.iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

/// What came of one try.
enum Attempt {
    Stored(Stored),
    Full,
    /// Something that passes.
    Trouble(String),
}

/// Doubles from the first to the second.
pub(super) struct Backoff {
    next: Duration,
    most: Duration,
}

impl Backoff {
    pub(super) fn new((next, most): (Duration, Duration)) -> Self {
        Self { next, most }
    }

    pub(super) async fn wait(&mut self) {
        tokio::time::sleep(self.next).await;
        self.next = (self.next * 2).min(self.most);
    }
}

/// What is said at most once in a while, by whoever notices it.
#[derive(Default)]
pub(super) struct Notices {
    pub(super) trouble: Throttle,
    pub(super) full: Throttle,
    /// Held by the publisher that asks a full stream again.
    gate: tokio::sync::Mutex<()>,
}

/// Lets one in a while through.
#[derive(Default)]
pub(super) struct Throttle(Mutex<Option<Instant>>);

impl Throttle {
    pub(super) fn is_due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|at| at.elapsed() >= NOTICE_INTERVAL);
        if is_due {
            *last = Some(Instant::now());
        }
        is_due
    }
}

impl Shared {
    /// Stores the message; waits for room and for passing trouble to end.
    pub(super) async fn store(&self, envelope: &Envelope) -> Result<Stored, QueueError> {
        let mut trouble = Backoff::new(TROUBLE_DELAY);
        // What an earlier try of this very publish may have stored is no repetition.
        let mut may_be_stored = false;
        loop {
            match self.attempt(envelope).await? {
                Attempt::Stored(_) if may_be_stored => return Ok(Stored::New),
                Attempt::Stored(stored) => return Ok(stored),
                Attempt::Full => return self.store_when_there_is_room(envelope).await,
                Attempt::Trouble(error) => {
                    may_be_stored = true;
                    self.tell_trouble(envelope, &error);
                    trouble.wait().await;
                }
            }
        }
    }

    /// Stores the message if there is room.
    pub(super) async fn try_store(&self, envelope: &Envelope) -> Result<Publishing, QueueError> {
        let trying = async {
            let mut trouble = Backoff::new(TROUBLE_DELAY);
            loop {
                match self.attempt(envelope).await? {
                    Attempt::Stored(_) => return Ok(Publishing::Stored),
                    Attempt::Full => return Ok(Publishing::Full),
                    Attempt::Trouble(error) => {
                        self.tell_trouble(envelope, &error);
                        trouble.wait().await;
                    }
                }
            }
        };
        tokio::time::timeout(TRY_TIMEOUT, trying).await.unwrap_or(Ok(Publishing::Full))
    }

    /// One that waits for room is a new one: a message that is there needs none.
    async fn store_when_there_is_room(&self, envelope: &Envelope) -> Result<Stored, QueueError> {
        self.check_fits(envelope).await?;
        let _gate = self.notices.gate.lock().await;
        let mut full = Backoff::new(FULL_DELAY);
        let mut trouble = Backoff::new(TROUBLE_DELAY);
        loop {
            match self.attempt(envelope).await? {
                Attempt::Stored(_) => return Ok(Stored::New),
                Attempt::Full => {
                    if self.notices.full.is_due() {
                        tracing::info!(
                            stream = envelope.stream,
                            "the queue is full; waiting for room"
                        );
                    }
                    full.wait().await;
                }
                Attempt::Trouble(error) => {
                    self.tell_trouble(envelope, &error);
                    trouble.wait().await;
                }
            }
        }
    }

    /// A message larger than its whole stream would wait for ever.
    async fn check_fits(&self, envelope: &Envelope) -> Result<(), QueueError> {
        let bytes = envelope.payload.len();
        if bytes < SURELY_FITS {
            return Ok(());
        }
        let info = self.api::<Info>(format!("STREAM.INFO.{}", envelope.stream), &Nothing {}).await;
        let limit = info.ok().and_then(|info| usize::try_from(info.config.max_bytes).ok());
        match limit {
            Some(limit) if bytes >= limit => Err(too_large(envelope, limit)),
            _ => Ok(()),
        }
    }

    fn tell_trouble(&self, envelope: &Envelope, error: &str) {
        if self.notices.trouble.is_due() {
            tracing::warn!(
                message_id = envelope.label,
                stream = envelope.stream,
                error,
                "the NATS server has not confirmed a message; trying again until it does"
            );
        }
    }

    async fn attempt(&self, envelope: &Envelope) -> Result<Attempt, QueueError> {
        let connection = self.link.up().await;
        let request = Request::new()
            .payload(envelope.payload.clone())
            .headers(envelope.headers.clone())
            .timeout(Some(CONFIRM_TIMEOUT));
        let answer = tokio::select! {
            answer = self.client.send_request(envelope.subject.clone(), request) => answer,
            // No answer comes over a connection that is gone.
            () = self.link.lost(connection) => return Ok(Attempt::Trouble("connection lost".to_owned())),
            () = tokio::time::sleep(CONFIRM_TIMEOUT) => return Ok(Attempt::Trouble("timed out".to_owned())),
        };
        match answer {
            Ok(answer) => confirmed(envelope, &answer.payload, self.client.max_payload()),
            Err(error) => match error.kind() {
                RequestErrorKind::MaxPayloadExceeded => {
                    Err(too_large(envelope, self.client.max_payload()))
                }
                RequestErrorKind::InvalidSubject => {
                    Err(FleetError::server("store a message", error).into())
                }
                RequestErrorKind::NoResponders => {
                    self.repair().await?;
                    Ok(Attempt::Trouble(format!("nobody stores {}", envelope.subject)))
                }
                RequestErrorKind::TimedOut | RequestErrorKind::Other => {
                    Ok(Attempt::Trouble(error.to_string()))
                }
            },
        }
    }
}

fn too_large(envelope: &Envelope, limit: usize) -> QueueError {
    let (message_id, bytes) = (envelope.label.clone(), envelope.payload.len());
    QueueError::TooLarge { message_id, bytes, limit }
}

/// What the server's answer says.
fn confirmed(envelope: &Envelope, answer: &[u8], limit: usize) -> Result<Attempt, QueueError> {
    let error = match serde_json::from_slice::<Response<PublishAck>>(answer) {
        Ok(Response::Ok(PublishAck { duplicate: true, .. })) => {
            return Ok(Attempt::Stored(Stored::Repeated));
        }
        Ok(Response::Ok(_)) => return Ok(Attempt::Stored(Stored::New)),
        Ok(Response::Err { error }) => error,
        Err(error) => return Ok(Attempt::Trouble(format!("no confirmation: {error}"))),
    };
    match error.error_code().0 {
        code::NOT_STORED if is_full(&error) => Ok(Attempt::Full),
        code::MESSAGE_TOO_LARGE => Err(too_large(envelope, limit)),
        _ => Ok(Attempt::Trouble(error.to_string())),
    }
}

/// A full stream and a broken disk have the same number, and differ in words.
fn is_full(error: &jetstream::Error) -> bool {
    let text = error.to_string();
    ["maximum bytes exceeded", "maximum messages exceeded"].iter().any(|words| text.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_a_header_cannot_hold_are_hashed() {
        assert_eq!(header_id("run/q1.*>"), "run/q1.*>");
        for id in ["", "two words", "line\nbreak", "línea", &"x".repeat(129)] {
            let hashed = header_id(id);
            assert!(hashed.starts_with("sha256:") && hashed.len() == 71, "{hashed}");
        }
        assert_ne!(header_id("a b"), header_id("a\nb"));
    }

    #[test]
    fn full_and_broken_are_told_apart() {
        let envelope = Envelope::new("S", "s".into(), Bytes::from_static(b"x"), "id".into());
        let attempt = |answer: &str| confirmed(&envelope, answer.as_bytes(), 1);
        let error = |code: u64, text: &str| {
            format!(
                r#"{{"error":{{"code":503,"err_code":{code},"description":"{text}"}},"stream":"S","seq":0}}"#
            )
        };
        assert!(matches!(attempt(r#"{"stream":"S","seq":7}"#), Ok(Attempt::Stored(Stored::New))));
        assert!(matches!(
            attempt(r#"{"stream":"S","seq":7,"duplicate":true}"#),
            Ok(Attempt::Stored(Stored::Repeated))
        ));
        assert!(matches!(attempt(&error(10077, "maximum bytes exceeded")), Ok(Attempt::Full)));
        assert!(matches!(attempt(&error(10077, "maximum messages exceeded")), Ok(Attempt::Full)));
        assert!(matches!(
            attempt(&error(10077, "no space left on device")),
            Ok(Attempt::Trouble(_))
        ));
        assert!(matches!(
            attempt(&error(10023, "insufficient resources")),
            Ok(Attempt::Trouble(_))
        ));
        assert!(matches!(attempt(&error(10054, "too large")), Err(QueueError::TooLarge { .. })));
        assert!(matches!(attempt("hello"), Ok(Attempt::Trouble(_))));
    }
}
