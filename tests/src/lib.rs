//! What the end-to-end tests share: the real program, as a user runs it, in a folder of its own,
//! and the real servers, with a bad network before them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step is a failed test")]

pub mod chaos;
pub mod nats_server;
pub mod outsider;
pub mod process;
pub mod proxy;
pub mod redis_server;
pub mod server;

pub use nats_server::{NatsCluster, NatsOptions, NatsServer};
pub use outsider::Outsider;
pub use process::Process;
pub use proxy::{Flow, Proxy};
pub use redis_server::{RedisCopy, RedisServer};

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// The folder of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent").to_owned()
}

/// The program: cargo builds it, before the tests of its package, into the folder above theirs.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let tests = std::env::current_exe().expect("a running test has a path");
        let built = tests.ancestors().nth(2).expect("tests lie in <profile>/deps");
        let program = built.join("flotilla");
        assert!(program.is_file(), "{} is not built", program.display());
        program
    })
}

/// A folder with a user's files, removed at the end.
pub struct Workplace {
    dir: TempDir,
}

impl Workplace {
    /// An empty folder.
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// The path of `name` in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// The text of a file.
    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// The lines of a JSONL file.
    pub fn lines(&self, name: &str) -> Vec<Value> {
        self.read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The program with `args` (split at spaces), in this folder, with a cache of its own.
    pub fn command(&self, args: &str) -> Command {
        let mut command = Command::new(program());
        command
            .args(args.split_whitespace())
            .current_dir(self.dir.path())
            .env("FLOTILLA_CACHE_DIR", self.path("cache"))
            .env("FLOTILLA_MODEL_PATH", repository().join("models/flotilla-reader"))
            .env_remove("FLOTILLA_LOG")
            // Neither the user's models nor their token; and never the real Hub.
            .env("HF_HOME", self.path("hf"))
            .env("HF_ENDPOINT", "http://127.0.0.1:9")
            .env_remove("HF_TOKEN")
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_HUB_OFFLINE")
            .stdin(Stdio::null());
        command
    }

    /// Runs the program to its end.
    pub fn run(&self, args: &str) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs the program to its end, which must be with `code`; what it wrote to stderr.
    pub fn run_expecting(&self, code: i32, args: &str) -> String {
        let output = self.run(args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "flotilla {args}\n{stderr}");
        stderr
    }

    /// Starts the program, with a log line for each job.
    pub fn start(&self, args: &str) -> Running {
        let mut command = self.command(args);
        command.arg("--verbose").stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Running { child, log }
    }

    /// `count` queries about the examples, as JSONL.
    pub fn write_queries(&self, name: &str, count: usize) {
        let lines: Vec<String> = (0..count)
            .map(|n| format!(r#"{{"id":"q{n}","query":"What is number {n}?"}}"#))
            .collect();
        self.write(name, lines.join("\n"));
    }

    /// Asserts that `name` holds exactly the ids `q0` to `q<count - 1>`, each once.
    pub fn assert_each_once(&self, name: &str, count: usize) {
        let ids: Vec<String> =
            self.lines(name).iter().map(|l| l["id"].as_str().unwrap().to_owned()).collect();
        let distinct: BTreeSet<&String> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len(), "an id has two lines");
        let expected: BTreeSet<String> = (0..count).map(|n| format!("q{n}")).collect();
        assert_eq!(distinct, expected.iter().collect::<BTreeSet<_>>());
    }
}

impl Default for Workplace {
    fn default() -> Self {
        Self::new()
    }
}

/// The program while it runs. Killed when dropped.
pub struct Running {
    child: Child,
    log: BufReader<ChildStderr>,
}

impl Running {
    /// Waits for the `count`-th log line that contains `text`; whether it came before the end.
    pub fn wait_for(&mut self, text: &str, count: usize) -> bool {
        let mut found = 0;
        let mut line = String::new();
        while found < count {
            line.clear();
            if self.log.read_line(&mut line).unwrap() == 0 {
                return false;
            }
            found += usize::from(line.contains(text));
        }
        true
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }

    /// Waits for the end; how it ended and the rest of its log.
    pub fn wait(mut self) -> (ExitStatus, String) {
        let mut rest = String::new();
        while self.log.read_line(&mut rest).unwrap() > 0 {}
        (self.child.wait().unwrap(), rest)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
