//! A server under test, and a client of it that sends what it is told to, byte by byte.

use std::net::SocketAddr;

use flotilla_producer::{ListenConfig, ListenError, Published, Publisher, Server};
use serde_json::Value;
use shared::{Job, Settled};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::gate::Gate;
use crate::{soon, template};

/// A server over two gates.
pub(crate) struct Listening {
    pub(crate) addr: SocketAddr,
    pub(crate) jobs: Gate<Job>,
    pub(crate) outcomes: Gate<Settled>,
    pub(crate) shutdown: CancellationToken,
    server: JoinHandle<Result<Published, ListenError>>,
}

/// Settings of a server on any port of this machine.
pub(crate) fn config() -> ListenConfig {
    ListenConfig::new(([127, 0, 0, 1], 0).into(), None)
}

impl Listening {
    pub(crate) async fn start(config: ListenConfig, jobs: Gate<Job>) -> Self {
        let outcomes = Gate::open();
        let server = Server::bind(config).await.unwrap();
        let addr = server.local_addr();
        let shutdown = CancellationToken::new();
        let publisher = Publisher::new(template(), (jobs.clone(), outcomes.clone()));
        let server = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { server.run(publisher, None, &shutdown).await }
        });
        Self { addr, jobs, outcomes, shutdown, server }
    }

    pub(crate) async fn open() -> Self {
        Self::start(config(), Gate::open()).await
    }

    pub(crate) async fn connect(&self) -> Connection {
        Connection(soon(TcpStream::connect(self.addr)).await.unwrap())
    }

    /// Posts a body, without a word on what it is.
    pub(crate) async fn post(&self, body: impl AsRef<[u8]>) -> Answer {
        self.post_with("", body).await
    }

    /// Posts a body with more header lines.
    pub(crate) async fn post_with(&self, headers: &str, body: impl AsRef<[u8]>) -> Answer {
        let body = body.as_ref();
        let mut connection = self.connect().await;
        connection.send(head(&format!("{headers}Content-Length: {}\r\n", body.len()))).await;
        connection.send(body).await;
        connection.answer().await
    }

    /// Waits until the server has ended.
    pub(crate) async fn ended(self) -> Result<Published, ListenError> {
        soon(self.server).await.unwrap()
    }

    pub(crate) async fn stop(self) -> Published {
        self.shutdown.cancel();
        self.ended().await.unwrap()
    }
}

/// The head of a post.
pub(crate) fn head(headers: &str) -> String {
    format!("POST /v1/queries HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{headers}\r\n")
}

/// One piece of a chunked body.
pub(crate) fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

pub(crate) struct Connection(TcpStream);

impl Connection {
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        soon(self.0.write_all(bytes.as_ref())).await.unwrap();
    }

    /// Waits until the server says something.
    pub(crate) async fn until_answered(&self) {
        self.0.readable().await.unwrap();
    }

    /// Whatever comes until the server closes the connection.
    pub(crate) async fn rest(mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A reset after the answer is as good as an end.
        let _end = soon(self.0.read_to_end(&mut bytes)).await;
        bytes
    }

    pub(crate) async fn answer(self) -> Answer {
        let text = String::from_utf8(self.rest().await).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").expect(&text);
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = serde_json::from_str(body).unwrap_or(Value::String(body.to_owned()));
        Answer { status, head: head.to_ascii_lowercase(), body }
    }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Status line and headers, in lower case.
    pub(crate) head: String,
    pub(crate) body: Value,
}

impl Answer {
    /// Status, and how much was accepted, failed and rejected.
    pub(crate) fn counts(&self) -> (u16, u64, u64, u64) {
        let count = |name: &str| self.body[name].as_u64().unwrap();
        (self.status, count("accepted"), count("failed"), count("num_rejected"))
    }

    pub(crate) fn error(&self) -> &str {
        self.body["error"].as_str().unwrap()
    }
}
