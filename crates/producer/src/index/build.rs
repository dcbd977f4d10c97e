//! Building an index: reads the corpus once, in bounded memory but for the table of documents.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::config::CorpusType;
use crate::corpus::{Document, Documents, Release, normalised_package};
use crate::error::{Error, IndexError};
use crate::tokens::TokenCounter;

use super::catalog::Columns;
use super::search::SearchWriter;
use super::{CATALOG_FILE, SEARCH_DIR, TEXTS_FILE};

/// Documents that are counted at once, on all cores, and the bytes at which there are enough.
const MAX_BATCH: usize = 512;
const MAX_BATCH_BYTES: usize = 4 << 20;
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// The scope of documents that no newer release of their package has again.
pub(crate) const LATEST: &str = "*";

/// The scope of the documents of one release.
pub(crate) fn release_scope(package: &str, version: &str) -> String {
    format!("r:{}\0{version}", normalised_package(package))
}

/// The scope of a package's documents, each path in its newest release.
pub(crate) fn package_scope(package: &str) -> String {
    format!("p:{}", normalised_package(package))
}

/// What an index is built from.
pub(super) struct Build<'b> {
    pub(super) releases: &'b [Release],
    pub(super) corpus_type: CorpusType,
    pub(super) counter: &'b TokenCounter,
}

impl Build<'_> {
    /// Builds the index in an empty directory.
    pub(super) fn run(&self, dir: &Path) -> Result<(), Error> {
        let failed = |source: IndexError| Error::Index { dir: dir.to_owned(), source };
        let start = Instant::now();
        tracing::info!(num_releases = self.releases.len(), "indexing the corpus");
        let mut sink = Sink::create(dir).map_err(failed)?;
        let mut paths = HashSet::new();
        let mut num_bad = 0;
        let mut reported = start;
        for (k, release) in self.releases.iter().enumerate() {
            let same_package = k.checked_sub(1).is_some_and(|before| {
                normalised_package(&self.releases[before].package)
                    == normalised_package(&release.package)
            });
            if !same_package {
                paths.clear();
            }
            sink.columns.push_release(&release.package, &release.version);
            let mut documents = Documents::open(release, self.corpus_type)?;
            // A path that a file has twice is as new the second time.
            let mut new_paths = Vec::new();
            loop {
                let batch = read_batch(&mut documents)?;
                if batch.is_empty() {
                    break;
                }
                let counted: Vec<(Document, usize)> = batch
                    .into_par_iter()
                    .map(|document| {
                        let num_tokens = self.counter.count(&document.text);
                        (document, num_tokens)
                    })
                    .collect();
                for (document, num_tokens) in counted {
                    let is_latest = !paths.contains(&document.path);
                    sink.add(release, &document, num_tokens, is_latest).map_err(failed)?;
                    new_paths.push(document.path);
                }
                if reported.elapsed() > PROGRESS_INTERVAL {
                    reported = Instant::now();
                    tracing::info!(num_documents = sink.columns.num_documents(), "indexing");
                }
            }
            paths.extend(new_paths);
            num_bad += documents.num_bad();
        }
        let num_documents = sink.columns.num_documents();
        sink.finish(dir).map_err(failed)?;
        tracing::info!(
            num_documents,
            num_bad,
            elapsed_ms = start.elapsed().as_millis(),
            "corpus indexed"
        );
        Ok(())
    }
}

fn read_batch(documents: &mut Documents<'_>) -> Result<Vec<Document>, Error> {
    let mut batch = Vec::new();
    let mut num_bytes = 0;
    while batch.len() < MAX_BATCH && num_bytes < MAX_BATCH_BYTES {
        let Some(document) = documents.next()? else {
            break;
        };
        num_bytes += document.text.len();
        batch.push(document);
    }
    Ok(batch)
}

/// The three parts of an index while they are written.
struct Sink {
    columns: Columns,
    texts: BufWriter<File>,
    search: SearchWriter,
}

impl Sink {
    fn create(dir: &Path) -> Result<Self, IndexError> {
        let search_dir = dir.join(SEARCH_DIR);
        std::fs::create_dir(&search_dir)?;
        Ok(Self {
            columns: Columns::default(),
            texts: BufWriter::with_capacity(1 << 18, File::create(dir.join(TEXTS_FILE))?),
            search: SearchWriter::create(&search_dir)?,
        })
    }

    fn add(
        &mut self,
        release: &Release,
        document: &Document,
        num_tokens: usize,
        is_latest: bool,
    ) -> Result<(), IndexError> {
        let number = self.columns.num_documents();
        let mut scopes = vec![release_scope(&release.package, &release.version.to_string())];
        if is_latest {
            scopes.push(package_scope(&release.package));
            scopes.push(LATEST.to_owned());
        }
        self.search.add(number, document.names(), document.body(), &scopes)?;
        self.texts.write_all(document.text.as_bytes())?;
        self.columns.push(document.names(), &document.text, num_tokens, is_latest);
        Ok(())
    }

    fn finish(mut self, dir: &Path) -> Result<(), IndexError> {
        self.texts.flush()?;
        let mut catalog = BufWriter::new(File::create(dir.join(CATALOG_FILE))?);
        serde_json::to_writer(&mut catalog, &self.columns)
            .map_err(|error| IndexError::Io(error.into()))?;
        catalog.flush()?;
        self.search.finish()
    }
}
