//! What these tests share: two servers and a folder, and the roles as processes.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use flotilla_tests::Workplace;
use flotilla_tests::nats_server::NatsServer;
use flotilla_tests::process::{DEADLINE, Process};
use flotilla_tests::redis_server::RedisServer;
use serde_json::Value;

/// Seconds that a silent role keeps what it holds, in these tests.
pub(crate) const LEASE: &str = "--lease 2";

/// Two servers and a folder.
pub(crate) struct Fleet {
    pub(crate) nats: NatsServer,
    pub(crate) redis: RedisServer,
    pub(crate) place: Workplace,
}

impl Fleet {
    /// Servers with nothing in them.
    pub(crate) fn start() -> Self {
        Self { nats: NatsServer::start(), redis: RedisServer::start(), place: Workplace::new() }
    }

    /// Starts the program with `args`, connected to the NATS server.
    pub(crate) fn spawn(&self, args: &str) -> Process {
        self.spawn_at(&self.nats.url(), args)
    }

    /// Starts the program with `args`, connected to `url`.
    pub(crate) fn spawn_at(&self, url: &str, args: &str) -> Process {
        let mut command = self.place.command(args);
        command.arg("--verbose").env("FLOTILLA_NATS_URL", url);
        Process::start(&mut command)
    }

    /// Runs the program to its end, which must be with `code`; what it wrote.
    pub(crate) fn run(&self, code: i32, args: &str) -> String {
        let process = self.spawn(args);
        let status = process.wait(DEADLINE);
        assert_eq!(status.code(), Some(code), "flotilla {args}\n{}", process.log());
        process.log()
    }

    /// Publishes the queries of `queries.jsonl` for the no-op workers.
    pub(crate) fn produce(&self, more: &str) -> String {
        self.run(0, &format!("produce --queries-file queries.jsonl --run r {more}"))
    }

    /// A worker that answers without a model.
    pub(crate) fn noop(&self, more: &str) -> Process {
        let worker = self.spawn(&format!("work --backend noop {LEASE} {more}"));
        worker.wait_for("worker is ready", 1);
        worker
    }

    /// A collector of run `r` with Redis.
    pub(crate) fn collect(&self, more: &str) -> Process {
        let redis = self.redis.url();
        self.spawn(&format!(
            "collect --run r --output-file results.jsonl --redis-url {redis} {LEASE} {more}"
        ))
    }

    /// Waits for the collector that ends by itself, and checks the output: `q0` to `q<count - 1>`,
    /// each once and answered.
    pub(crate) fn assert_done(&self, collector: &Process, count: usize) {
        let status = collector.wait(DEADLINE);
        assert_eq!(status.code(), Some(0), "{}", collector.log());
        self.place.assert_each_once("results.jsonl", count);
        assert!(self.place.lines("results.jsonl").iter().all(|line| line["success"] == true));
    }

    /// The state of the fleet.
    pub(crate) fn status(&self) -> Value {
        let output = self
            .place
            .command("status --json")
            .env("FLOTILLA_NATS_URL", self.nats.url())
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{log}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Looks at the state of the fleet until it is as expected.
    pub(crate) fn wait_for(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let state = self.status();
            if is_so(&state) {
                return state;
            }
            assert!(Instant::now() < deadline, "waiting for {what}: {state:#}");
        }
    }

    /// Ids of the output's lines, none twice.
    pub(crate) fn ids(&self) -> BTreeSet<String> {
        let lines = self.place.lines("results.jsonl");
        let ids: BTreeSet<String> =
            lines.iter().map(|line| line["id"].as_str().unwrap().to_owned()).collect();
        assert_eq!(ids.len(), lines.len(), "an id has two lines");
        ids
    }
}

/// The run of that name.
pub(crate) fn run<'a>(state: &'a Value, name: &str) -> &'a Value {
    let runs = state["runs"].as_array().unwrap();
    runs.iter().find(|run| run["run"] == name).unwrap_or(&Value::Null)
}

/// What a role answers to `GET path` at its metrics' address.
pub(crate) fn get(role: &Process, path: &str) -> String {
    role.wait_for("metrics at http://", 1);
    let log = role.log();
    let address = log.split_once("metrics at http://").unwrap().1.split('/').next().unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: flotilla\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
