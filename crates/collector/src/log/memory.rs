//! A log in memory with a disk that crashes: for tests of what the collector promises.
//!
//! The disk outlives the collectors that have it open, as a file does. What is appended and not
//! yet synced survives a crash in part, cut at any byte. What a sync has failed for is still read, and no later
//! sync brings it to the disk: only what is written again gets there.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use shared::{IdDigest, JobId};

use super::{Entry, Log};
use crate::serve::MAX_BATCH;
use crate::{Error, Position, Probe, Step};

/// A disk with one file. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub struct Disk(Arc<Mutex<Content>>);

#[derive(Debug, Default)]
struct Content {
    bytes: Vec<u8>,
    /// Bytes that no crash takes.
    synced: usize,
    /// Whether what was unsynced at a failed sync is taken for written.
    forsaken: bool,
    retried: Vec<u8>,
    failing_syncs: bool,
    lying_syncs: bool,
}

#[derive(Deserialize)]
struct IdAndSuccess {
    id: JobId,
    success: bool,
    attempts: Option<u32>,
}

impl Disk {
    /// Opens the log, as [`Output::open`](crate::Output::open) does: what follows the last newline is cut,
    /// a batch's lines before it are written again, and all of it is synced, which never fails here.
    pub fn open(&self) -> MemoryLog {
        let mut content = self.content();
        let mut newlines = (0..content.bytes.len()).rev().filter(|&at| content.bytes[at] == b'\n');
        let whole = newlines.next().map_or(0, |at| at + 1);
        let written_again = newlines.nth(MAX_BATCH - 1).map_or(0, |at| at + 1);
        content.bytes.truncate(whole);
        content.synced = content.synced.min(whole);
        if written_again <= content.synced {
            content.forsaken = false;
        }
        content.sync();
        let end = whole as u64;
        drop(content);
        MemoryLog { disk: self.clone(), end }
    }

    /// The power fails: of what isn't synced, `keep(its length)` bytes survive.
    pub fn crash(&self, keep: impl FnOnce(usize) -> usize) {
        let mut content = self.content();
        let unsynced = content.bytes.len() - content.synced;
        let kept = content.synced + keep(unsynced).min(unsynced);
        content.bytes.truncate(kept);
        content.forsaken &= content.synced < kept;
    }

    /// A sync fails: what is unsynced now is taken for written, and isn't.
    pub fn forsake_unsynced(&self) {
        let mut content = self.content();
        content.forsaken |= content.synced < content.bytes.len();
    }

    /// Whether syncs fail from now on.
    pub fn fail_syncs(&self, fail: bool) {
        self.content().failing_syncs = fail;
    }

    /// Whether syncs do nothing from now on and say that they have: to see that it is noticed.
    pub fn lie_about_syncs(&self, lie: bool) {
        self.content().lying_syncs = lie;
    }

    /// The ids of its whole lines, and whether each failed.
    pub fn lines(&self) -> Vec<(String, bool)> {
        lines(&self.content().bytes)
    }

    /// The ids of the lines that no crash takes.
    pub fn synced_lines(&self) -> Vec<String> {
        let content = self.content();
        lines(&content.bytes[..content.synced]).into_iter().map(|(id, _failed)| id).collect()
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content {
    /// A sync that works: for all that isn't taken for written.
    fn sync(&mut self) {
        if !self.forsaken {
            self.synced = self.bytes.len();
        }
    }
}

fn lines(bytes: &[u8]) -> Vec<(String, bool)> {
    let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let parsed = lines.filter_map(|line| serde_json::from_slice::<IdAndSuccess>(line).ok());
    parsed.map(|line| (line.id.0, !line.success)).collect()
}

/// The open log.
#[derive(Debug)]
pub struct MemoryLog {
    disk: Disk,
    end: u64,
}

impl MemoryLog {
    fn entries(&self, from: u64, max: usize) -> Vec<Entry> {
        let content = self.disk.content();
        let mut end = from as usize;
        let mut entries = Vec::new();
        for line in content.bytes[end..self.end as usize].split_inclusive(|&b| b == b'\n').take(max)
        {
            end += line.len();
            if let Ok(line) = serde_json::from_slice::<IdAndSuccess>(line) {
                entries.push(Entry {
                    id: line.id.digest(),
                    failed: !line.success,
                    of_bad_input: !line.success && line.attempts == Some(0),
                    end: end as u64,
                });
            }
        }
        entries
    }
}

impl Log for MemoryLog {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    fn end(&self) -> u64 {
        self.end
    }

    async fn read(&mut self, from: &Position) -> Result<Vec<Entry>, Error> {
        // Few at a time, so that a crash between two reads is tested too.
        Ok(self.entries(from.offset, 3))
    }

    async fn seal(&mut self, offset: u64) -> Result<Option<u64>, Error> {
        let content = self.disk.content();
        let end = offset as usize;
        if offset > self.end || (end > 0 && content.bytes[end - 1] != b'\n') {
            return Ok(None);
        }
        Ok(Some(super::seal(content.retried.len() as u64, &content.bytes[..end])))
    }

    async fn append(&mut self, lines: &[u8]) -> Result<(), Error> {
        self.disk.content().bytes.extend_from_slice(lines);
        Ok(())
    }

    async fn sync(&mut self) -> Result<(), Error> {
        let mut content = self.disk.content();
        if content.failing_syncs {
            content.forsaken |= content.synced < content.bytes.len();
            let source = std::io::Error::other("a test's disk failed");
            return Err(Error::Io { action: "cannot sync", path: self.name(), source });
        }
        if !content.lying_syncs {
            content.sync();
        }
        self.end = content.bytes.len() as u64;
        Ok(())
    }

    async fn remove_failed(
        &mut self,
        ids: &HashSet<IdDigest>,
        probe: &mut Probe,
    ) -> Result<Vec<IdDigest>, Error> {
        let entries = self.entries(0, usize::MAX);
        let (mut rest, mut kept, mut removed) = (Vec::new(), Vec::new(), Vec::new());
        let mut start = 0;
        for entry in entries {
            let content = self.disk.content();
            let line = &content.bytes[start..entry.end as usize];
            start = entry.end as usize;
            if entry.failed && ids.contains(&entry.id) {
                kept.extend_from_slice(line);
                removed.push(entry.id);
            } else {
                rest.extend_from_slice(line);
            }
        }
        if removed.is_empty() {
            return Ok(removed);
        }
        self.disk.content().retried.extend(kept);
        probe.reached(Step::Kept)?;
        probe.reached(Step::Rewritten)?;
        {
            let mut content = self.disk.content();
            content.synced = rest.len();
            content.forsaken = false;
            content.bytes = rest;
            self.end = content.synced as u64;
        }
        probe.reached(Step::Replaced)?;
        Ok(removed)
    }
}
