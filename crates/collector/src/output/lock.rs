//! The output's lock: one process writes it, others are refused or wait.
//!
//! The lock belongs to an open file, not to a name. Removing failed lines gives the name to
//! another file, so whoever gets a lock looks whether the name still means the file it locked.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use tokio_util::sync::CancellationToken;

use super::name;
use crate::Error;

/// What to do about an output that another process writes.
#[derive(Clone, Debug)]
pub enum Lock {
    /// Fail.
    Refuse,
    /// Wait until it lets go, or until this is cancelled.
    Wait(CancellationToken),
}

/// Opens or creates the file at `path` and locks it; the file, and its path with links followed.
pub(super) async fn acquire(path: &Path, lock: Lock) -> Result<(File, PathBuf), Error> {
    let io = |action| move |source| Error::Io { action, path: name(path), source };
    let mut told = false;
    loop {
        let open = OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = open.map_err(io("cannot open"))?;
        if !file.metadata().map_err(io("cannot stat"))?.is_file() {
            return Err(Error::NotAFile { path: name(path) });
        }
        let file = match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => file,
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let Lock::Wait(shutdown) = &lock else {
                    return Err(Error::Locked { path: name(path) });
                };
                if !told {
                    tracing::info!(
                        output = %path.display(),
                        "another process writes the output: waiting for its lock"
                    );
                    told = true;
                }
                let locked = tokio::select! {
                    locked = wait_for(file) => locked,
                    () = shutdown.cancelled() => {
                        return Err(Error::Interrupted { path: name(path) });
                    }
                };
                locked.map_err(io("cannot lock"))?
            }
            Err(error) => return Err(io("cannot lock")(error.into())),
        };
        match std::fs::canonicalize(path) {
            Ok(real_path) if is_at(&file, &real_path) => {
                if told {
                    tracing::info!(output = %path.display(), "the lock is free: taking over");
                }
                return Ok((file, real_path));
            }
            // Renamed over, or removed, while this process waited for it.
            Ok(_other) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(io("cannot resolve")(error)),
        }
    }
}

/// Takes the lock of `file` as soon as it is free.
///
/// A thread of its own waits in the kernel, so that nobody has to ask again and again. It can't
/// be called off: if nobody wants the lock any more, the thread lets go of it at once.
async fn wait_for(file: File) -> std::io::Result<File> {
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("output-lock".into()).spawn(move || {
        let locked = loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other,
            }
        };
        // Dropping the file unlocks it.
        let _unwanted = tell.send(locked.map(|()| file));
    })?;
    match told.await {
        Ok(locked) => Ok(locked?),
        Err(_gone) => Err(std::io::Error::other("the thread that waited for the lock is gone")),
    }
}

/// Locks a file that nobody else can have open yet.
pub(super) fn lock_new(file: &File) -> std::io::Result<()> {
    Ok(rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

/// Whether `path` leads to this very file.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}
