//! A real nats-server with JetStream for a test: on loopback, its store in a temporary folder,
//! killed when dropped. It comes back to the same port with the same store.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::process::{DEADLINE, Process, free_port, with_failing_writes};

/// What differs from a plain server.
#[derive(Clone, Debug, Default)]
pub struct NatsOptions {
    /// Lines at the top level of its configuration, such as `authorization { … }` or `tls { … }`.
    pub config: String,
    /// Lines inside `jetstream { … }`, such as `sync_interval: always`.
    pub jetstream: String,
    /// Whether JetStream is switched off.
    pub no_jetstream: bool,
    /// What stands before `@` in its URL: `user:password`.
    pub credentials: Option<String>,
}

/// A running (or killed) nats-server.
pub struct NatsServer {
    dir: TempDir,
    options: NatsOptions,
    port: u16,
    process: Option<Process>,
}

impl NatsServer {
    /// A server that lets everybody in.
    pub fn start() -> Self {
        Self::start_with(NatsOptions::default())
    }

    /// A server with these options.
    pub fn start_with(options: NatsOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Self { dir, options, port: 0, process: None };
        // Somebody may take the port between the look and the start.
        for _ in 0..10 {
            server.port = free_port();
            if server.try_start() {
                return server;
            }
        }
        panic!("nats-server does not start\n{}", server.log());
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        self.url_at(self.address())
    }

    /// The URL of this server behind another address, such as a proxy's.
    pub fn url_at(&self, address: SocketAddr) -> String {
        match &self.options.credentials {
            Some(credentials) => format!("nats://{credentials}@{address}"),
            None => format!("nats://{address}"),
        }
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// Ends it at once, as a crash would. What it has stored stays.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    /// Ends it in good order.
    pub fn shut_down(&mut self) {
        if let Some(process) = self.process.take() {
            process.signal(Signal::TERM);
            process.wait(DEADLINE);
        }
    }

    /// Starts it again on its port with its store; kills it first if it runs.
    pub fn restart(&mut self) {
        self.kill();
        assert!(self.try_start(), "nats-server does not start again\n{}", self.log());
    }

    /// Starts it again with other options.
    pub fn restart_with(&mut self, options: NatsOptions) {
        self.options = options;
        self.restart();
    }

    /// Kills it and removes all that it stored.
    pub fn wipe(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.store()).unwrap();
    }

    /// Freezes it.
    pub fn stop(&self) {
        self.process().stop();
    }

    /// Lets it go on.
    pub fn cont(&self) {
        self.process().cont();
    }

    /// Keeps its folder beyond its end, for whoever looks for what went wrong.
    pub fn keep(&mut self) -> &Path {
        self.dir.disable_cleanup(true);
        self.dir.path()
    }

    /// Its process, which must run.
    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("the server was killed")
    }

    /// Where it stores its streams.
    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// A folder of its own, for certificates and keys.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its log since the last start.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Whether it is ready now.
    fn try_start(&mut self) -> bool {
        let file = self.dir.path().join("nats.conf");
        std::fs::write(&file, self.config()).unwrap();
        let process = Process::start(with_failing_writes("nats-server").arg("-c").arg(&file));
        let ready = process.has_line("Server is ready", 1, DEADLINE);
        self.process = Some(process);
        ready
    }

    fn config(&self) -> String {
        let mut text =
            format!("listen: {}\nmax_payload: 8MB\n{}\n", self.address(), self.options.config);
        if !self.options.no_jetstream {
            let store = self.store();
            let inside = &self.options.jetstream;
            // Only a bound for reservations: small disks would refuse the usual streams.
            let bound =
                if inside.contains("max_file_store") { "" } else { "max_file_store: 64GB\n" };
            writeln!(text, "jetstream {{\nstore_dir: {store:?}\n{bound}{inside}\n}}").unwrap();
        }
        text
    }
}
