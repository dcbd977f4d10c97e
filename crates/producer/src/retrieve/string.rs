//! Documents whose path, or an alias of theirs, contains the API that a query names.
//!
//! The name is looked for as it is given and, where that finds nothing, by its last part:
//! `argsort` of `np.argsort`. Case doesn't count. The shortest path is the best match.

use std::collections::BTreeSet;

use memchr::memmem;

use crate::index::catalog::Catalog;

use super::scope::Scope;
use super::{Found, NAMED_SCORE, Retriever};

/// Shortest part of a name that is looked for: shorter ones are in nearly every name.
const MIN_PART_CHARS: usize = 3;

/// All names in lower case, each where the catalog has it.
pub(super) struct LowerNames(String);

impl LowerNames {
    pub(super) fn new(catalog: &Catalog) -> Self {
        // ASCII alone, so that no name changes its length.
        Self(catalog.names().to_ascii_lowercase())
    }
}

impl Retriever {
    /// The documents with names that contain `target`; none if that isn't asked for.
    pub(super) fn find_containing(&self, target: &str, scope: &Scope) -> Vec<Found> {
        let Some(names) = &self.lower_names else {
            return Vec::new();
        };
        if scope.exact_only {
            return Vec::new();
        }
        let last = target.rsplit('.').next().unwrap_or(target);
        let mut needles = vec![target];
        if last != target {
            needles.push(last);
        }
        needles.retain(|needle| needle.chars().count() >= MIN_PART_CHARS);
        for needle in needles {
            let mut documents: Vec<u32> = self.containing(names, needle, scope);
            if !documents.is_empty() {
                let path = |&document: &u32| self.index.catalog.path(document);
                documents.sort_by(|a, b| {
                    let (a, b) = (path(a), path(b));
                    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
                });
                documents.truncate(self.max_documents);
                return documents.into_iter().map(|d| (d, NAMED_SCORE)).collect();
            }
        }
        Vec::new()
    }

    fn containing(&self, names: &LowerNames, needle: &str, scope: &Scope) -> Vec<u32> {
        let catalog = &self.index.catalog;
        let needle = needle.to_ascii_lowercase();
        let finder = memmem::Finder::new(&needle);
        let mut documents = BTreeSet::new();
        for part in &scope.parts {
            let range = catalog.names_range(&part.documents);
            let mut at = range.start;
            while let Some(found) = finder.find(&names.0.as_bytes()[at..range.end]) {
                let start = at + found;
                let (document, name_end) = catalog.name_at(start);
                if start + needle.len() > name_end {
                    // It runs over into the next name.
                    at = start + 1;
                    continue;
                }
                if !part.latest_only || catalog.is_latest(document) {
                    documents.insert(document);
                }
                at = name_end;
            }
        }
        documents.into_iter().collect()
    }
}
