//! The collector's state machine: which outcome becomes a line, and in which order file and index
//! learn of it. It does no I/O of its own; it is driven by `serve.rs`.
//!
//! The order is what makes every id come out once: ask the index, write, sync, mark. A crash
//! before the sync leaves a tail that the next start cuts off or reads into the index; a crash after
//! it leaves lines that the next start reads into the index. Only what came before the call returned
//! may be acked.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use shared::{IdDigest, Outcome, Settled};

use crate::dedup::memory::MemoryDedup;
use crate::serve::MAX_BATCH;
use crate::{Answered, Dedup, DedupError, Error, Line, Log, Output, Position, Probe, Span, Step};

/// A log and the index of its ids.
#[derive(Debug)]
pub struct Collector<D, L = Output> {
    log: L,
    dedup: D,
    /// How far the index has followed the log.
    position: Position,
    probe: Probe,
    buffer: Vec<u8>,
    /// A write failed: nobody knows what the log holds until it is opened anew.
    broken: bool,
}

/// What became of a batch.
#[derive(Debug)]
pub struct Written {
    /// Which of its outcomes were new and have their line now.
    pub new: Vec<usize>,
    /// How long the sync took; nothing where there was nothing new.
    pub sync: Duration,
}

impl<L: Log> Collector<MemoryDedup, L> {
    /// The ids that have their line, for a producer in the same process.
    pub fn answered(&self) -> &Answered {
        self.dedup.answered()
    }
}

impl<D: Dedup, L: Log> Collector<D, L> {
    /// Claims the index for this log and brings it up to date.
    pub async fn open(log: L, dedup: D) -> Result<Self, Error> {
        let position = Position::default();
        let (probe, buffer) = (Probe::default(), Vec::new());
        let mut this = Self { log, dedup, position, probe, buffer, broken: false };
        match this.dedup.claim().await {
            Ok(kept) => match this.catch_up(kept).await {
                Err(DedupOr::Dedup(DedupError::RolledBack)) => this.recover().await?,
                done => done.map_err(|error| this.stop(error))?,
            },
            Err(error) => return Err(this.stop(error.into())),
        }
        Ok(this)
    }

    /// Shows every step to `probe` from now on. For tests.
    pub fn set_probe(&mut self, probe: Probe) {
        self.probe = probe;
    }

    /// Lines in the log.
    pub fn num_lines(&self) -> u64 {
        self.position.lines
    }

    /// Lines of jobs that failed.
    pub fn num_failed(&self) -> u64 {
        self.position.failed
    }

    /// Writes the lines of the outcomes that are new, one an id, and waits until they are on disk
    /// and marked: from then on all of `outcomes` may be acked. After an error none may be.
    ///
    /// At most 128 at a time: when the log is opened, so many lines at its end are doubted.
    ///
    /// Dropping the future is safe like a crash: drop the collector too.
    pub async fn write(&mut self, outcomes: &[&Settled]) -> Result<Written, Error> {
        debug_assert!(outcomes.len() <= MAX_BATCH, "more lines than an opening doubts");
        let ids: Vec<IdDigest> = outcomes.iter().map(|s| s.context.id.digest()).collect();
        let known = self.known(&ids).await?;
        self.probe.reached(Step::Checked)?;
        let mut seen = HashSet::new();
        let new: Vec<usize> =
            (0..ids.len()).filter(|&index| !known[index] && seen.insert(ids[index])).collect();
        self.probe.reached(Step::Picked)?;
        if new.is_empty() {
            return Ok(Written { new, sync: Duration::ZERO });
        }
        let sync = self.append(new.iter().map(|&index| outcomes[index])).await?;
        let failed = new.iter().filter(|&&index| is_failed(outcomes[index])).count();
        let next = Position {
            offset: self.log.end(),
            lines: self.position.lines + new.len() as u64,
            failed: self.position.failed + failed as u64,
            seal: self.seal_at_end().await?,
        };
        let new_ids: Vec<IdDigest> = new.iter().map(|&index| ids[index]).collect();
        match self.dedup.mark(&new_ids, Span { from: &self.position, to: &next }).await {
            Ok(_had) => self.position = next,
            // The lines are in the log already: following it marks them too.
            Err(DedupError::RolledBack) => self.recover().await?,
            Err(error) => return Err(self.stop(error.into())),
        }
        self.probe.reached(Step::Marked)?;
        Ok(Written { new, sync })
    }

    /// Takes the lines of failed jobs with these ids out of the log, so that the jobs can be tried
    /// again; how many there were.
    pub async fn remove_failed(&mut self, ids: &HashSet<IdDigest>) -> Result<u64, Error> {
        self.refuse_if_broken()?;
        // Whoever has been taken over must not touch the log.
        self.known(&[]).await?;
        self.broken = true;
        let removed = self.log.remove_failed(ids, &mut self.probe).await?;
        self.broken = false;
        if removed.is_empty() {
            return Ok(0);
        }
        let num_removed = removed.len() as u64;
        let next = Position {
            offset: self.log.end(),
            lines: self.position.lines - num_removed,
            failed: self.position.failed - num_removed,
            seal: self.seal_at_end().await?,
        };
        match self.dedup.forget(&removed, Span { from: &self.position, to: &next }).await {
            Ok(()) => self.position = next,
            Err(DedupError::RolledBack) => self.recover().await?,
            Err(error) => return Err(self.stop(error.into())),
        }
        self.probe.reached(Step::Forgotten)?;
        Ok(num_removed)
    }

    /// Counts the failed lines of bad input, of all ids or of `only` these where there are any, and takes
    /// them out of the log if they shall be removed. No job of theirs could be put back.
    pub async fn handle_bad_input(
        &mut self,
        only: &HashSet<IdDigest>,
        remove: bool,
    ) -> Result<u64, Error> {
        let found = self.bad_input(only).await?;
        if remove { self.remove_failed(&found).await } else { Ok(found.len() as u64) }
    }

    async fn bad_input(&mut self, only: &HashSet<IdDigest>) -> Result<HashSet<IdDigest>, Error> {
        let mut found = HashSet::new();
        let mut at = Position::default();
        while at.offset < self.log.end() {
            let entries = self.log.read(&at).await?;
            let Some(last) = entries.last() else { break };
            at = Position {
                offset: last.end,
                lines: at.lines + entries.len() as u64,
                ..Position::default()
            };
            let bad = entries.iter().filter(|entry| entry.of_bad_input).map(|entry| entry.id);
            found.extend(bad.filter(|id| only.is_empty() || only.contains(id)));
        }
        Ok(found)
    }

    pub(crate) fn reached(&mut self, step: Step) -> Result<(), Error> {
        self.probe.reached(step)
    }

    /// Which of `ids` have their line: none of which the line isn't synced in this log.
    ///
    /// The index is believed only where it stands: with this collector's claim, at the position up to
    /// which this collector has synced and marked, with as many ids as there are lines. An index
    /// that was lost or rolled back is filled again from the log first; a collector that was taken over is
    /// told so and tells nothing. Between being told and being heard, an answer can't become wrong,
    /// whoever holds the log by then: only [`remove_failed`](Self::remove_failed) takes lines out,
    /// and whoever has that done puts their jobs back.
    ///
    /// Dropping the future is safe like a crash: drop the collector too.
    pub async fn known(&mut self, ids: &[IdDigest]) -> Result<Vec<bool>, Error> {
        loop {
            match self.dedup.known(ids, &self.position).await {
                Ok(known) => return Ok(known),
                Err(DedupError::RolledBack) => self.recover().await?,
                Err(error) => return Err(self.stop(error.into())),
            }
        }
    }

    /// Appends the lines of `outcomes` and syncs them; how long the sync took.
    async fn append(
        &mut self,
        outcomes: impl Iterator<Item = &Settled>,
    ) -> Result<Duration, Error> {
        self.refuse_if_broken()?;
        self.buffer.clear();
        for settled in outcomes {
            let written = serde_json::to_writer(&mut self.buffer, &Line::from(settled));
            written.map_err(|error| self.io("cannot serialise a line of", error.into()))?;
            self.buffer.push(b'\n');
        }
        // Not broken only once both have worked.
        self.broken = true;
        self.log.append(&self.buffer).await?;
        self.probe.reached(Step::Written)?;
        let started = Instant::now();
        self.log.sync().await?;
        self.broken = false;
        let took = started.elapsed();
        self.probe.reached(Step::Synced)?;
        // One huge line shall not be kept for ever.
        self.buffer.shrink_to(1 << 20);
        Ok(took)
    }

    /// Brings an index that lost something up to date.
    async fn recover(&mut self) -> Result<(), Error> {
        tracing::warn!(
            output = self.log.name(),
            "the index of answered ids lost something; reading it again from the output"
        );
        loop {
            let resumed = match self.dedup.resume().await {
                Ok(kept) => self.catch_up(kept).await,
                Err(error) => Err(error.into()),
            };
            match resumed {
                Err(DedupOr::Dedup(DedupError::RolledBack)) => {}
                done => return done.map_err(|error| self.stop(error)),
            }
        }
    }

    /// Follows the log from where the index stands, or from its start if the index doesn't belong
    /// to it.
    async fn catch_up(&mut self, kept: Option<Position>) -> Result<(), DedupOr> {
        self.position = match kept {
            Some(kept) if self.log.seal(kept.offset).await? == Some(kept.seal) => kept,
            _ => {
                let seal = self.log.seal(0).await?.unwrap_or_default();
                let start = Position { seal, ..Position::default() };
                self.dedup.clear(&start).await?;
                start
            }
        };
        while self.position.offset < self.log.end() {
            let entries = self.log.read(&self.position).await?;
            let Some(last) = entries.last() else { break };
            let next = Position {
                offset: last.end,
                lines: self.position.lines + entries.len() as u64,
                failed: self.position.failed + entries.iter().filter(|e| e.failed).count() as u64,
                seal: self.log.seal(last.end).await?.unwrap_or_default(),
            };
            let ids: Vec<IdDigest> = entries.iter().map(|e| e.id).collect();
            let span = Span { from: &self.position, to: &next };
            if let Some(&again) = self.dedup.mark(&ids, span).await?.first() {
                let line = self.position.lines + again as u64 + 1;
                // Let the next start find it too.
                self.dedup.clear(&Position { seal: !next.seal, ..next }).await?;
                let reason = "found an id that has a line already".to_owned();
                return Err(Error::Foreign { path: self.log.name(), line, reason }.into());
            }
            self.position = next;
        }
        Ok(())
    }

    async fn seal_at_end(&mut self) -> Result<u64, Error> {
        Ok(self.log.seal(self.log.end()).await?.unwrap_or_default())
    }

    fn refuse_if_broken(&self) -> Result<(), Error> {
        if self.broken {
            let source = std::io::Error::other("an earlier write failed");
            return Err(self.io("cannot write", source));
        }
        Ok(())
    }

    fn stop(&self, error: DedupOr) -> Error {
        match error {
            DedupOr::Other(error) => error,
            DedupOr::Dedup(DedupError::TakenOver { by }) => {
                Error::TakenOver { path: self.log.name(), by }
            }
            DedupOr::Dedup(DedupError::Refused(source)) => Error::Dedup(source),
            // Both callers recover from it.
            DedupOr::Dedup(error @ DedupError::RolledBack) => Error::Dedup(error.into()),
        }
    }

    fn io(&self, action: &'static str, source: std::io::Error) -> Error {
        Error::Io { action, path: self.log.name(), source }
    }
}

fn is_failed(settled: &Settled) -> bool {
    matches!(settled.outcome, Outcome::Failed(_))
}

/// What following the log can meet: trouble of the index, from which one may recover, or an end.
enum DedupOr {
    Dedup(DedupError),
    Other(Error),
}

impl From<DedupError> for DedupOr {
    fn from(error: DedupError) -> Self {
        Self::Dedup(error)
    }
}

impl From<Error> for DedupOr {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}
