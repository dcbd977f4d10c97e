//! One request: who may ask, what becomes of the records in its body, what is answered.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::BodyDataStream;
use axum::extract::{Request, State};
use axum::http::header::{
    AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::Serialize;
use sha2::{Digest, Sha256};
use shared::{Context, Job, Queue, QueueError, Settled};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ListenConfig;
use super::body::{self, Limits, Refusal};
use crate::BadInput;
use crate::known::Known;
use crate::publish::{Published, Publisher};
use crate::read_ahead::{Entry, read_ahead};
use crate::retrieve::Retriever;
use crate::source::{Division, body_contexts};

/// Bad records that an answer names; it counts all of them.
const MAX_NAMED: usize = 100;
/// When a client that was sent away may come back, in seconds.
const RETRY_SECONDS: &str = "2";

/// Makes what tells for one request which of its queries have their line.
pub(super) type MakeKnown = Box<dyn Fn() -> Box<dyn Known> + Send + Sync>;

/// What all requests share.
pub(super) struct Shared<J, O> {
    config: ListenConfig,
    token: Option<[u8; 32]>,
    publisher: Publisher<J, O>,
    retriever: Option<Arc<Retriever>>,
    make_known: MakeKnown,
    slots: Semaphore,
    totals: Mutex<Published>,
    /// The first failure of a queue, which ends the server.
    failure: Mutex<Option<QueueError>>,
    end: CancellationToken,
}

impl<J: Queue<Job>, O: Queue<Settled>> Shared<J, O> {
    pub(super) fn new(
        config: ListenConfig,
        publisher: Publisher<J, O>,
        (retriever, make_known): (Option<Arc<Retriever>>, MakeKnown),
        end: CancellationToken,
    ) -> Self {
        Self {
            token: config.token.as_ref().map(|token| Sha256::digest(token.trim()).into()),
            slots: Semaphore::new(config.max_requests),
            config,
            publisher,
            retriever,
            make_known,
            totals: Mutex::default(),
            failure: Mutex::default(),
            end,
        }
    }

    /// What was published, or why no more can be.
    pub(super) fn finish(&self) -> Result<Published, QueueError> {
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(failure) => Err(failure),
            None => Ok(*self.totals.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    fn fail(&self, error: QueueError) {
        tracing::error!(%error, "cannot publish a job; no more queries are taken");
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
        self.end.cancel();
    }

    fn add(&self, published: Published) {
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        totals.jobs += published.jobs;
        totals.repeated += published.repeated;
        totals.failed += published.failed;
        totals.rejected += published.rejected;
    }

    /// Whether the client has the token. Digests are compared, all bytes of them, so that the
    /// time it takes says nothing about the token.
    fn is_authorized(&self, headers: &HeaderMap) -> bool {
        let Some(token) = &self.token else {
            return true;
        };
        let given = headers.get(AUTHORIZATION).and_then(|value| {
            let (scheme, given) = value.to_str().ok()?.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(given.trim())
        });
        let given: [u8; 32] = Sha256::digest(given.unwrap_or_default()).into();
        let differing = token.iter().zip(given).fold(0, |bits, (a, b)| bits | (a ^ b));
        std::hint::black_box(differing) == 0
    }
}

/// The server's paths.
pub(super) fn router<J: Queue<Job>, O: Queue<Settled>>(shared: Arc<Shared<J, O>>) -> Router {
    let unknown = async || Answer::refused(StatusCode::NOT_FOUND, "expected /v1/queries");
    let wrong = async || {
        let text = "expected POST /v1/queries or GET /healthz";
        Answer::refused(StatusCode::METHOD_NOT_ALLOWED, text)
    };
    Router::new()
        .route("/v1/queries", post(post_queries::<J, O>))
        .route("/healthz", get(async || "ok\n"))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong)
        .with_state(shared)
}

async fn post_queries<J: Queue<Job>, O: Queue<Settled>>(
    State(shared): State<Arc<Shared<J, O>>>,
    request: Request,
) -> Answer {
    let (head, body) = request.into_parts();
    let mut body = body.into_data_stream();
    let (answer, is_read) = match shared.admit(&head.headers) {
        Err(refused) => (*refused, false),
        Ok(division) => match shared.slots.try_acquire() {
            Ok(_slot) => {
                let answer = shared.take(&mut body, division).await;
                shared.add(answer.published());
                // Of a body that has ended or stopped there is nothing more to read.
                let is_read = !matches!(
                    answer.status,
                    StatusCode::TOO_MANY_REQUESTS | StatusCode::PAYLOAD_TOO_LARGE
                );
                (answer, is_read)
            }
            Err(_none) => (Answer::busy("too many requests at a time"), false),
        },
    };
    // Who asks first whether to send the body at all isn't told to.
    if !is_read && !head.headers.contains_key(EXPECT) {
        body::discard(&mut body, shared.config.max_body_bytes).await;
    }
    answer
}

impl<J: Queue<Job>, O: Queue<Settled>> Shared<J, O> {
    /// Looks at the head of a request: refuses it, or says how its body is divided.
    fn admit(&self, headers: &HeaderMap) -> Result<Division, Box<Answer>> {
        if !self.is_authorized(headers) {
            let text = "expected `Authorization: Bearer` with this server's token";
            let refused = Answer::refused(StatusCode::UNAUTHORIZED, text);
            return Err(Box::new(refused.with_header(WWW_AUTHENTICATE, "Bearer")));
        }
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        if text(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
            let text = "expected a body without content-encoding";
            return Err(Box::new(Answer::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, text)));
        }
        let length = text(CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
        if length.is_some_and(|length| length > self.config.max_body_bytes) {
            return Err(Box::new(self.too_large()));
        }
        let media_type = text(CONTENT_TYPE).and_then(|full| full.split(';').next());
        let media_type = media_type.unwrap_or_default().trim().to_ascii_lowercase();
        let by_lines = matches!(
            media_type.rsplit('/').next().unwrap_or_default(),
            "x-ndjson" | "ndjson" | "jsonl" | "x-jsonl" | "jsonlines" | "x-jsonlines"
        );
        Ok(if by_lines { Division::Lines } else { Division::Values })
    }

    fn too_large(&self) -> Answer {
        let limit = self.config.max_body_bytes;
        let text = format!("expected a body of at most {limit} bytes, given a longer one");
        Answer::refused(StatusCode::PAYLOAD_TOO_LARGE, &text)
    }

    /// Publishes the queries of a body while it comes, and waits until the queue has them.
    async fn take(&self, body: &mut BodyDataStream, division: Division) -> Answer {
        let (feed, reader) = body::channel();
        let contexts = body_contexts(reader, division, self.retriever.clone(), (self.make_known)());
        let mut answer = Answer { num_answered: contexts.num_left_out(), ..Answer::default() };
        let (mut inbox, thread) = read_ahead(contexts, &self.publisher.budget);
        let limits = Limits {
            max_bytes: self.config.max_body_bytes,
            read_timeout: self.config.read_timeout,
        };
        let mut pump = std::pin::pin!(body::pump(body, feed, limits));
        let mut pumped = None;
        let mut in_flight = FuturesUnordered::new();
        let mut open = true;
        let mut moved = Instant::now();
        while open || !in_flight.is_empty() {
            tokio::select! {
                Some(put) = in_flight.next() => {
                    moved = Instant::now();
                    match put {
                        Ok(put) => answer.counts.add(put),
                        Err(error) => {
                            self.fail(error);
                            return answer.turned_away(StatusCode::SERVICE_UNAVAILABLE, "the queue failed");
                        }
                    }
                }
                entry = inbox.recv(), if open && in_flight.len() < self.publisher.window() => {
                    let Some(Entry { item, held }) = entry else {
                        open = false;
                        continue;
                    };
                    if let Some(context) = answer.look_at(item) {
                        if in_flight.is_empty() {
                            moved = Instant::now();
                        }
                        in_flight.push(self.publisher.put(context, held));
                    } else {
                        self.publisher.stats().add_rejected();
                    }
                }
                done = &mut pump, if pumped.is_none() => pumped = Some(done),
                // What is given up here may be stored all the same. The client sends it again,
                // and what is there already isn't stored twice.
                () = tokio::time::sleep_until(moved + self.config.full_timeout),
                    if !in_flight.is_empty() => return answer.full(self.config.full_timeout),
            }
        }
        match (thread.await, pumped) {
            (Err(panic), _) => {
                tracing::error!(error = %panic, "reading a body broke off");
                let text = "reading the body broke off";
                answer.turned_away(StatusCode::INTERNAL_SERVER_ERROR, text)
            }
            (Ok(()), Some(Err(refusal))) => answer.cut(refusal, self),
            (Ok(()), _) => answer.done(),
        }
    }
}

/// A bad record, as an answer names it.
#[derive(Debug, Serialize)]
struct BadRecord {
    line: u64,
    index: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    reason: String,
}

/// What a client is told. Whatever the status, `accepted` and `failed` are on the queue.
#[derive(Debug, Default, Serialize)]
struct Answer {
    #[serde(skip)]
    status: StatusCode,
    #[serde(skip)]
    header: Option<(HeaderName, &'static str)>,
    #[serde(skip)]
    counts: Published,
    #[serde(skip)]
    num_answered: Arc<AtomicU64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// Queries that are jobs on the queue.
    accepted: u64,
    /// Records left out since they have their line already.
    answered: u64,
    /// Of the accepted, queries whose id the queue had already: that job stays, whatever was asked now.
    already_queued: u64,
    /// Records with an id that became failed lines of the output.
    failed: u64,
    /// Records without one: they are nowhere but here.
    num_rejected: u64,
    rejected: Vec<BadRecord>,
    failures: Vec<BadRecord>,
}

impl Answer {
    fn refused(status: StatusCode, text: &str) -> Self {
        Self { status, error: Some(text.to_owned()), ..Self::default() }
    }

    fn busy(text: &str) -> Self {
        Self::refused(StatusCode::TOO_MANY_REQUESTS, text).with_header(RETRY_AFTER, RETRY_SECONDS)
    }

    fn with_header(self, name: HeaderName, value: &'static str) -> Self {
        Self { header: Some((name, value)), ..self }
    }

    /// Names a record if it is bad; what is to be published for it.
    fn look_at(&mut self, item: Result<Context, BadInput>) -> Option<Context> {
        let bad = match item {
            Ok(context) => return Some(context),
            Err(bad) => bad,
        };
        tracing::debug!(error = %bad, "bad record");
        let id = bad.id.as_ref().map(|id| id.0.clone());
        let record = BadRecord { line: bad.line, index: bad.index, id, reason: bad.reason.clone() };
        let named = if bad.id.is_some() { &mut self.failures } else { &mut self.rejected };
        if named.len() < MAX_NAMED {
            named.push(record);
        }
        let context = bad.into_context().ok();
        self.counts.rejected += u64::from(context.is_none());
        context
    }

    fn published(&self) -> Published {
        self.counts
    }

    fn num_answered(&self) -> u64 {
        self.num_answered.load(Ordering::Relaxed)
    }

    fn turned_away(self, status: StatusCode, text: &str) -> Self {
        Self { status, error: Some(text.to_owned()), ..self }
    }

    fn full(self, waited: Duration) -> Self {
        let text = format!(
            "the queue is full: it took nothing more for {waited:?}; send the same again later, \
             what is accepted is not taken twice"
        );
        self.turned_away(StatusCode::TOO_MANY_REQUESTS, &text)
            .with_header(RETRY_AFTER, RETRY_SECONDS)
    }

    /// The body ended too early.
    fn cut<J: Queue<Job>, O: Queue<Settled>>(self, why: Refusal, shared: &Shared<J, O>) -> Self {
        match why {
            Refusal::TooLarge => {
                let error = shared.too_large().error.unwrap_or_default();
                self.turned_away(StatusCode::PAYLOAD_TOO_LARGE, &error)
            }
            Refusal::TooSlow => {
                let text = "expected the rest of the body, given nothing for too long";
                self.turned_away(StatusCode::REQUEST_TIMEOUT, text)
            }
            Refusal::Broken => {
                let text = "expected a whole body, given one that broke off";
                self.turned_away(StatusCode::BAD_REQUEST, text)
            }
        }
    }

    /// The body was read to its end, and the queue has what was in it.
    fn done(self) -> Self {
        match self.counts {
            counts if counts.lines() + self.num_answered() > 0 => {
                Self { status: StatusCode::ACCEPTED, ..self }
            }
            Published { rejected: 0, .. } => {
                let text = "expected at least one query, given none";
                self.turned_away(StatusCode::BAD_REQUEST, text)
            }
            _ => self.turned_away(StatusCode::BAD_REQUEST, "no record of the body is a query"),
        }
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let (status, header) = (self.status, self.header.clone());
        let counted = Self {
            accepted: self.counts.jobs + self.counts.repeated,
            already_queued: self.counts.repeated,
            answered: self.num_answered(),
            failed: self.counts.failed,
            num_rejected: self.counts.rejected,
            ..self
        };
        let mut response = (status, Json(counted)).into_response();
        if let Some((name, value)) = header {
            response.headers_mut().insert(name, axum::http::HeaderValue::from_static(value));
        }
        response
    }
}
