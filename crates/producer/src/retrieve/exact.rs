//! Documents whose path, or an alias of theirs, is the API that a query names.

use super::scope::Scope;
use super::{Found, NAMED_SCORE, Retriever};

impl Retriever {
    /// The documents of this exact name; a path counts before an alias, and within a package the
    /// newest release that has it.
    pub(super) fn find_exact(&self, target: &str, scope: &Scope) -> Vec<Found> {
        let catalog = &self.index.catalog;
        let mut named: Vec<(bool, u32)> = catalog
            .named(target)
            .filter(|(document, _)| scope.contains(*document))
            .map(|(document, is_alias)| (is_alias, document))
            .collect();
        named.sort_unstable();
        // An alias that is some document's path is not meant as the alias.
        let best = named.first().map(|(is_alias, _)| *is_alias);
        named.retain(|(is_alias, _)| Some(*is_alias) == best);
        named.dedup();
        // In the order of packages, each one's newest release first.
        let mut found: Vec<Found> = Vec::new();
        let mut taken = None;
        for (_, document) in named {
            let release = catalog.release_of(document);
            let (package, documents) = taken.get_or_insert((release.package, &release.documents));
            if *package != release.package {
                (*package, *documents) = (release.package, &release.documents);
            }
            if documents.contains(&document) {
                found.push((document, NAMED_SCORE));
            }
        }
        found.truncate(self.max_documents);
        found
    }
}
