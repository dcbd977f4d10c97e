//! A child process of a test: its output kept, signals, waiting for a line or the end with a
//! deadline. Killed when dropped. Works in plain and in async tests: its waits block the thread.
//! Not the program itself, which [`Workplace`](crate::Workplace) starts; not the servers' settings.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, kill_process, prlimit, waitid,
};

/// Long enough for anything that will happen at all.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A child process. Its stdout and stderr are kept as lines.
pub struct Process {
    name: String,
    pid: Pid,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Something in `state` changed.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: Vec<String>,
    /// Output streams that may still bring lines.
    open_streams: usize,
    status: Option<ExitStatus>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

impl Process {
    /// Starts `command`, which must exist, with nothing on its stdin.
    pub fn start(command: &mut Command) -> Self {
        let name = Path::new(command.get_program()).file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        let shared = Arc::new(Shared::default());
        shared.lock().open_streams = 2;
        read_lines(child.stdout.take().unwrap(), &shared);
        read_lines(child.stderr.take().unwrap(), &shared);
        let pid = Pid::from_child(&child);
        reap_at_end(child, &shared);
        Self { name, pid, shared }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a signal, if it still runs.
    pub fn signal(&self, signal: Signal) {
        let state = self.shared.lock();
        // It is reaped under the same lock, so that this pid is still its own.
        if state.status.is_none() {
            let _ended_already = kill_process(self.pid, signal);
        }
    }

    /// Ends it at once, as a crash would, and waits until it is gone.
    pub fn kill(&self) -> ExitStatus {
        self.signal(Signal::KILL);
        self.wait(DEADLINE)
    }

    /// Freezes it.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn cont(&self) {
        self.signal(Signal::CONT);
    }

    /// Lets it write no file beyond `bytes`, as if its disk were full; or any size again. A program
    /// dies of such a write where [`with_failing_writes`] has not started it.
    pub fn limit_file_size(&self, bytes: Option<u64>) {
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(Some(self.pid), Resource::Fsize, limit).unwrap();
    }

    /// Whether it has this file open now.
    pub fn has_open(&self, file: &Path) -> bool {
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.pid()));
        let mut open = open.into_iter().flatten().flatten();
        open.any(|entry| std::fs::read_link(entry.path()).is_ok_and(|link| link == file))
    }

    /// Whether it has not ended yet.
    pub fn is_running(&self) -> bool {
        self.status().is_none()
    }

    /// How it ended, if it has.
    pub fn status(&self) -> Option<ExitStatus> {
        self.shared.lock().status
    }

    /// Waits for its end and the rest of its output; how it ended.
    pub fn wait(&self, limit: Duration) -> ExitStatus {
        let ended = |state: &State| state.status.filter(|_| state.open_streams == 0);
        self.wait_until(limit, ended)
            .unwrap_or_else(|| panic!("{} did not end within {limit:?}\n{}", self.name, self.log()))
    }

    /// Waits for the `count`-th line of its output that contains `text`; whether it came before
    /// the end of the output or of `limit`.
    pub fn has_line(&self, text: &str, count: usize, limit: Duration) -> bool {
        let found = |state: &State| {
            let found = state.lines.iter().filter(|line| line.contains(text)).count() >= count;
            (found || state.open_streams == 0).then_some(found)
        };
        self.wait_until(limit, found).unwrap_or(false)
    }

    /// Waits for the `count`-th line that contains `text`, which must come.
    pub fn wait_for(&self, text: &str, count: usize) {
        let found = self.has_line(text, count, DEADLINE);
        assert!(found, "{}: no line {count} with '{text}'\n{}", self.name, self.log());
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        self.shared.lock().lines.join("\n")
    }

    /// How many lines contain `text` so far.
    pub fn count(&self, text: &str) -> usize {
        self.shared.lock().lines.iter().filter(|line| line.contains(text)).count()
    }

    fn wait_until<R>(&self, limit: Duration, ready: impl Fn(&State) -> Option<R>) -> Option<R> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        loop {
            if let Some(result) = ready(&state) {
                return Some(result);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self.shared.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        // Gone before its folder is removed. Its output may stay open in a grandchild.
        self.wait_until(DEADLINE, |state| state.status);
    }
}

fn read_lines(stream: impl Read + Send + 'static, shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(length) if length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            shared.change(|state| state.lines.push(text));
            line.clear();
        }
        shared.change(|state| state.open_streams -= 1);
    });
}

fn reap_at_end(mut child: Child, shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        let pid = Pid::from_child(&child);
        let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while waitid(WaitId::Pid(pid), ended).is_err_and(|e| e == rustix::io::Errno::INTR) {}
        shared.change(|state| {
            let lost = ExitStatus::from_raw(Signal::KILL.as_raw());
            state.status = Some(child.wait().unwrap_or(lost));
        });
    });
}

/// A program's command. A write beyond a limit of the file size fails in it, as on a full disk, and
/// doesn't kill it.
pub fn with_failing_writes(program: &Path) -> Command {
    let mut command = Command::new("bash");
    command.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(program);
    command
}

/// A server's binary: where `scripts/servers.sh` puts it, or on `PATH`.
pub fn server_binary(name: &str) -> PathBuf {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty());
    let cache = cache.map(PathBuf::from).or_else(home);
    let fetched = cache.into_iter().map(|dir| dir.join("flotilla/bin"));
    let path: OsString = std::env::var_os("PATH").unwrap_or_default();
    fetched
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{name} was not found: run scripts/servers.sh"))
}

/// A loopback port that nobody listens on, outside the range that outgoing connections use, so
/// that a server can come back to it.
pub fn free_port() -> u16 {
    loop {
        let port = rand::random_range(10_000..32_000);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
