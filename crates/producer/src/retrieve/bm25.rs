//! Documents that share words with a question, ranked by BM25.

use crate::error::IndexError;

use super::scope::Scope;
use super::{Found, Retriever};

impl Retriever {
    /// The best documents for a question, best first; equal scores in the order of their paths.
    pub(super) fn find_bm25(
        &self,
        question: &str,
        scope: &Scope,
    ) -> Result<Vec<Found>, IndexError> {
        if scope.exact_only {
            return Ok(Vec::new());
        }
        // A part that is everything needs no filter, whatever the others are.
        let filters: Option<Vec<String>> =
            scope.parts.iter().map(|part| part.filter.clone()).collect();
        let filters = filters.unwrap_or_default();
        let mut found = self.index.search.search(question, &filters, self.max_documents)?;
        let catalog = &self.index.catalog;
        found.sort_by(|(a, a_score), (b, b_score)| {
            b_score
                .total_cmp(a_score)
                .then_with(|| catalog.path(*a).cmp(catalog.path(*b)))
                .then(a.cmp(b))
        });
        found.truncate(self.max_documents);
        Ok(found)
    }
}
