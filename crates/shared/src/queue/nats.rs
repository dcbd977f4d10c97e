//! The queue of a fleet: NATS JetStream, and what the roles tell one another through the same server.
//!
//! Three streams of the whole fleet: jobs by model and run, outcomes by run, dead letters by run. A
//! [`Fleet`] is the connection; [`Fleet::jobs`] and [`Fleet::outcomes`] are queues as any other. The
//! files below `nats/` are its parts; `async_nats` is named nowhere else.
//!
//! Passing trouble (a lost connection, a server that starts again, a full stream, streams that were
//! wiped) is waited out inside and logged once in a while. Exactly-once is the collector's business.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, jetstream};
use tokio::sync::Mutex;

use crate::message::{Job, RunId, Settled};
use crate::token;

mod connect;
mod control;
mod dead;
mod delivery;
mod error;
mod forgotten;
mod handover;
mod known;
mod publish;
mod pull;
mod queue;
mod records;
mod streams;

pub use control::ControlRequest;
pub use dead::DeadLetter;
pub use delivery::NatsDelivery;
pub use error::FleetError;
pub use known::{KnownRequest, MAX_ASKED};
pub use queue::NatsQueue;
pub use records::ConsumerStatus;

use connect::Link;
use publish::Notices;

/// Stream of the jobs.
const JOBS: &str = "FLOTILLA_JOBS";
/// Stream of the outcomes.
const RESULTS: &str = "FLOTILLA_RESULTS";
/// Stream of what was rejected.
const DEAD: &str = "FLOTILLA_DEAD";
/// Bucket of what the roles tell about themselves.
const STATUS: &str = "flotilla-status";

/// Default of [`Fleet::with_lease`].
const LEASE: Duration = Duration::from_secs(60);
/// Longest wait for one answer of the server; after it the request is made again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How to reach the server.
#[derive(Clone, Default)]
pub struct NatsConfig {
    /// `nats://user:password@host:4222` or `tls://…`; several servers of a cluster with commas between.
    pub url: String,
    /// Credentials file: a user's JWT and nkey.
    pub creds_file: Option<PathBuf>,
    /// File with the seed of an nkey.
    pub nkey_file: Option<PathBuf>,
    /// Certificates that may sign the server's, instead of those of the system.
    pub tls_ca: Option<PathBuf>,
    /// Certificate of this client.
    pub tls_cert: Option<PathBuf>,
    /// Key of this client.
    pub tls_key: Option<PathBuf>,
}

impl fmt::Debug for NatsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsConfig")
            .field("url", &connect::redacted(&self.url))
            .field("creds_file", &self.creds_file)
            .field("nkey_file", &self.nkey_file)
            .field("tls_ca", &self.tls_ca)
            .field("tls_cert", &self.tls_cert)
            .field("tls_key", &self.tls_key)
            .finish()
    }
}

/// How large the streams may become, for those that this program creates.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of jobs; full, publishing waits.
    pub jobs_bytes: u64,
    /// Bytes of outcomes; full, workers wait.
    pub results_bytes: u64,
    /// Bytes of dead letters; full, rejecting waits.
    pub dead_bytes: u64,
    /// Number of jobs, and of outcomes.
    pub max_jobs: Option<i64>,
    /// Servers of a cluster that keep each message: also of streams that exist, if these have fewer.
    pub replicas: usize,
}

impl Default for Limits {
    fn default() -> Self {
        const GIB: u64 = 1 << 30;
        Self {
            jobs_bytes: 8 * GIB,
            results_bytes: 8 * GIB,
            dead_bytes: 2 * GIB,
            max_jobs: None,
            replicas: 1,
        }
    }
}

/// A connection to the server of a fleet, with its streams. Clones share the connection.
#[derive(Clone)]
pub struct Fleet {
    shared: Arc<Shared>,
    lease: Duration,
    worker: Option<Arc<str>>,
}

/// What all handles of one connection share.
struct Shared {
    client: Client,
    jetstream: jetstream::Context,
    link: Link,
    limits: Limits,
    /// The server's URL, without secrets.
    url: String,
    notices: Notices,
    /// When the streams were last looked after; one look at a time.
    repaired: Mutex<Option<tokio::time::Instant>>,
    bucket: Mutex<Option<jetstream::kv::Store>>,
}

impl Fleet {
    /// Connects, and makes sure of the streams. Waits for a server that is not there yet; wrong
    /// credentials, an old server and badly configured streams are errors at once.
    pub async fn connect(config: &NatsConfig) -> Result<Self, FleetError> {
        Self::connect_with(config, Limits::default()).await
    }

    /// The same, with these limits for streams that are missing.
    pub async fn connect_with(config: &NatsConfig, limits: Limits) -> Result<Self, FleetError> {
        let (client, link) = connect::connect(config).await?;
        let mut jetstream = jetstream::new(client.clone());
        jetstream.set_timeout(ANSWER_TIMEOUT);
        let shared = Shared {
            client,
            jetstream,
            link,
            limits,
            url: connect::redacted(&config.url),
            notices: Notices::default(),
            repaired: Mutex::new(None),
            bucket: Mutex::new(None),
        };
        shared.ensure_usable().await?;
        Ok(Self { shared: Arc::new(shared), lease: LEASE, worker: None })
    }

    /// How long a delivery stays its holder's without a sign of life. A consumer that exists keeps
    /// a longer one, since its other holders count on it; [`lease`](super::Delivery::lease) tells.
    pub fn with_lease(self, lease: Duration) -> Self {
        Self { lease, ..self }
    }

    /// How long a delivery stays its holder's without a sign of life, unless its consumer has more.
    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// The name that dead letters carry.
    pub fn with_worker(self, name: &str) -> Self {
        Self { worker: Some(name.into()), ..self }
    }

    /// The jobs of a model, of all runs.
    pub fn jobs(&self, model: &str) -> NatsQueue<Job> {
        NatsQueue::jobs(self, model)
    }

    /// The outcomes. With a run, those of this run are pulled; without one nothing can be pulled.
    /// An outcome goes to its own run whichever it was.
    pub fn outcomes(&self, run: Option<&RunId>) -> NatsQueue<Settled> {
        NatsQueue::outcomes(self, run)
    }
}

/// Subject of a model's jobs of one run.
fn job_subject(model_token: &str, run: &RunId) -> String {
    format!("flotilla.jobs.{model_token}.{}", token::encode(&run.0))
}

/// Subject of a run's outcomes.
fn outcome_subject(run: &RunId) -> String {
    format!("flotilla.results.{}", token::encode(&run.0))
}

/// Subject of a run's dead letters.
fn dead_subject(run_token: &str) -> String {
    format!("flotilla.dead.{run_token}")
}

/// The last token of a subject, which is the run's in all of ours.
fn run_token(subject: &str) -> &str {
    subject.rsplit('.').next().unwrap_or(subject)
}
