//! A file that somebody goes on writing, read as `tail -F` reads it.
//!
//! A [`Follow`] gives one [`Tail`] after another: each reads one file to the end that it has come
//! to, which is when another file took its name, when it was truncated, when nothing came for too
//! long, or at a shutdown. So lines are numbered by file, and what is left of a file without a
//! last line end is a line of that file and not glued to the next one.
//!
//! What can't be seen: a file that is truncated and has grown beyond where reading stood between
//! two looks, and one that is there only between two looks.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

/// Between two looks at a file that had nothing new.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The files that bear one name, one after another.
pub(super) struct Follow {
    path: PathBuf,
    patience: Patience,
    /// How the last file ended.
    ended: Option<Arc<OnceLock<End>>>,
}

/// How long to wait for more.
#[derive(Clone)]
struct Patience {
    idle_timeout: Option<Duration>,
    shutdown: CancellationToken,
}

/// How reading a file ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Another file has its name.
    Replaced,
    /// It is shorter than what was read of it.
    Truncated,
    /// Nothing came for too long.
    Idle,
    Shutdown,
}

impl Follow {
    pub(super) fn new(
        path: PathBuf,
        idle_timeout: Option<Duration>,
        shutdown: CancellationToken,
    ) -> Self {
        Self { path, patience: Patience { idle_timeout, shutdown }, ended: None }
    }

    pub(super) fn is_shut_down(&self) -> bool {
        self.patience.shutdown.is_cancelled()
    }

    /// Waits for the next file; `None` when no more are wanted.
    pub(super) fn next(&mut self) -> Option<Tail> {
        let ended = self.ended.as_ref().and_then(|ended| ended.get());
        match ended {
            Some(End::Idle | End::Shutdown) => return None,
            Some(End::Truncated) => {
                tracing::warn!("{} was truncated; reading it anew", self.path.display());
            }
            Some(End::Replaced) => {
                tracing::info!("{} is another file now; reading on there", self.path.display());
            }
            None => {}
        }
        let mut pause = self.patience.pause();
        let mut told = false;
        loop {
            match open(&self.path) {
                Ok((file, metadata)) => {
                    let ended = Arc::new(OnceLock::new());
                    self.ended = Some(Arc::clone(&ended));
                    return Some(Tail {
                        path: self.path.clone(),
                        file,
                        identity: identity(&metadata),
                        position: 0,
                        patience: self.patience.clone(),
                        ended,
                    });
                }
                Err(error) if !told => {
                    tracing::warn!(%error, "waiting for {}", self.path.display());
                    told = true;
                }
                Err(_still) => {}
            }
            if pause.wait().is_some() {
                return None;
            }
        }
    }
}

/// Opens a regular file; anything else might never be opened, or never end.
fn open(path: &Path) -> io::Result<(File, Metadata)> {
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("expected a regular file to follow"));
    }
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    Ok((file, metadata))
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Reads one file. Waits at its end, so that a reader sees an end only where there is one.
pub(super) struct Tail {
    path: PathBuf,
    file: File,
    identity: (u64, u64),
    /// Bytes read.
    position: u64,
    patience: Patience,
    /// Written here, read by [`Follow`].
    ended: Arc<OnceLock<End>>,
}

impl Read for Tail {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut pause = self.patience.pause();
        let mut replaced = false;
        while self.ended.get().is_none() {
            let num_bytes = self.file.read(buffer)?;
            if num_bytes > 0 {
                self.position += num_bytes as u64;
                return Ok(num_bytes);
            }
            let end = if replaced {
                Some(End::Replaced)
            } else if self.file.metadata()?.len() < self.position {
                Some(End::Truncated)
            } else if self.has_successor() {
                // What was written here before the writer turned to the other file comes first.
                replaced = true;
                continue;
            } else {
                pause.wait()
            };
            if let Some(end) = end {
                // Nobody else writes it.
                let _first = self.ended.set(end);
            }
        }
        Ok(0)
    }
}

impl Tail {
    /// Whether another file has the name, with something in it. While that is empty its writer
    /// may still be writing here.
    fn has_successor(&self) -> bool {
        self.path.metadata().is_ok_and(|metadata| {
            identity(&metadata) != self.identity && metadata.is_file() && metadata.len() > 0
        })
    }
}

impl Patience {
    fn pause(&self) -> Pause<'_> {
        Pause { patience: self, since: None }
    }
}

/// A time without anything new.
struct Pause<'p> {
    patience: &'p Patience,
    since: Option<Instant>,
}

impl Pause<'_> {
    /// Waits until it is time for another look, or says why there shall be none.
    fn wait(&mut self) -> Option<End> {
        let passed = self.since.get_or_insert_with(Instant::now).elapsed();
        let left = match self.patience.idle_timeout {
            Some(timeout) if passed >= timeout => return Some(End::Idle),
            Some(timeout) => timeout - passed,
            None => POLL_INTERVAL,
        };
        let shut_down = is_cancelled_within(&self.patience.shutdown, left.min(POLL_INTERVAL));
        shut_down.then_some(End::Shutdown)
    }
}

/// Waits for a cancellation on a thread without a runtime.
fn is_cancelled_within(token: &CancellationToken, timeout: Duration) -> bool {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut cancelled = pin!(token.cancelled());
    // Registered before the wait, so that one that comes in between ends it.
    if cancelled.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
        return true;
    }
    std::thread::park_timeout(timeout);
    token.is_cancelled()
}

#[cfg(test)]
mod tests;
