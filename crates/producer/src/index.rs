//! The index of a corpus: built once, kept in the cache directory, opened at once afterwards.
//!
//! An index's directory is named by what it was built from: the content of the corpus, its type,
//! the tokenizer and the format. It is built under another name and renamed when it is complete,
//! so that a kill in between or two processes at once do no harm. What is damaged is built again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use tempfile::TempDir;

use crate::config::RetrievalConfig;
use crate::corpus::{Release, releases};
use crate::error::{Error, IndexError};
use crate::tokens::TokenCounter;

pub(crate) mod analyzer;
pub(crate) mod build;
pub(crate) mod catalog;
pub(crate) mod fingerprint;
mod seal;
pub(crate) mod search;

use catalog::Catalog;
use fingerprint::{KnownFiles, hex_sha256};
use search::SearchIndex;

/// Changes whenever an index of before can't be used any more.
const FORMAT_VERSION: u32 = 1;
/// Starts the name of a directory that an index is being built in.
const BUILDING: &str = "building-";
/// Age at which such a directory is what a killed process has left.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

const CATALOG_FILE: &str = "catalog.json";
const TEXTS_FILE: &str = "texts.bin";
const SEARCH_DIR: &str = "search";

/// An open index.
pub(crate) struct Index {
    pub(crate) catalog: Catalog,
    pub(crate) search: SearchIndex,
    texts: File,
    /// Where the index lives if it couldn't be kept.
    _unkept: Option<TempDir>,
}

impl Index {
    /// Opens the index of the configured corpus; builds it first where there is none.
    pub(crate) fn open(config: &RetrievalConfig, counter: &TokenCounter) -> Result<Self, Error> {
        let Some(corpus) = &config.corpus_path else {
            let text = "expected --corpus-path for retrieval, given none";
            return Err(Error::Config(text.to_owned()));
        };
        let releases = releases(corpus)?;
        let cache = config.resolved_cache_dir().and_then(|cache| {
            let created = fs::create_dir_all(&cache);
            match created {
                Ok(()) => Some(cache),
                Err(error) => {
                    warn_unkept(&cache, &error);
                    None
                }
            }
        });
        let known_file = cache.as_ref().map(|cache| known_file(cache, corpus));
        let known = known_file.as_deref().map(KnownFiles::read);
        let (hashes, keep) = known.unwrap_or_default().hashes(&releases)?;
        let key = key(config, counter, &releases, &hashes);
        let job = build::Build { releases: &releases, corpus_type: config.corpus_type, counter };
        let Some(cache) = cache else {
            return Self::build_unkept(&job);
        };
        if let Some(index) = Self::open_kept(&cache.join(&key)) {
            keep_known(known_file.as_deref(), &keep);
            return Ok(index);
        }
        match Self::build_kept(&job, &cache, &key) {
            Ok(index) => {
                keep_known(known_file.as_deref(), &keep);
                Ok(index)
            }
            Err(Error::Index { source, .. }) => {
                warn_unkept(&cache, &source);
                Self::build_unkept(&job)
            }
            Err(error) => Err(error),
        }
    }

    /// The text of a document.
    pub(crate) fn text(&self, document: u32) -> Result<String, IndexError> {
        let range = self.catalog.text_range(document);
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len];
        self.texts.read_exact_at(&mut bytes, range.start)?;
        String::from_utf8(bytes)
            .map_err(|_| IndexError::Damaged("a document is no longer UTF-8".to_owned()))
    }

    /// Opens an index that was built before; `None` where there is none that is whole.
    fn open_kept(dir: &Path) -> Option<Self> {
        if !dir.exists() {
            return None;
        }
        let start = Instant::now();
        match seal::check(dir).and_then(|()| Self::load(dir, None)) {
            Ok(index) => {
                tracing::debug!(elapsed_ms = start.elapsed().as_millis(), "index opened");
                Some(index)
            }
            Err(error) => {
                tracing::warn!(dir = %dir.display(), error = %Chain(&error), "kept index is unusable, building it again");
                None
            }
        }
    }

    fn build_kept(job: &build::Build<'_>, cache: &Path, key: &str) -> Result<Self, Error> {
        let dir = cache.join(key);
        let failed = |source: IndexError| Error::Index { dir: dir.clone(), source };
        remove_abandoned(cache);
        let building = tempfile::Builder::new()
            .prefix(BUILDING)
            .tempdir_in(cache)
            .map_err(|error| failed(error.into()))?;
        job.run(building.path())?;
        seal::write(building.path()).map_err(failed)?;
        let rename = || fs::rename(building.path(), &dir);
        if rename().is_err() {
            // Another process was faster, or what is there is damaged.
            if let Some(index) = Self::open_kept(&dir) {
                return Ok(index);
            }
            set_aside(cache, &dir).map_err(|error| failed(error.into()))?;
            if let Err(error) = rename() {
                return Self::open_kept(&dir).ok_or_else(|| failed(error.into()));
            }
        }
        // Renamed: there is nothing left to remove under the old name.
        drop(building);
        Self::load(&dir, None).map_err(failed)
    }

    fn build_unkept(job: &build::Build<'_>) -> Result<Self, Error> {
        let failed = |source: IndexError| Error::Index { dir: std::env::temp_dir(), source };
        let dir = tempfile::Builder::new()
            .prefix("flotilla-index-")
            .tempdir()
            .map_err(|error| failed(error.into()))?;
        job.run(dir.path())?;
        let path = dir.path().to_owned();
        Self::load(&path, Some(dir)).map_err(failed)
    }

    fn load(dir: &Path, unkept: Option<TempDir>) -> Result<Self, IndexError> {
        let columns = io::BufReader::new(File::open(dir.join(CATALOG_FILE))?);
        let columns = serde_json::from_reader(columns)
            .map_err(|error| IndexError::Damaged(error.to_string()))?;
        let catalog = Catalog::new(columns)?;
        let texts = File::open(dir.join(TEXTS_FILE))?;
        if texts.metadata()?.len() != catalog.texts_len() {
            return Err(IndexError::Damaged("its texts are cut short".to_owned()));
        }
        Ok(Self {
            catalog,
            search: SearchIndex::open(&dir.join(SEARCH_DIR))?,
            texts,
            _unkept: unkept,
        })
    }
}

/// An error with its sources, for a log.
pub(crate) struct Chain<'e>(pub(crate) &'e dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

fn warn_unkept(cache: &Path, error: &dyn std::error::Error) {
    tracing::warn!(
        dir = %cache.display(),
        error = %Chain(error),
        "the cache directory can't be written, the index is built anew for this run"
    );
}

/// Names an index by everything that it depends on.
fn key(
    config: &RetrievalConfig,
    counter: &TokenCounter,
    releases: &[Release],
    hashes: &[String],
) -> String {
    let mut parts = vec![
        FORMAT_VERSION.to_string(),
        config.corpus_type.name().to_owned(),
        counter.identity().to_owned(),
    ];
    for (release, hash) in releases.iter().zip(hashes) {
        parts.push(release.package.clone());
        parts.push(release.version.to_string());
        parts.push(hash.clone());
    }
    // No name of a file has a NUL in it.
    let mut key = hex_sha256(parts.join("\0").as_bytes());
    key.truncate(32);
    key
}

/// Where the hashes of a corpus's files are kept.
fn known_file(cache: &Path, corpus: &Path) -> PathBuf {
    let corpus = fs::canonicalize(corpus).unwrap_or_else(|_| corpus.to_owned());
    let name = hex_sha256(corpus.to_string_lossy().as_bytes());
    cache.join(format!("files-{}.json", &name[..16]))
}

fn keep_known(file: Option<&Path>, known: &KnownFiles) {
    let Some((file, dir)) = file.and_then(|file| Some((file, file.parent()?))) else {
        return;
    };
    let write = || -> io::Result<()> {
        let mut kept = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer(io::BufWriter::new(&mut kept), known)?;
        kept.persist(file)?;
        Ok(())
    };
    if let Err(error) = write() {
        // The files will be read once more next time, nothing else.
        tracing::debug!(%error, "hashes of the corpus not kept");
    }
}

fn set_aside(cache: &Path, dir: &Path) -> io::Result<()> {
    let aside = tempfile::Builder::new().prefix(BUILDING).tempdir_in(cache)?;
    // The directory goes with what was moved into it.
    fs::rename(dir, aside.path().join("damaged"))
}

fn remove_abandoned(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_string_lossy().starts_with(BUILDING);
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let age = modified.map(|modified| SystemTime::now().duration_since(modified));
        if is_ours && matches!(age, Ok(Ok(age)) if age > ABANDONED) {
            tracing::debug!(dir = %entry.path().display(), "removing an index left unfinished");
            if let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::debug!(%error, "not removed");
            }
        }
    }
}
