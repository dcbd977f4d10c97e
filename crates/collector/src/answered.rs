//! Which ids have their line in the output: 16 bytes an id, shared with the producer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shared::{IdDigest, IdTable, JobId};

/// The ids that are in the output. Clones share one set: the collector writes it, the producer
/// reads it to skip what is answered.
#[derive(Clone, Debug, Default)]
pub struct Answered(Arc<Mutex<IdTable>>);

impl Answered {
    /// Whether `id` has its line.
    pub fn contains(&self, id: &JobId) -> bool {
        self.lock().get(&id.digest()).is_some()
    }

    /// Number of ids with a line.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether no id has a line.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn which(&self, ids: &[IdDigest]) -> Vec<bool> {
        let set = self.lock();
        ids.iter().map(|id| set.get(id).is_some()).collect()
    }

    /// Adds `ids`; gives which of them were there already.
    pub(crate) fn mark(&self, ids: &[IdDigest]) -> Vec<usize> {
        let mut set = self.lock();
        (0..ids.len()).filter(|&index| set.insert(ids[index], ()).is_some()).collect()
    }

    pub(crate) fn forget(&self, ids: &[IdDigest]) {
        let mut set = self.lock();
        for id in ids {
            set.remove(id);
        }
    }

    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, IdTable> {
        // A set is whole between two operations, whatever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
