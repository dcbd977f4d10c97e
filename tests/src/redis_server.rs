//! A real redis-server for a test: on loopback and on a unix socket, with an append-only file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::server::{Server, Settings};

/// A running (or killed) redis-server.
pub type RedisServer = Server<RedisOptions>;

/// What differs from a server with the settings of a fleet.
#[derive(Clone, Debug, Default)]
pub struct RedisOptions {
    /// More arguments, such as `--requirepass secret`.
    arguments: Vec<String>,
}

/// Name of the unix socket in the server's folder.
const SOCKET: &str = "redis.sock";

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
        Self::launch(RedisOptions { arguments })
    }

    /// Its URL over TCP.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// Its URL over the unix socket.
    pub fn unix_url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// Its unix socket.
    pub fn socket(&self) -> PathBuf {
        self.dir().join(SOCKET)
    }

    /// Forgets everything while it runs.
    pub fn flush_all(&self) {
        self.command(&["FLUSHALL"]);
    }

    /// Runs a command, which must succeed; the password of `--requirepass` is sent first.
    pub fn command(&self, words: &[&str]) -> redis::Value {
        let mut connection = redis::Client::open(self.url()).unwrap().get_connection().unwrap();
        if let Some(at) =
            self.settings.arguments.iter().position(|argument| argument == "--requirepass")
        {
            redis::cmd("AUTH").arg(&self.settings.arguments[at + 1]).exec(&mut connection).unwrap();
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
}

impl Settings for RedisOptions {
    const PROGRAM: &str = "redis-server";
    const READY: &str = "eady to accept connections";

    fn arguments(&self, command: &mut Command, dir: &Path, address: SocketAddr) {
        command
            .args(["--bind", "127.0.0.1", "--port", &address.port().to_string()])
            .arg("--unixsocket")
            .arg(dir.join(SOCKET))
            .arg("--dir")
            .arg(dir.join("data"))
            .args(["--appendonly", "yes", "--appendfsync", "everysec", "--save", ""])
            .args(["--maxmemory-policy", "noeviction"])
            .args(&self.arguments);
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
