//! Which documents a query may be answered from: those of the releases that it names.

use std::ops::Range;

use shared::Dependencies;

use crate::corpus::Version;
use crate::index::build::{LATEST, package_scope, release_scope};

use super::Retriever;

/// Documents to search.
pub(super) struct Scope {
    /// Ranges of documents.
    pub(super) parts: Vec<Part>,
    /// Whether only exact names count: the query names packages, and the corpus has none of
    /// them. What a question's words find elsewhere would mislead.
    pub(super) exact_only: bool,
    /// Whether the query names a package that the corpus lacks, perhaps under another name.
    pub(super) has_missing: bool,
}

/// One range of documents in a [`Scope`].
pub(super) struct Part {
    pub(super) documents: Range<u32>,
    /// Whether of several documents of one path only the newest counts.
    pub(super) latest_only: bool,
    /// The full-text index's name of the same documents; `None` for all of them.
    pub(super) filter: Option<String>,
}

impl Scope {
    /// Whether it holds a document, older ones of the same path included.
    pub(super) fn contains(&self, document: u32) -> bool {
        self.parts.iter().any(|part| part.documents.contains(&document))
    }
}

impl Retriever {
    /// The releases that dependencies name; the whole corpus where they name none.
    pub(super) fn scope(&self, dependencies: &Dependencies) -> Scope {
        let mut parts = Vec::new();
        let mut has_missing = false;
        for (package, version) in dependencies {
            let found = self.package_parts(package, version.as_deref());
            has_missing |= found.is_empty();
            parts.extend(found);
        }
        if parts.is_empty() {
            Scope { exact_only: has_missing, has_missing, ..self.whole_corpus() }
        } else {
            Scope { parts, exact_only: false, has_missing }
        }
    }

    /// All documents, of each path the newest.
    pub(super) fn whole_corpus(&self) -> Scope {
        let catalog = &self.index.catalog;
        let all = Part {
            documents: 0..catalog.num_documents(),
            latest_only: true,
            filter: (!catalog.all_latest()).then(|| LATEST.to_owned()),
        };
        Scope { parts: vec![all], exact_only: false, has_missing: false }
    }

    fn package_parts(&self, package: &str, version: Option<&str>) -> Vec<Part> {
        let Some(releases) = self.index.catalog.package(package) else {
            self.warn_once(package, version, "package not in the corpus");
            return Vec::new();
        };
        if let Some(version) = version {
            let wanted = Version::new(version);
            let same = releases.iter().filter(|release| release.version == wanted);
            let parts: Vec<Part> = same
                .map(|release| Part {
                    documents: release.documents.clone(),
                    latest_only: false,
                    filter: Some(release_scope(package, &release.version.to_string())),
                })
                .collect();
            if !parts.is_empty() {
                return parts;
            }
            let text = "version not in the corpus, taking the package's newest documents";
            self.warn_once(package, Some(version), text);
        }
        let start = releases.first().map_or(0, |first| first.documents.start);
        let end = releases.last().map_or(0, |last| last.documents.end);
        vec![Part {
            documents: start..end,
            latest_only: true,
            filter: Some(package_scope(package)),
        }]
    }

    fn warn_once(&self, package: &str, version: Option<&str>, text: &str) {
        let version = version.unwrap_or("any");
        let mut warned = self.warned.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Bounded, as queries are not: what is warned about is at most this many things.
        if warned.len() < MAX_WARNED && warned.insert(format!("{package}\0{version}")) {
            tracing::warn!(package, version, "{text}");
        }
    }
}

/// Packages and versions that are warned about in all.
const MAX_WARNED: usize = 1000;
