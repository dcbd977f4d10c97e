//! The index in this process's memory: filled from the file at every start.

use shared::IdDigest;

use super::{Dedup, DedupError, Position, Span};
use crate::Answered;

/// An index in memory; its ids are shared with whoever holds its [`Answered`].
#[derive(Debug, Default)]
pub struct MemoryDedup {
    answered: Answered,
    position: Option<Position>,
}

impl MemoryDedup {
    /// The ids it has.
    pub fn answered(&self) -> &Answered {
        &self.answered
    }

    fn check(&self, at: &Position) -> Result<(), DedupError> {
        if self.position.as_ref() == Some(at) { Ok(()) } else { Err(DedupError::RolledBack) }
    }
}

impl Dedup for MemoryDedup {
    async fn claim(&mut self) -> Result<Option<Position>, DedupError> {
        Ok(self.position)
    }

    async fn resume(&mut self) -> Result<Option<Position>, DedupError> {
        Ok(self.position)
    }

    async fn clear(&mut self, start: &Position) -> Result<(), DedupError> {
        self.answered.clear();
        self.position = Some(*start);
        Ok(())
    }

    async fn known(&mut self, ids: &[IdDigest], at: &Position) -> Result<Vec<bool>, DedupError> {
        self.check(at)?;
        Ok(self.answered.which(ids))
    }

    async fn mark(&mut self, ids: &[IdDigest], span: Span<'_>) -> Result<Vec<usize>, DedupError> {
        self.check(span.from)?;
        self.position = Some(*span.to);
        Ok(self.answered.mark(ids))
    }

    async fn forget(&mut self, ids: &[IdDigest], span: Span<'_>) -> Result<(), DedupError> {
        self.check(span.from)?;
        self.position = Some(*span.to);
        self.answered.forget(ids);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{self, Harness};
    use super::*;

    struct Memory;

    impl Harness for Memory {
        type Dedup = MemoryDedup;

        async fn client(&self, _run: &str) -> MemoryDedup {
            MemoryDedup::default()
        }
    }

    #[tokio::test]
    async fn memory_index_passes_the_conformance_suite() {
        conformance::run_all(&Memory).await;
    }
}
