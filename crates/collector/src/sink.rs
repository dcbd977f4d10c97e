//! The output file: the truth about what is answered.
//!
//! One process owns it, by a lock that ends with the process. Opening repairs what a crash left
//! behind: a torn last line is cut off, its bytes kept beside the file. Lines are appended in one
//! write and synced before anybody calls them done.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::Deserialize;
use shared::{JobId, Outcome, Settled};

use crate::{Answered, Error, Line};

/// Longest line that opening an output accepts; a longer one isn't flotilla's.
const MAX_LINE_BYTES: u64 = 1 << 30;

/// An output file, open for appending, and the ids it holds.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    file: File,
    answered: Answered,
    num_failed: u64,
    buffer: Vec<u8>,
}

impl Output {
    /// Opens or creates the output at `path`, takes its lock, repairs its end and reads its ids.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let io = |action| move |source| Error::Io { action, path: name(path), source };
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(io("cannot open"))?;
        if !file.metadata().map_err(io("cannot stat"))?.is_file() {
            return Err(Error::NotAFile { path: name(path) });
        }
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Locked { path: name(path) }),
            Err(error) => return Err(io("cannot lock")(error.into())),
        }
        // The file's name must survive a power failure as its lines do.
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|f| f.sync_all()).map_err(io("cannot sync the folder of"))?;
        let answered = Answered::default();
        let mut output =
            Self { path: path.to_owned(), file, answered, num_failed: 0, buffer: Vec::new() };
        let whole = output.read_ids()?;
        output.cut_torn_tail(whole)?;
        Ok(output)
    }

    /// The ids that have their line.
    pub fn answered(&self) -> &Answered {
        &self.answered
    }

    /// Lines of jobs that failed.
    pub fn num_failed(&self) -> u64 {
        self.num_failed
    }

    /// Appends the lines of `outcomes`, waits until they are on disk, then marks their ids.
    ///
    /// After an error the end of the file is unknown: drop the output and open it anew.
    pub fn append(&mut self, outcomes: &[Settled]) -> Result<(), Error> {
        if outcomes.is_empty() {
            return Ok(());
        }
        self.buffer.clear();
        for settled in outcomes {
            let written = serde_json::to_writer(&mut self.buffer, &Line::from(settled));
            written.map_err(|error| self.io("cannot serialise a line of", error.into()))?;
            self.buffer.push(b'\n');
        }
        self.file.write_all(&self.buffer).map_err(|error| self.io("cannot write", error))?;
        self.file.sync_data().map_err(|error| self.io("cannot sync", error))?;
        for settled in outcomes {
            self.answered.mark(&settled.context.id);
            self.num_failed += u64::from(matches!(settled.outcome, Outcome::Failed(_)));
        }
        // One huge line shall not be kept for ever.
        self.buffer.shrink_to(1 << 20);
        Ok(())
    }

    /// Marks the id of every whole line; the length of the file up to the last newline.
    fn read_ids(&mut self) -> Result<u64, Error> {
        let mut reader = BufReader::with_capacity(1 << 20, &self.file);
        let (mut whole, mut number) = (0, 0);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
            let length = read.map_err(|error| self.io("cannot read", error))? as u64;
            if line.last() != Some(&b'\n') {
                if length == MAX_LINE_BYTES {
                    return Err(self.foreign(number + 1, "found one of over a gibibyte".into()));
                }
                if !may_be_torn(&line) {
                    return Err(self.foreign(number + 1, "found the start of another".into()));
                }
                return Ok(whole);
            }
            whole += length;
            number += 1;
            match serde_json::from_slice::<Identified>(&line) {
                Ok(Identified { id, success, .. }) => {
                    self.num_failed += u64::from(!success);
                    if !self.answered.mark(&id) {
                        return Err(self.foreign(number, format!("found id '{id}' again")));
                    }
                }
                Err(error) => return Err(self.foreign(number, format!("found another: {error}"))),
            }
        }
    }

    /// Cuts what follows the last newline, keeping it in a file beside the output.
    fn cut_torn_tail(&mut self, whole: u64) -> Result<(), Error> {
        let length = self.file.metadata().map_err(|error| self.io("cannot stat", error))?.len();
        if length == whole {
            return Ok(());
        }
        let torn_path = beside(&self.path, &format!("torn-{whole}"));
        self.file.seek(SeekFrom::Start(whole)).map_err(|error| self.io("cannot seek in", error))?;
        let copy = File::create(&torn_path).and_then(|mut torn| {
            std::io::copy(&mut self.file, &mut torn)?;
            torn.sync_all()
        });
        copy.map_err(|source| Error::Io {
            action: "cannot write",
            path: name(&torn_path),
            source,
        })?;
        let cut = self.file.set_len(whole).and_then(|()| self.file.sync_all());
        cut.map_err(|error| self.io("cannot cut the torn last line of", error))?;
        tracing::warn!(
            output = %self.path.display(),
            bytes = length - whole,
            kept_in = %torn_path.display(),
            "cut a torn last line that an earlier run left behind; its job is answered again"
        );
        Ok(())
    }

    fn io(&self, action: &'static str, source: std::io::Error) -> Error {
        Error::Io { action, path: name(&self.path), source }
    }

    fn foreign(&self, line: u64, reason: String) -> Error {
        Error::Foreign { path: name(&self.path), line, reason }
    }
}

/// What makes a line recognisable as one of ours.
#[derive(Deserialize)]
struct Identified {
    id: JobId,
    success: bool,
    #[expect(dead_code, reason = "contexts have an id and success too, only results have this")]
    worker_rank: u32,
}

/// Whether a crash can have left this at the end of one of our files: the beginning of a line, or
/// zeros that a file system had made room with.
fn may_be_torn(tail: &[u8]) -> bool {
    const START: &[u8] = b"{\"id\":\"";
    let common = tail.len().min(START.len());
    tail[..common] == START[..common] || tail.iter().all(|&byte| byte == 0)
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
