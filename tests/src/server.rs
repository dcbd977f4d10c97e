//! A real server for a test: on loopback, its data in a temporary folder, killed when dropped. It comes
//! back to the same port with the same data. What it runs is `nats_server.rs`' and `redis_server.rs`' business.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::process::{DEADLINE, Process, free_port, server_binary, with_failing_writes};

/// What makes a server the one it is.
pub trait Settings {
    /// Its program.
    const PROGRAM: &str;
    /// What it says when it is ready.
    const READY: &str;

    /// The arguments of its next start, at `address`. Files go into `dir`, its data into `dir/data`.
    fn arguments(&self, command: &mut Command, dir: &Path, address: SocketAddr);
}

/// A running (or killed) server.
pub struct Server<S> {
    dir: TempDir,
    pub(crate) settings: S,
    port: u16,
    process: Option<Process>,
}

impl<S: Settings> Server<S> {
    /// A server with these settings, at a free port.
    pub(crate) fn launch(settings: S) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Self { dir, settings, port: 0, process: None };
        // Somebody may take the port between the look and the start.
        for _ in 0..10 {
            server.port = free_port();
            if server.try_start() {
                return server;
            }
        }
        panic!("{} does not start\n{}", S::PROGRAM, server.log());
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

    /// Starts it again at its address with its data; kills it first if it runs.
    pub fn restart(&mut self) {
        self.kill();
        assert!(self.try_start(), "{} does not start again\n{}", S::PROGRAM, self.log());
    }

    /// Kills it and removes all that it stored.
    pub fn wipe(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.data()).unwrap();
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

    /// A folder of its own, for certificates and keys.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where it stores what it is given.
    pub fn data(&self) -> PathBuf {
        self.dir().join("data")
    }

    /// Its log since the last start.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Whether it is ready now.
    fn try_start(&mut self) -> bool {
        std::fs::create_dir_all(self.data()).unwrap();
        let mut command = with_failing_writes(&server_binary(S::PROGRAM));
        self.settings.arguments(&mut command, self.dir(), self.address());
        let process = Process::start(&mut command);
        let ready = process.has_line(S::READY, 1, DEADLINE);
        self.process = Some(process);
        ready
    }
}
