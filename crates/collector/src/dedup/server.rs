//! An index server in memory that does what Redis does to its clients: for tests of what the
//! collector promises. It outlives them, is claimed, flushed, rolled back, and goes down.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shared::IdDigest;
use tokio::sync::watch;

use super::{Dedup, DedupError, Position, Span};

/// What the server holds of one run.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    ids: BTreeSet<IdDigest>,
    position: Option<Position>,
    epoch: u64,
}

/// An index server with one run. Clones are the same server.
#[derive(Clone, Debug)]
pub struct IndexServer {
    held: Arc<Mutex<Snapshot>>,
    /// Claims ever given: a rollback doesn't bring one back, as Redis' clock doesn't.
    claims: Arc<Mutex<u64>>,
    up: Arc<watch::Sender<bool>>,
}

impl Default for IndexServer {
    fn default() -> Self {
        let (up, _) = watch::channel(true);
        Self { held: Arc::default(), claims: Arc::default(), up: Arc::new(up) }
    }
}

impl IndexServer {
    /// A client that has claimed nothing yet.
    pub fn client(&self) -> ServerDedup {
        ServerDedup { server: self.clone(), epoch: 0 }
    }

    /// What it holds now.
    pub fn snapshot(&self) -> Snapshot {
        self.held().clone()
    }

    /// Goes back to an older copy; the default is an empty server.
    pub fn restore(&self, snapshot: Snapshot) {
        *self.held() = snapshot;
    }

    /// Goes down or comes up: clients wait while it is down.
    pub fn set_up(&self, up: bool) {
        self.up.send_replace(up);
    }

    fn held(&self) -> MutexGuard<'_, Snapshot> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client of an [`IndexServer`].
#[derive(Debug)]
pub struct ServerDedup {
    server: IndexServer,
    epoch: u64,
}

impl ServerDedup {
    async fn up(&self) {
        // The server is held by this client, so the channel is open.
        let mut up = self.server.up.subscribe();
        let _open = up.wait_for(|up| *up).await;
    }

    fn guarded(&self) -> Result<MutexGuard<'_, Snapshot>, DedupError> {
        let held = self.server.held();
        if held.epoch > self.epoch {
            Err(DedupError::TakenOver { by: "another client".to_owned() })
        } else {
            Ok(held)
        }
    }

    fn standing(&self, at: &Position) -> Result<MutexGuard<'_, Snapshot>, DedupError> {
        let held = self.guarded()?;
        let stands = held.epoch == self.epoch
            && held.position.as_ref() == Some(at)
            && held.ids.len() as u64 == at.lines;
        if stands { Ok(held) } else { Err(DedupError::RolledBack) }
    }
}

impl Dedup for ServerDedup {
    async fn claim(&mut self) -> Result<Option<Position>, DedupError> {
        self.up().await;
        let mut claims = self.server.claims.lock().unwrap_or_else(PoisonError::into_inner);
        *claims += 1;
        self.epoch = *claims;
        drop(claims);
        let mut held = self.server.held();
        held.epoch = self.epoch;
        Ok(held.position)
    }

    async fn resume(&mut self) -> Result<Option<Position>, DedupError> {
        self.up().await;
        let mut held = self.guarded()?;
        held.epoch = self.epoch;
        Ok(held.position.filter(|position| position.lines == held.ids.len() as u64))
    }

    async fn clear(&mut self, start: &Position) -> Result<(), DedupError> {
        self.up().await;
        let mut held = self.guarded()?;
        *held = Snapshot { ids: BTreeSet::new(), position: Some(*start), epoch: self.epoch };
        Ok(())
    }

    async fn known(&mut self, ids: &[IdDigest], at: &Position) -> Result<Vec<bool>, DedupError> {
        self.up().await;
        let held = self.standing(at)?;
        Ok(ids.iter().map(|id| held.ids.contains(id)).collect())
    }

    async fn mark(&mut self, ids: &[IdDigest], span: Span<'_>) -> Result<Vec<usize>, DedupError> {
        self.up().await;
        let mut held = self.standing(span.from)?;
        held.position = Some(*span.to);
        Ok((0..ids.len()).filter(|&index| !held.ids.insert(ids[index])).collect())
    }

    async fn forget(&mut self, ids: &[IdDigest], span: Span<'_>) -> Result<(), DedupError> {
        self.up().await;
        let mut held = self.standing(span.from)?;
        held.position = Some(*span.to);
        for id in ids {
            held.ids.remove(id);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::conformance::{self, Harness};
    use super::*;

    #[derive(Default)]
    struct Servers(Mutex<BTreeMap<String, IndexServer>>);

    impl Harness for Servers {
        type Dedup = ServerDedup;

        async fn client(&self, run: &str) -> ServerDedup {
            self.0.lock().unwrap().entry(run.to_owned()).or_default().client()
        }
    }

    #[tokio::test]
    async fn index_server_passes_the_conformance_suite() {
        let servers = Servers::default();
        conformance::run_all(&servers).await;
        conformance::run_shared(&servers).await;
    }
}
