//! The streams: created where they are missing, read back and compared always, since a server
//! ignores what it doesn't know and an operator may have made them otherwise.

use std::time::Duration;

use async_nats::jetstream::account::Account;
use async_nats::jetstream::context::RequestErrorKind;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::error::ApiError;
use super::{DEAD, FleetError, JOBS, RESULTS, Shared};

/// Covers a publisher's own retry. The server keeps some 110 bytes for every id of that time, twice
/// that with what its garbage collector leaves lying: at 16,000 jobs/s 100 MB for each half minute.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(30);
/// How long connecting waits for a JetStream that starts up.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two tries.
const RETRY_DELAY: Duration = Duration::from_millis(250);
/// Many publishers notice missing streams at once; one look is enough.
const REPAIR_INTERVAL: Duration = Duration::from_secs(1);

/// The body of a request that asks for nothing in particular: `{}`.
#[derive(Serialize)]
pub(super) struct Nothing {}

/// Numbers of the server's errors.
pub(super) mod code {
    /// The account has no JetStream.
    pub(in super::super) const NOT_ENABLED_FOR_ACCOUNT: u64 = 10039;
    /// The sum of the streams' sizes is above the server's.
    pub(in super::super) const NO_ROOM: u64 = 10047;
    /// A message above the stream's or the server's limit.
    pub(in super::super) const MESSAGE_TOO_LARGE: u64 = 10054;
    /// No such consumer.
    pub(in super::super) const CONSUMER_NOT_FOUND: u64 = 10014;
    /// No such message.
    pub(in super::super) const NO_MESSAGE: u64 = 10037;
    /// A message could not be deleted: it is gone, or something is wrong.
    pub(in super::super) const NOT_DELETED: u64 = 10057;
    /// Somebody else has created it meanwhile.
    pub(in super::super) const NAME_IN_USE: u64 = 10058;
    /// No such stream.
    pub(in super::super) const STREAM_NOT_FOUND: u64 = 10059;
    /// Another stream has some of these subjects.
    pub(in super::super) const SUBJECTS_OVERLAP: u64 = 10065;
    /// More than one replica, of a server that is alone.
    pub(in super::super) const NO_CLUSTER: u64 = 10074;
    /// The server runs without JetStream.
    pub(in super::super) const NOT_ENABLED: u64 = 10076;
    /// It could not be stored: the stream is full, or the disk is.
    pub(in super::super) const NOT_STORED: u64 = 10077;
}

impl Shared {
    /// A request to the JetStream API.
    pub(super) async fn api<T: DeserializeOwned>(
        &self,
        subject: String,
        body: &(impl Serialize + Sync),
    ) -> Result<T, ApiError> {
        match self.jetstream.request(subject, body).await {
            Ok(Response::Ok(answer)) => Ok(answer),
            Ok(Response::Err { error }) => Err(ApiError::Answered(error)),
            Err(error) => Err(ApiError::Silent(error)),
        }
    }

    /// Makes sure of JetStream and the streams; waits a while for a server that starts up.
    pub(super) async fn ensure_usable(&self) -> Result<(), FleetError> {
        if !self.client.server_info().jetstream {
            let reason = "it is switched off".to_owned();
            return Err(FleetError::NoJetStream { url: self.url.clone(), reason });
        }
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            match self.ensure_streams().await {
                Ok(_) => return Ok(()),
                Err(error) if error.is_passing() && Instant::now() < deadline => {
                    tracing::debug!(%error, "waiting for JetStream");
                }
                Err(error) => return Err(error),
            }
            tokio::time::sleep(RETRY_DELAY).await;
        }
    }

    /// The streams again, after something was missing. Fails only if waiting doesn't help.
    pub(super) async fn repair(&self) -> Result<(), FleetError> {
        let mut repaired = self.repaired.lock().await;
        if repaired.is_some_and(|at| at.elapsed() < REPAIR_INTERVAL) {
            return Ok(());
        }
        let done = self.ensure_streams().await;
        *repaired = Some(Instant::now());
        match done {
            Ok(0) => Ok(()),
            Ok(_) => {
                tracing::error!(
                    "streams were missing and are created again, empty: what they held is gone; \
                     `flotilla reconcile` puts it back"
                );
                Ok(())
            }
            Err(error) if error.is_passing() => {
                tracing::debug!(%error, "cannot look after the streams now");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// How many had to be created.
    async fn ensure_streams(&self) -> Result<usize, FleetError> {
        self.account().await?;
        let mut created = 0;
        for wanted in self.streams() {
            created += usize::from(self.ensure_stream(&wanted).await?);
        }
        Ok(created)
    }

    async fn account(&self) -> Result<Account, FleetError> {
        self.api("INFO".to_owned(), &Nothing {}).await.map_err(|error| match &error {
            _ if matches!(
                error.code(),
                Some(code::NOT_ENABLED | code::NOT_ENABLED_FOR_ACCOUNT)
            ) =>
            {
                FleetError::NoJetStream { url: self.url.clone(), reason: error.to_string() }
            }
            _ => FleetError::server("tell about JetStream", error),
        })
    }

    /// Whether it had to be created.
    async fn ensure_stream(&self, wanted: &Config) -> Result<bool, FleetError> {
        let name = &wanted.name;
        let info = |found: Result<Info, ApiError>| {
            found.map_err(|error| FleetError::server(format!("tell about stream {name}"), error))
        };
        match self.api(format!("STREAM.INFO.{name}"), &Nothing {}).await {
            Err(error) if error.code() == Some(code::STREAM_NOT_FOUND) => {}
            found => {
                let found = info(found)?;
                compare(wanted, &found.config)?;
                self.raise_replicas(&found).await;
                return Ok(false);
            }
        }
        let created = self.api::<Info>(format!("STREAM.CREATE.{name}"), wanted).await;
        let is_new = created.is_ok();
        match created {
            Ok(_) => {}
            Err(error) if error.code() == Some(code::NAME_IN_USE) => {}
            Err(error) => return Err(self.not_created(wanted, error).await),
        }
        let found = info(self.api(format!("STREAM.INFO.{name}"), &Nothing {}).await)?;
        compare(wanted, &found.config)?;
        self.raise_replicas(&found).await;
        Ok(is_new)
    }

    /// Has more servers keep a stream, where that is asked for. Never fewer: others may have asked.
    pub(super) async fn raise_replicas(&self, found: &Info) {
        let (config, replicas) = (&found.config, self.limits.replicas);
        if config.num_replicas.max(1) >= replicas {
            return;
        }
        let (stream, wanted) = (&config.name, Config { num_replicas: replicas, ..config.clone() });
        // A server that is alone would accept it, and keep one copy. Its cluster has no name.
        if found.cluster.as_ref().is_none_or(|cluster| cluster.name.is_none()) {
            tracing::warn!(
                stream,
                "expected {replicas} servers to keep this stream, found a server that is alone"
            );
            return;
        }
        match self.api::<Info>(format!("STREAM.UPDATE.{stream}"), &wanted).await {
            Ok(_) => tracing::info!(stream, "{replicas} servers keep this stream from now on"),
            Err(error) => tracing::warn!(
                stream,
                %error,
                "expected {replicas} servers to keep this stream, found {}",
                config.num_replicas.max(1)
            ),
        }
    }

    async fn not_created(&self, wanted: &Config, error: ApiError) -> FleetError {
        let stream = wanted.name.clone();
        match error.code() {
            Some(code::NO_ROOM) => {
                let reserved = self.account().await.map_or(0, |account| account.reserved_storage);
                let (url, wanted) = (self.url.clone(), wanted.max_bytes);
                FleetError::NoRoom { stream, url, wanted, reserved }
            }
            Some(code::NO_CLUSTER) => {
                FleetError::NoCluster { url: self.url.clone(), replicas: wanted.num_replicas }
            }
            Some(code::SUBJECTS_OVERLAP) => FleetError::Mismatch {
                stream,
                field: "subjects of its own,",
                expected: wanted.subjects.join(" "),
                found: "them in another stream".to_owned(),
            },
            _ => FleetError::server(format!("create stream {stream}"), error),
        }
    }

    /// The streams as they are created.
    fn streams(&self) -> [Config; 3] {
        let limits = &self.limits;
        let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let stream = |name: &str, subject: &str| Config {
            name: name.to_owned(),
            subjects: vec![subject.to_owned()],
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            storage: StorageType::File,
            max_messages: limits.max_jobs.unwrap_or(-1),
            max_messages_per_subject: -1,
            max_consumers: -1,
            num_replicas: limits.replicas.max(1),
            duplicate_window: DUPLICATE_WINDOW,
            ..Config::default()
        };
        [
            Config { max_bytes: bytes(limits.jobs_bytes), ..stream(JOBS, "flotilla.jobs.*.*") },
            Config {
                max_bytes: bytes(limits.results_bytes),
                ..stream(RESULTS, "flotilla.results.*")
            },
            Config {
                max_bytes: bytes(limits.dead_bytes),
                max_messages: -1,
                // Kept to be looked at, until they are put back.
                retention: RetentionPolicy::Limits,
                ..stream(DEAD, "flotilla.dead.*")
            },
        ]
    }
}

/// What must be as it is created is; what only bounds it may differ.
fn compare(wanted: &Config, found: &Config) -> Result<(), FleetError> {
    let same = |field, expected: String, found: String| {
        if expected == found {
            return Ok(());
        }
        Err(FleetError::Mismatch { stream: wanted.name.clone(), field, expected, found })
    };
    let sorted = |config: &Config| {
        let mut subjects = config.subjects.clone();
        subjects.sort_unstable();
        subjects.join(" ")
    };
    let text = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    same("subjects", sorted(wanted), sorted(found))?;
    same("retention", text(&wanted.retention), text(&found.retention))?;
    same("discard policy", text(&wanted.discard), text(&found.discard))?;
    same("storage", text(&wanted.storage), text(&found.storage))?;
    same("max age", text(&wanted.max_age), text(&found.max_age))?;
    same("no_ack", text(&wanted.no_ack), text(&found.no_ack))?;
    same("sealed", text(&wanted.sealed), text(&found.sealed))?;
    same(
        "messages a subject",
        wanted.max_messages_per_subject.max(-1).to_string(),
        if found.max_messages_per_subject <= 0 { -1 } else { found.max_messages_per_subject }
            .to_string(),
    )?;
    let bounds =
        |config: &Config| (config.max_bytes, config.max_messages.max(-1), config.duplicate_window);
    if bounds(wanted) != bounds(found) {
        tracing::info!(
            stream = wanted.name,
            "the stream's own limits hold: {} bytes, {} messages",
            found.max_bytes,
            found.max_messages
        );
    }
    Ok(())
}

/// Whether the API has nothing there: no responder, as when JetStream is just starting.
pub(super) fn is_absent(error: &ApiError) -> bool {
    matches!(error, ApiError::Silent(error) if error.kind() == RequestErrorKind::NoResponders)
}
