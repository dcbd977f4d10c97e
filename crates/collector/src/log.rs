//! What the collector needs of a file: lines that are appended, synced, and read again.
//!
//! [`Output`](crate::Output) is the real one; `log/memory.rs` stands in where tests need a disk
//! that crashes. Whoever opens a log has its lock, and has cut a torn last line.

use std::collections::HashSet;
use std::future::Future;

use sha2::{Digest, Sha256};
use shared::IdDigest;

use crate::{Error, Position, Probe};

#[cfg(any(test, feature = "conformance"))]
pub mod memory;

/// A whole line of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The job it is the line of.
    pub id: IdDigest,
    /// Whether the job failed.
    pub failed: bool,
    /// Whether it failed since its input was bad, and never was a job.
    pub of_bad_input: bool,
    /// Offset of the first byte after it.
    pub end: u64,
}

/// The seal of a log from which lines were removed so often, and whose end this is.
pub(crate) fn seal(generation: u64, end: &[u8]) -> u64 {
    let digest = Sha256::new().chain_update(generation.to_le_bytes()).chain_update(end).finalize();
    digest[..8].iter().fold(0, |seal, &byte| seal << 8 | u64::from(byte))
}

/// The file that is the truth about what is answered.
pub trait Log: Send {
    /// What it is called in messages.
    fn name(&self) -> String;

    /// Offset of the first byte after the last line known to be on disk.
    fn end(&self) -> u64;

    /// The lines from `from` on, a bounded number of them; none at the end.
    fn read(&mut self, from: &Position) -> impl Future<Output = Result<Vec<Entry>, Error>> + Send;

    /// What recognises this log's content up to `offset`; `None` if no line starts there.
    /// Never the same for two contents, as far as an index kept elsewhere could confuse them.
    fn seal(&mut self, offset: u64) -> impl Future<Output = Result<Option<u64>, Error>> + Send;

    /// Writes `lines`, whole ones, at the end.
    fn append(&mut self, lines: &[u8]) -> impl Future<Output = Result<(), Error>> + Send;

    /// Waits until everything appended is on disk, and moves [`end`](Log::end) behind it.
    fn sync(&mut self) -> impl Future<Output = Result<(), Error>> + Send;

    /// Takes the lines of failed jobs with these ids out, and keeps them elsewhere; gives their
    /// ids. After a crash the log is either as before or without all of them. Lines of answers
    /// are never removed.
    fn remove_failed(
        &mut self,
        ids: &HashSet<IdDigest>,
        probe: &mut Probe,
    ) -> impl Future<Output = Result<Vec<IdDigest>, Error>> + Send;
}
