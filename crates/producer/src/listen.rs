//! Queries over HTTP: `POST /v1/queries` with one query, an array or JSON lines; `GET /healthz`.
//!
//! An answer of 202 means that everything it counts is as durable as the queue makes it, and every
//! answer, whatever its status, says how much that is: the same body sent again adds nothing but
//! the rest. This file is the server: its limits, connections and end. A request is
//! [`request`]'s, its body [`body`]'s. There is no TLS here: put a proxy in front of it.

use std::fmt;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use shared::{Job, JobId, Queue, QueueError, Settled};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::known::Known;
use crate::publish::{Published, Publisher};
use crate::retrieve::Retriever;

mod body;
mod request;

use request::{MakeKnown, Shared};

/// Before another try to accept a connection, when there was none to be had.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where to listen, and what a client may ask for.
#[derive(Clone)]
pub struct ListenConfig {
    /// The address; port 0 takes any.
    pub addr: SocketAddr,
    /// What a client must send as `Authorization: Bearer …`, without the spaces round it; needed
    /// beyond this machine.
    pub token: Option<String>,
    /// Longest body.
    pub max_body_bytes: u64,
    /// Requests that are worked on at a time; more are answered 429.
    pub max_requests: usize,
    /// Connections at a time; more wait to be accepted.
    pub max_connections: usize,
    /// How long a client may keep the server waiting: for a whole head, for the next piece of a
    /// body.
    pub read_timeout: Duration,
    /// How long a full queue may take nothing until the client is told to come back, 429.
    pub full_timeout: Duration,
    /// How long a shutdown waits for the requests in hand.
    pub drain_timeout: Duration,
}

impl ListenConfig {
    /// The usual limits.
    pub fn new(addr: SocketAddr, token: Option<String>) -> Self {
        Self {
            addr,
            token,
            max_body_bytes: 64 << 20,
            max_requests: 16,
            max_connections: 512,
            read_timeout: Duration::from_secs(10),
            full_timeout: Duration::from_secs(2),
            drain_timeout: Duration::from_secs(30),
        }
    }

    /// Checks what can't be meant.
    pub fn validate(&self) -> Result<(), Error> {
        let text = match &self.token {
            Some(token) if token.trim().is_empty() => {
                "expected a token to listen with, given an empty one".to_owned()
            }
            None if !self.addr.ip().is_loopback() => {
                format!("expected a token to listen on {} with, given none", self.addr)
            }
            _ => return Ok(()),
        };
        Err(Error::Config(text))
    }
}

impl fmt::Debug for ListenConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        f.debug_struct("ListenConfig")
            .field("addr", &self.addr)
            .field("token", &token)
            .field("max_body_bytes", &self.max_body_bytes)
            .finish_non_exhaustive()
    }
}

/// Why the server ended without being told to. What it answered 202 to stays published.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The settings can't be meant.
    #[error(transparent)]
    Config(#[from] Error),
    /// The address can't be had.
    #[error("cannot listen on {addr}")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A queue failed.
    #[error("cannot publish a job")]
    Queue(#[from] QueueError),
}

/// A server that has its address and takes no requests yet.
pub struct Server {
    config: ListenConfig,
    listener: TcpListener,
    local_addr: SocketAddr,
    make_known: MakeKnown,
}

impl Server {
    /// Takes the address. Without a token only a loopback one.
    pub async fn bind(config: ListenConfig) -> Result<Self, ListenError> {
        config.validate()?;
        let addr = config.addr;
        let bind = |source| ListenError::Bind { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(bind)?;
        let local_addr = listener.local_addr().map_err(bind)?;
        let make_known: MakeKnown = Box::new(|| Box::new(|_: &JobId| false));
        Ok(Self { config, listener, local_addr, make_known })
    }

    /// The address, with the port that it got.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Leaves out what `known` knows: an answer counts it, and it costs nothing else.
    pub fn leaving_out(self, known: impl Known + Clone + Sync + 'static) -> Self {
        Self { make_known: Box::new(move || Box::new(known.clone())), ..self }
    }

    /// Takes queries until `shutdown`, then finishes the requests in hand.
    ///
    /// Contexts come from `retriever`, and are empty without one.
    pub async fn run<J: Queue<Job>, O: Queue<Settled>>(
        self,
        publisher: Publisher<J, O>,
        retriever: Option<Arc<Retriever>>,
        shutdown: &CancellationToken,
    ) -> Result<Published, ListenError> {
        let Self { config, listener, make_known, .. } = self;
        let drain_timeout = config.drain_timeout;
        let accepting = Accepting {
            listener,
            slots: Arc::new(Semaphore::new(config.max_connections)),
            read_timeout: config.read_timeout,
            end: shutdown.child_token(),
        };
        let shared = Arc::new(Shared::new(
            config,
            publisher,
            (retriever, make_known),
            accepting.end.clone(),
        ));
        let mut connections = JoinSet::new();
        accepting.run(&request::router(Arc::clone(&shared)), &mut connections).await;
        let draining = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(drain_timeout, draining).await.is_err() {
            tracing::warn!("{} requests are cut off by the shutdown", connections.len());
            connections.shutdown().await;
        }
        Ok(shared.finish()?)
    }
}

/// Accepts connections until its end.
struct Accepting {
    listener: TcpListener,
    slots: Arc<Semaphore>,
    read_timeout: Duration,
    end: CancellationToken,
}

impl Accepting {
    /// Closes the listener when it returns.
    async fn run(self, router: &Router, connections: &mut JoinSet<()>) {
        while let Some(accepted) = self.end.run_until_cancelled(self.accept()).await {
            while connections.try_join_next().is_some() {}
            match accepted {
                Ok((stream, slot)) => {
                    let router = router.clone();
                    let end = self.end.clone();
                    connections.spawn(serve(stream, router, (self.read_timeout, end), slot));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    self.end.run_until_cancelled(tokio::time::sleep(ACCEPT_PAUSE)).await;
                }
            }
        }
    }

    async fn accept(&self) -> std::io::Result<(TcpStream, OwnedSemaphorePermit)> {
        let slots = Arc::clone(&self.slots);
        let slot = slots.acquire_owned().await.map_err(std::io::Error::other)?;
        let (stream, _) = self.listener.accept().await?;
        Ok((stream, slot))
    }
}

/// Serves one connection until it is closed; after `end`, until its request is answered.
async fn serve(
    stream: TcpStream,
    router: Router,
    (read_timeout, end): (Duration, CancellationToken),
    _slot: OwnedSemaphorePermit,
) {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(read_timeout);
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let served = match end.run_until_cancelled(connection.as_mut()).await {
        Some(served) => served,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection broke off");
    }
}
