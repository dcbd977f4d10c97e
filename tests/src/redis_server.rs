//! A real redis-server for a test: on loopback and on a unix socket, append-only file in a
//! temporary folder, killed when dropped. It comes back to the same addresses with the same data.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::process::{DEADLINE, Process, free_port, with_failing_writes};

/// A running (or killed) redis-server.
pub struct RedisServer {
    dir: TempDir,
    /// More arguments, such as `--requirepass secret`.
    arguments: Vec<String>,
    port: u16,
    process: Option<Process>,
}

/// A server's data at an earlier time.
pub struct RedisCopy {
    dir: TempDir,
}

impl RedisServer {
    /// A server with the settings of a fleet.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// A server with more arguments, such as `["--requirepass", "secret"]`.
    pub fn start_with(arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let dir = tempfile::tempdir().unwrap();
        let mut server = Self { dir, arguments, port: 0, process: None };
        // Somebody may take the port between the look and the start.
        for _ in 0..10 {
            server.port = free_port();
            if server.try_start() {
                return server;
            }
        }
        panic!("redis-server does not start\n{}", server.log());
    }

    /// Its URL over TCP.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// Its URL over the unix socket.
    pub fn unix_url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// Its unix socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("redis.sock")
    }

    /// Ends it at once, as a crash would. What it has written to its file stays.
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

    /// Starts it again at its addresses with its data; kills it first if it runs.
    pub fn restart(&mut self) {
        self.kill();
        assert!(self.try_start(), "redis-server does not start again\n{}", self.log());
    }

    /// Kills it and removes its data.
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

    /// Forgets everything while it runs.
    pub fn flush_all(&self) {
        self.command(&["FLUSHALL"]);
    }

    /// Runs a command, which must succeed; the password of `--requirepass` is sent first.
    pub fn command(&self, words: &[&str]) -> redis::Value {
        let mut connection = redis::Client::open(self.url()).unwrap().get_connection().unwrap();
        if let Some(at) = self.arguments.iter().position(|argument| argument == "--requirepass") {
            redis::cmd("AUTH").arg(&self.arguments[at + 1]).exec(&mut connection).unwrap();
        }
        redis::cmd(words[0]).arg(&words[1..]).query(&mut connection).unwrap()
    }

    /// Copies its data as they are now: everything that it has replied to.
    pub fn copy(&self) -> RedisCopy {
        let dir = tempfile::tempdir().unwrap();
        // Frozen, so that no file changes in the middle.
        self.stop();
        copy_files(&self.data(), dir.path());
        self.cont();
        RedisCopy { dir }
    }

    /// Goes back to an older copy, as an operator's restore would: killed, replaced, started.
    pub fn restore(&mut self, copy: &RedisCopy) {
        self.wipe();
        copy_files(copy.dir.path(), &self.data());
        self.restart();
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

    /// Its output since the last start.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Whether it is ready now.
    fn try_start(&mut self) -> bool {
        std::fs::create_dir_all(self.data()).unwrap();
        let mut command = with_failing_writes("redis-server");
        command
            .args(["--bind", "127.0.0.1", "--port", &self.port.to_string()])
            .arg("--unixsocket")
            .arg(self.socket())
            .arg("--dir")
            .arg(self.data())
            .args(["--appendonly", "yes", "--appendfsync", "everysec", "--save", ""])
            .args(["--maxmemory-policy", "noeviction"])
            .args(&self.arguments);
        let process = Process::start(&mut command);
        let ready = process.has_line("eady to accept connections", 1, DEADLINE);
        self.process = Some(process);
        ready
    }
}

fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_files(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
