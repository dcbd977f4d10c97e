//! What can be wrong with a fleet's server. Passing trouble is not here: it is waited out, except
//! where somebody waits for an answer ([`FleetError::Server`]).

use std::path::PathBuf;

use async_nats::jetstream;
use async_nats::jetstream::context::RequestError;
use thiserror::Error;

use crate::queue::QueueError;

/// Any error.
pub(super) type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why the fleet's server can't be used, or did not answer.
#[derive(Debug, Error)]
pub enum FleetError {
    /// The options don't fit together, or name no server.
    #[error("{0}")]
    Options(String),
    /// A file that the options name can't be used.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Source,
    },
    /// The server does not know these credentials.
    #[error("the NATS server at {url} refused the credentials")]
    Refused {
        /// The server, without secrets.
        url: String,
        /// What it said.
        #[source]
        source: Source,
    },
    /// There is no trust between the client and the server.
    #[error("no TLS with the NATS server at {url}")]
    Tls {
        /// The server, without secrets.
        url: String,
        /// Why.
        #[source]
        source: Source,
    },
    /// The server's version has known faults, or lacks what is needed.
    #[error("expected nats-server {needed} or later at {url}, found {found}")]
    TooOld {
        /// The server, without secrets.
        url: String,
        /// Its version.
        found: String,
        /// The first version that will do.
        needed: &'static str,
    },
    /// The server runs without JetStream, or this account may not use it.
    #[error(
        "JetStream is not available at {url}: expected `jetstream` in the server's configuration \
         and in this account's ({reason})"
    )]
    NoJetStream {
        /// The server, without secrets.
        url: String,
        /// What it said.
        reason: String,
    },
    /// A stream exists whose configuration would lose messages.
    #[error(
        "stream {stream}: expected {field} {expected}, found {found}; \
         correct the stream or remove it, and it is created again"
    )]
    Mismatch {
        /// The stream.
        stream: String,
        /// The field of its configuration.
        field: &'static str,
        /// What it has to be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The server has no room for a stream of the size asked for.
    #[error(
        "no room for stream {stream} of {wanted} bytes at {url}, where {reserved} bytes are reserved \
         already: raise max_file_store in the server's jetstream configuration, or lower the limits"
    )]
    NoRoom {
        /// The stream.
        stream: String,
        /// The server, without secrets.
        url: String,
        /// Bytes asked for.
        wanted: i64,
        /// Bytes that this account has reserved.
        reserved: u64,
    },
    /// Several servers shall keep each message, and there is one.
    #[error(
        "expected a cluster of at least {replicas} NATS servers at {url}, found a single server"
    )]
    NoCluster {
        /// The server, without secrets.
        url: String,
        /// Servers asked for.
        replicas: usize,
    },
    /// Nobody answers for this run.
    #[error("no collector of run '{run}' answers: expected one to be running")]
    NoCollector {
        /// The run.
        run: String,
    },
    /// It answered with an error, or not in time.
    #[error("the NATS server could not {what}")]
    Server {
        /// What was asked of it.
        what: String,
        /// What it said.
        #[source]
        source: Source,
    },
}

impl FleetError {
    /// Something that the server could not do now.
    pub(super) fn server(what: impl Into<String>, source: impl Into<Source>) -> Self {
        Self::Server { what: what.into(), source: source.into() }
    }

    /// Whether it may work a little later without anybody's help.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Server { .. })
    }
}

impl From<FleetError> for QueueError {
    fn from(error: FleetError) -> Self {
        Self::Server(Box::new(error))
    }
}

/// Why a request to the JetStream API came to nothing.
#[derive(Debug, Error)]
pub(super) enum ApiError {
    /// The server's answer is an error.
    #[error("{0}")]
    Answered(jetstream::Error),
    /// No answer.
    #[error("{0}")]
    Silent(RequestError),
}

impl ApiError {
    /// The server's own number of the error.
    pub(super) fn code(&self) -> Option<u64> {
        match self {
            Self::Answered(error) => Some(error.error_code().0),
            Self::Silent(_) => None,
        }
    }
}
