//! The table of all documents: names, places of texts, tokens, releases. In memory while in use,
//! some hundred bytes a document; the texts themselves stay on disk.
//!
//! Documents are numbered release by release, packages in order and each package's newest release
//! first, so that a release or a package is a range of numbers.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::corpus::{Version, normalised_package};
use crate::error::IndexError;

/// One release in the table.
#[derive(Serialize, Deserialize)]
struct ReleaseRow {
    package: String,
    version: String,
    num_documents: u32,
}

/// The table as it is kept in a file, column by column.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Columns {
    releases: Vec<ReleaseRow>,
    /// Length of each document's text in bytes.
    text_bytes: Vec<u32>,
    num_tokens: Vec<u32>,
    /// Number of names of each document, its path included.
    num_names: Vec<u32>,
    /// Numbers of the documents that an older release repeats: not the newest of their path.
    superseded: Vec<u32>,
    /// Length of each name in bytes.
    name_bytes: Vec<u32>,
    /// All names, one after the other.
    names: String,
}

impl Columns {
    /// Opens the next release; the documents that follow are its.
    pub(crate) fn push_release(&mut self, package: &str, version: &Version) {
        self.releases.push(ReleaseRow {
            package: normalised_package(package),
            version: version.to_string(),
            num_documents: 0,
        });
    }

    /// Adds a document to the last release.
    pub(crate) fn push<'n>(
        &mut self,
        names: impl Iterator<Item = &'n str>,
        text: &str,
        num_tokens: usize,
        is_latest: bool,
    ) {
        if !is_latest {
            self.superseded.push(self.num_documents());
        }
        let mut num_names = 0;
        for name in names {
            self.names.push_str(name);
            self.name_bytes.push(saturated(name.len()));
            num_names += 1;
        }
        self.num_names.push(num_names);
        self.text_bytes.push(saturated(text.len()));
        self.num_tokens.push(saturated(num_tokens));
        if let Some(release) = self.releases.last_mut() {
            release.num_documents += 1;
        }
    }

    /// Number of documents so far.
    pub(crate) fn num_documents(&self) -> u32 {
        saturated(self.text_bytes.len())
    }
}

/// A record is at most 16 MB long, so that no length comes near the end of 32 bits.
fn saturated(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Documents of one release.
pub(crate) struct ReleaseDocuments {
    /// The same for all releases of a package.
    pub(crate) package: usize,
    /// Its version.
    pub(crate) version: Version,
    /// Their numbers.
    pub(crate) documents: Range<u32>,
}

/// The table in use.
pub(crate) struct Catalog {
    releases: Vec<ReleaseDocuments>,
    /// The releases of each package.
    packages: BTreeMap<String, Range<usize>>,
    text_starts: Vec<u64>,
    num_tokens: Vec<u32>,
    superseded: Vec<u32>,
    /// First name of each document, and the end of the last one's.
    first_names: Vec<u32>,
    name_starts: Vec<usize>,
    names: String,
    /// Numbers of the names, sorted by name, then by number.
    sorted_names: Vec<u32>,
}

impl Catalog {
    /// Checks the columns and adds what is found quickly by them.
    pub(crate) fn new(columns: Columns) -> Result<Self, IndexError> {
        let num = columns.text_bytes.len();
        let first_names = sums(&columns.num_names, |sum: u32, len| sum.saturating_add(len));
        let name_starts = sums(&columns.name_bytes, |sum: usize, len| sum + len as usize);
        let mut packages: BTreeMap<String, Range<usize>> = BTreeMap::new();
        let mut releases = Vec::new();
        let mut next = 0_u32;
        for (k, release) in columns.releases.into_iter().enumerate() {
            let end = next.saturating_add(release.num_documents);
            let range = packages.entry(release.package).or_insert(k..k);
            releases.push(ReleaseDocuments {
                package: range.start,
                version: Version::new(&release.version),
                documents: next..end,
            });
            range.end = k + 1;
            next = end;
        }
        let names = columns.names;
        let sound = next as usize == num
            && columns.num_tokens.len() == num
            && columns.num_names.len() == num
            && first_names.last().map(|&end| end as usize) == Some(columns.name_bytes.len())
            && name_starts.last() == Some(&names.len())
            && name_starts.iter().all(|&at| names.is_char_boundary(at));
        if !sound {
            let reason = "the columns of its table don't fit together";
            return Err(IndexError::Damaged(reason.to_owned()));
        }
        let mut catalog = Self {
            releases,
            packages,
            text_starts: sums(&columns.text_bytes, |sum: u64, len| sum + u64::from(len)),
            num_tokens: columns.num_tokens,
            superseded: columns.superseded,
            first_names,
            sorted_names: (0..saturated(columns.name_bytes.len())).collect(),
            name_starts,
            names,
        };
        let mut sorted = std::mem::take(&mut catalog.sorted_names);
        sorted.sort_by(|&a, &b| catalog.name(a).cmp(catalog.name(b)).then(a.cmp(&b)));
        catalog.sorted_names = sorted;
        Ok(catalog)
    }

    /// Number of documents.
    pub(crate) fn num_documents(&self) -> u32 {
        saturated(self.num_tokens.len())
    }

    /// Releases of a package, the newest first; `None` where the corpus doesn't have it.
    pub(crate) fn package(&self, name: &str) -> Option<&[ReleaseDocuments]> {
        let range = self.packages.get(&normalised_package(name))?;
        Some(&self.releases[range.clone()])
    }

    /// The release that a document belongs to.
    pub(crate) fn release_of(&self, document: u32) -> &ReleaseDocuments {
        let after = |release: &ReleaseDocuments| release.documents.end <= document;
        &self.releases[self.releases.partition_point(after)]
    }

    /// Whether no newer release has a document of the same path.
    pub(crate) fn is_latest(&self, document: u32) -> bool {
        self.superseded.binary_search(&document).is_err()
    }

    /// Whether that is so of all documents.
    pub(crate) fn all_latest(&self) -> bool {
        self.superseded.is_empty()
    }

    /// Path of a document.
    pub(crate) fn path(&self, document: u32) -> &str {
        self.name(self.first_names[document as usize])
    }

    /// Tokens of a document's text.
    pub(crate) fn num_tokens(&self, document: u32) -> usize {
        self.num_tokens[document as usize] as usize
    }

    /// Where a document's text is in the file of texts.
    pub(crate) fn text_range(&self, document: u32) -> Range<u64> {
        let at = document as usize;
        self.text_starts[at]..self.text_starts[at + 1]
    }

    /// End of the file of texts.
    pub(crate) fn texts_len(&self) -> u64 {
        self.text_starts.last().copied().unwrap_or_default()
    }

    /// The documents that have exactly this name, each with whether the name is only an alias.
    pub(crate) fn named(&self, name: &str) -> impl Iterator<Item = (u32, bool)> {
        let start = self.sorted_names.partition_point(|&k| self.name(k) < name);
        let rest = &self.sorted_names[start..];
        let same = rest.iter().take_while(move |&&k| self.name(k) == name);
        same.map(|&k| {
            let document = self.document_of(k);
            (document, k != self.first_names[document as usize])
        })
    }

    /// All names, one after the other.
    pub(crate) fn names(&self) -> &str {
        &self.names
    }

    /// Where in [`Catalog::names`] those of a range of documents are.
    pub(crate) fn names_range(&self, documents: &Range<u32>) -> Range<usize> {
        let start = |document: u32| self.name_starts[self.first_names[document as usize] as usize];
        start(documents.start)..start(documents.end)
    }

    /// The name that a byte of [`Catalog::names`] is in: the document it belongs to, and where
    /// it ends.
    pub(crate) fn name_at(&self, offset: usize) -> (u32, usize) {
        let next = self.name_starts.partition_point(|&start| start <= offset);
        (self.document_of(saturated(next - 1)), self.name_starts[next])
    }

    fn name(&self, name: u32) -> &str {
        let at = name as usize;
        &self.names[self.name_starts[at]..self.name_starts[at + 1]]
    }

    fn document_of(&self, name: u32) -> u32 {
        saturated(self.first_names.partition_point(|&first| first <= name)) - 1
    }
}

/// The sums of all the lengths before each, and of all.
fn sums<T: Copy + Default>(lengths: &[u32], add: impl Fn(T, u32) -> T) -> Vec<T> {
    let mut sums = Vec::with_capacity(lengths.len() + 1);
    let mut sum = T::default();
    sums.push(sum);
    for &len in lengths {
        sum = add(sum, len);
        sums.push(sum);
    }
    sums
}
