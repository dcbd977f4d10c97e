//! The output and the index of ids as a collector sees them: the disk and the server of the collector's
//! own tests, behind a process that dies between any two steps, a disk that fails, a network.

use std::collections::HashSet;
use std::time::Duration;

use collector::log::memory::MemoryLog;
use collector::{Dedup, DedupError, Entry, Error, Log, Position, Probe, Span};
use shared::IdDigest;
use tokio::time::{Instant, sleep, sleep_until};

use crate::plan::Broken;
use crate::process::Process;
use crate::world::{Fault, World, lock};

/// How long an answer of the index is waited for before it is asked again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest way to the index and back, in milliseconds.
const LATENCY: u64 = 20;
/// Longest time that a sync takes, usually, in milliseconds.
const SYNC: u64 = 40;

pub(crate) struct SimLog {
    pub(crate) world: World,
    pub(crate) process: Process,
    pub(crate) inner: MemoryLog,
}

impl SimLog {
    fn failed(&self, fault: Fault, action: &'static str) -> Error {
        self.world.count(fault);
        self.world.note(|| format!("{} {action}", self.process.name()));
        let source = std::io::Error::other("the simulated disk fails");
        Error::Io { action, path: self.name(), source }
    }
}

impl Log for SimLog {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn end(&self) -> u64 {
        self.inner.end()
    }

    async fn read(&mut self, from: &Position) -> Result<Vec<Entry>, Error> {
        self.world.gate(&self.process).await;
        self.inner.read(from).await
    }

    async fn seal(&mut self, offset: u64) -> Result<Option<u64>, Error> {
        self.inner.seal(offset).await
    }

    async fn append(&mut self, lines: &[u8]) -> Result<(), Error> {
        self.world.gate(&self.process).await;
        if self.world.strikes(80) {
            let written = self.world.chance.index(lines.len());
            self.inner.append(&lines[..written]).await?;
            return Err(self.failed(Fault::ShortWrite, "cannot write"));
        }
        self.inner.append(lines).await?;
        self.world.note(|| format!("{} writes {} bytes", self.process.name(), lines.len()));
        self.world.gate(&self.process).await;
        Ok(())
    }

    async fn sync(&mut self) -> Result<(), Error> {
        self.world.gate(&self.process).await;
        let mut most_millis = SYNC;
        if self.world.strikes(60) {
            self.world.count(Fault::SyncSlow);
            most_millis = self.world.plan.lease.as_millis() as u64 * 3;
        }
        sleep(self.world.chance.millis(0, most_millis)).await;
        self.world.gate(&self.process).await;
        if self.world.strikes(60) {
            self.world.disk.forsake_unsynced();
            return Err(self.failed(Fault::SyncFailed, "cannot sync"));
        }
        let synced = self.inner.sync().await;
        self.world.note(|| format!("{} syncs: {}", self.process.name(), synced.is_ok()));
        self.world.gate(&self.process).await;
        synced
    }

    async fn remove_failed(
        &mut self,
        ids: &HashSet<IdDigest>,
        probe: &mut Probe,
    ) -> Result<Vec<IdDigest>, Error> {
        self.inner.remove_failed(ids, probe).await
    }
}

pub(crate) struct SimDedup<D> {
    pub(crate) world: World,
    pub(crate) process: Process,
    pub(crate) inner: D,
    /// Whether there is a network between.
    pub(crate) is_remote: bool,
}

impl<D: Dedup> SimDedup<D> {
    /// Waits for the index; whether its answer will be lost, so that it is asked again.
    async fn reached(&self) -> bool {
        self.world.gate(&self.process).await;
        if !self.is_remote {
            return false;
        }
        loop {
            let until = self.world.outages().index.max(self.process.is_cut_until());
            if until <= Instant::now() {
                break;
            }
            sleep_until(until).await;
        }
        self.world.pass(LATENCY).await;
        self.world.gate(&self.process).await;
        self.world.strikes(40)
    }

    /// The index answers.
    async fn answered(&self) {
        self.world.gate(&self.process).await;
    }

    async fn answer_lost(&self) {
        self.world.count(Fault::IndexAnswerLost);
        self.world.note(|| format!("{} misses an answer of the index", self.process.name()));
        sleep(ANSWER_TIMEOUT).await;
        self.world.gate(&self.process).await;
    }

    /// What an index that is broken on purpose says.
    fn distort(&self, ids: &[IdDigest], known: Vec<bool>) -> Vec<bool> {
        match self.world.plan.broken {
            Broken::IndexForgets => vec![false; known.len()],
            Broken::IndexMarksEarly => {
                let mut early = lock(&self.world.early);
                ids.iter().zip(known).map(|(id, known)| !early.insert(*id) || known).collect()
            }
            _ => known,
        }
    }
}

impl<D: Dedup + Sync> Dedup for SimDedup<D> {
    async fn claim(&mut self) -> Result<Option<Position>, DedupError> {
        if self.reached().await {
            self.inner.claim().await?;
            self.answer_lost().await;
        }
        let claimed = self.inner.claim().await;
        self.answered().await;
        claimed
    }

    async fn resume(&mut self) -> Result<Option<Position>, DedupError> {
        self.reached().await;
        let resumed = self.inner.resume().await;
        self.world.note(|| format!("{} resumes at {resumed:?}", self.process.name()));
        self.answered().await;
        resumed
    }

    async fn clear(&mut self, start: &Position) -> Result<(), DedupError> {
        if self.reached().await {
            self.inner.clear(start).await?;
            self.answer_lost().await;
        }
        let cleared = self.inner.clear(start).await;
        self.answered().await;
        cleared
    }

    async fn known(&mut self, ids: &[IdDigest], at: &Position) -> Result<Vec<bool>, DedupError> {
        self.reached().await;
        let known = self.inner.known(ids, at).await?;
        self.answered().await;
        Ok(self.distort(ids, known))
    }

    async fn mark(&mut self, ids: &[IdDigest], span: Span<'_>) -> Result<Vec<usize>, DedupError> {
        if self.reached().await {
            self.inner.mark(ids, span).await?;
            self.answer_lost().await;
        }
        let marked = self.inner.mark(ids, span).await;
        self.answered().await;
        marked
    }

    async fn forget(&mut self, ids: &[IdDigest], span: Span<'_>) -> Result<(), DedupError> {
        self.reached().await;
        self.inner.forget(ids, span).await
    }
}
