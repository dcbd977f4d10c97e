//! Taking lines of failed jobs out of an output, so that the jobs can be tried again.
//!
//! The lines go to `<output>.retried.jsonl` first, synced; then a copy of the output without them
//! takes the output's name in one step. A crash before that step leaves the output as it was, and at
//! most lines kept twice in the file beside it. The copy is locked before it has the name, so
//! that no other process can come between; who waits for the lock of the old file finds
//! out that the name has moved on.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use shared::IdDigest;

use super::{CHUNK_BYTES, Output, beside, lock, name, sync_folder};
use crate::{Error, Position, Probe, Step};

/// How often lines were removed from the output at `path`, as a number that only grows: the
/// length of the file that keeps them.
pub(super) fn generation(path: &Path) -> std::io::Result<u64> {
    match std::fs::metadata(retried_path(path)) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// Removes a copy that a crash left unfinished. What stands in its way is told when the next one
/// is made.
pub(super) fn discard_unfinished(path: &Path) {
    let _absent = std::fs::remove_file(unfinished_path(path));
}

fn retried_path(path: &Path) -> PathBuf {
    beside(path, "retried.jsonl")
}

fn unfinished_path(path: &Path) -> PathBuf {
    beside(path, "unfinished")
}

/// A line to take out.
struct Removed {
    id: IdDigest,
    start: u64,
    end: u64,
}

impl Output {
    /// Takes the lines of failed jobs with these ids out; gives their ids.
    pub(super) fn take_out(
        &mut self,
        ids: &HashSet<IdDigest>,
        probe: &mut Probe,
    ) -> Result<Vec<IdDigest>, Error> {
        let removed = self.find_failed(ids)?;
        if removed.is_empty() {
            return Ok(Vec::new());
        }
        self.keep(&removed)?;
        probe.reached(Step::Kept)?;
        let (copy, length) = self.copy_without(&removed)?;
        probe.reached(Step::Rewritten)?;
        let replaced = std::fs::rename(unfinished_path(&self.real_path), &self.real_path)
            .and_then(|()| sync_folder(&self.real_path));
        replaced.map_err(|error| self.io("cannot replace", error))?;
        self.file = copy;
        self.end = length;
        self.generation =
            generation(&self.path).map_err(|error| self.io("cannot stat what is beside", error))?;
        probe.reached(Step::Replaced)?;
        Ok(removed.into_iter().map(|line| line.id).collect())
    }

    fn find_failed(&mut self, ids: &HashSet<IdDigest>) -> Result<Vec<Removed>, Error> {
        let mut found = Vec::new();
        let mut at = Position::default();
        while at.offset < self.end {
            let entries = self.read_entries(&at)?;
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                if entry.failed && ids.contains(&entry.id) {
                    found.push(Removed { id: entry.id, start: at.offset, end: entry.end });
                }
                at.offset = entry.end;
                at.lines += 1;
            }
        }
        Ok(found)
    }

    /// Appends the lines to the file beside the output, and syncs it.
    fn keep(&self, removed: &[Removed]) -> Result<(), Error> {
        let path = retried_path(&self.path);
        let io = |source| Error::Io { action: "cannot write", path: name(&path), source };
        let open = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let mut kept = open.map_err(io)?;
        // A crash may have torn the end: those lines never left the output.
        end_with_newline(&mut kept).map_err(io)?;
        for line in removed {
            let copied = copy_range(&self.file, &mut kept, line.start, line.end);
            copied.map_err(io)?;
        }
        kept.sync_all().and_then(|()| sync_folder(&path)).map_err(io)
    }

    /// A copy of the output without these lines, locked and on disk, and its length.
    fn copy_without(&self, removed: &[Removed]) -> Result<(File, u64), Error> {
        let path = unfinished_path(&self.real_path);
        let io = |source| Error::Io { action: "cannot write", path: name(&path), source };
        let _absent = std::fs::remove_file(&path);
        let open = OpenOptions::new().read(true).append(true).create_new(true).open(&path);
        let mut copy = open.map_err(io)?;
        lock::lock_new(&copy).map_err(io)?;
        let permissions = self.file.metadata().map_err(io)?.permissions();
        copy.set_permissions(permissions).map_err(io)?;
        let (mut start, mut length) = (0, 0);
        let ends = removed.iter().map(|line| (line.start, line.end)).chain([(self.end, self.end)]);
        for (end, next) in ends {
            copy_range(&self.file, &mut copy, start, end).map_err(io)?;
            length += end - start;
            start = next;
        }
        copy.sync_all().map_err(io)?;
        Ok((copy, length))
    }
}

fn copy_range(mut from: &File, to: &mut File, start: u64, end: u64) -> std::io::Result<()> {
    from.seek(SeekFrom::Start(start))?;
    let copied = std::io::copy(&mut from.take(end - start), to)?;
    if copied == end - start { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

/// Cuts what follows the last newline.
fn end_with_newline(file: &mut File) -> std::io::Result<()> {
    let length = file.metadata()?.len();
    let mut end = length;
    let mut block = vec![0; CHUNK_BYTES];
    while end > 0 {
        let size = end.min(CHUNK_BYTES as u64);
        let block = &mut block[..size as usize];
        file.read_exact_at(block, end - size)?;
        if let Some(newline) = block.iter().rposition(|&byte| byte == b'\n') {
            end = end - size + newline as u64 + 1;
            break;
        }
        end -= size;
    }
    if end < length { file.set_len(end).and_then(|()| file.flush()) } else { Ok(()) }
}
