//! The output file: the truth about what is answered.
//!
//! One process owns it, by a lock that ends with the process (`output/lock.rs`). Opening repairs what
//! a crash left behind: a torn last line is cut off, its bytes kept beside the file, and the lines before it are
//! synced (`output/repair.rs`). Lines are appended in one write and synced before anybody calls them done.
//! Lines of failed jobs can be taken out again (`output/remove.rs`).

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use shared::{IdDigest, JobId};
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::{Entry, Error, Log, Position, Probe, log};

mod lock;
mod remove;
mod repair;

pub use lock::Lock;

/// Longest line that an output may have; a longer one isn't flotilla's.
const MAX_LINE_BYTES: usize = 1 << 30;
/// Read at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Most lines read at a time: an index takes them in one go.
const MAX_CHUNK_LINES: usize = 4096;
/// How much of the file's end a seal is made of.
const SEALED_BYTES: u64 = 4096;

/// An output file, locked and repaired, open for appending.
#[derive(Debug)]
pub struct Output {
    /// As the user named it.
    path: PathBuf,
    /// Where it really is, links followed.
    real_path: PathBuf,
    file: File,
    /// Bytes of whole lines on disk.
    end: u64,
    /// Bytes appended and not yet synced.
    unsynced: u64,
    /// Counts how often lines were removed: the length of the file that keeps them.
    generation: u64,
    buffer: Vec<u8>,
}

impl Output {
    /// Opens or creates the output at `path`, takes its lock and repairs its end.
    pub async fn open(path: &Path, lock: Lock) -> Result<Self, Error> {
        let (file, real_path) = lock::acquire(path, lock).await?;
        blocking(|| {
            let io = |action| move |source| Error::Io { action, path: name(path), source };
            // The file's name must survive a power failure as its lines do.
            sync_folder(path).map_err(io("cannot sync the folder of"))?;
            let end = repair::cut_torn_tail(path, &file)?;
            repair::write_end_again(path, &file, end)?;
            let generation = remove::generation(path).map_err(io("cannot stat what is beside"))?;
            remove::discard_unfinished(path);
            let path = path.to_owned();
            Ok(Self { path, real_path, file, end, unsynced: 0, generation, buffer: Vec::new() })
        })
    }

    /// The output, as the user named it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn read_entries(&mut self, from: &Position) -> Result<Vec<Entry>, Error> {
        let left = usize::try_from(self.end - from.offset).unwrap_or(usize::MAX);
        let mut want = CHUNK_BYTES.min(left);
        loop {
            self.buffer.resize(want, 0);
            self.file
                .read_exact_at(&mut self.buffer, from.offset)
                .map_err(|error| self.io("cannot read", error))?;
            let entries = self.parse(from)?;
            if !entries.is_empty() || want == left {
                // One huge line shall not be kept for ever.
                self.buffer.truncate(CHUNK_BYTES);
                self.buffer.shrink_to(CHUNK_BYTES);
                return Ok(entries);
            }
            if want > MAX_LINE_BYTES {
                let reason = "found one of over a gibibyte".to_owned();
                return Err(foreign(&self.path, from.lines + 1, reason));
            }
            want = want.saturating_mul(2).min(left);
        }
    }

    /// The whole lines in the buffer, which was read at `from`.
    fn parse(&self, from: &Position) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        let mut end = from.offset;
        for line in self.buffer.split_inclusive(|&byte| byte == b'\n').take(MAX_CHUNK_LINES) {
            if line.last() != Some(&b'\n') {
                break;
            }
            end += line.len() as u64;
            let number = from.lines + entries.len() as u64 + 1;
            let found = Identified::read(line);
            let Identified { id, success, attempts, .. } =
                found.map_err(|reason| foreign(&self.path, number, reason))?;
            let (failed, of_bad_input) = (!success, !success && attempts == Some(0));
            entries.push(Entry { id: id.digest(), failed, of_bad_input, end });
        }
        Ok(entries)
    }

    fn seal_of(&self, offset: u64) -> Result<Option<u64>, Error> {
        if offset > self.end {
            return Ok(None);
        }
        let sealed = SEALED_BYTES.min(offset);
        let mut tail = vec![0; sealed as usize];
        let read = self.file.read_exact_at(&mut tail, offset - sealed);
        read.map_err(|error| self.io("cannot read", error))?;
        if tail.last().is_some_and(|&byte| byte != b'\n') {
            return Ok(None);
        }
        Ok(Some(log::seal(self.generation, &tail)))
    }

    fn io(&self, action: &'static str, source: std::io::Error) -> Error {
        Error::Io { action, path: name(&self.path), source }
    }
}

impl Log for Output {
    fn name(&self) -> String {
        name(&self.path)
    }

    fn end(&self) -> u64 {
        self.end
    }

    async fn read(&mut self, from: &Position) -> Result<Vec<Entry>, Error> {
        blocking(|| self.read_entries(from))
    }

    async fn seal(&mut self, offset: u64) -> Result<Option<u64>, Error> {
        blocking(|| self.seal_of(offset))
    }

    async fn append(&mut self, lines: &[u8]) -> Result<(), Error> {
        blocking(|| self.file.write_all(lines)).map_err(|error| self.io("cannot write", error))?;
        self.unsynced += lines.len() as u64;
        Ok(())
    }

    async fn sync(&mut self) -> Result<(), Error> {
        blocking(|| self.file.sync_data()).map_err(|error| self.io("cannot sync", error))?;
        self.end += std::mem::take(&mut self.unsynced);
        Ok(())
    }

    async fn remove_failed(
        &mut self,
        ids: &HashSet<IdDigest>,
        probe: &mut Probe,
    ) -> Result<Vec<IdDigest>, Error> {
        blocking(|| self.take_out(ids, probe))
    }
}

/// What makes a line recognisable as one of ours.
#[derive(Deserialize)]
struct Identified {
    id: JobId,
    success: bool,
    /// Deliveries that the job took: none where it never was one.
    attempts: Option<u32>,
    #[expect(dead_code, reason = "contexts have an id and success too, only results have this")]
    worker_rank: u32,
}

impl Identified {
    fn read(line: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(line).map_err(|error| format!("found another: {error}"))
    }
}

/// Does what may take long without holding up the other tasks of this thread.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

fn foreign(path: &Path, line: u64, reason: String) -> Error {
    Error::Foreign { path: name(path), line, reason }
}

fn sync_folder(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

/// `results.jsonl` → `results.jsonl.<suffix>`.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}
