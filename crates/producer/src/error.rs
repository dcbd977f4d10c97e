//! What ends the producer's work as a whole. A bad record doesn't: it is a [`crate::BadInput`].

use std::io;
use std::path::{Path, PathBuf};

/// Why a source or a corpus could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The settings contradict each other or name impossible values.
    #[error("{0}")]
    Config(String),
    /// A file or directory that the user named could not be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// What it is of.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The directory holds no `<package>/<version>.jsonl`.
    #[error("expected <package>/<version>.jsonl in the corpus {}, found no such file", .0.display())]
    EmptyCorpus(PathBuf),
    /// The tokenizer's text isn't one.
    #[error("the model's tokenizer.json is not a tokenizer: {0}")]
    Tokenizer(String),
    /// The index could not be written or read, the fallbacks included.
    #[error("cannot build the index of the corpus in {}", dir.display())]
    Index {
        /// The directory of the index.
        dir: PathBuf,
        /// What went wrong in it.
        source: IndexError,
    },
}

impl Error {
    /// Of the corpus.
    pub(crate) fn corpus(path: &Path) -> impl FnOnce(io::Error) -> Self {
        Self::read("the corpus", path)
    }

    /// Of the queries or contexts.
    pub(crate) fn input(path: &Path) -> impl FnOnce(io::Error) -> Self {
        Self::read("the input", path)
    }

    fn read(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Read { what, path, source }
    }
}

/// What can go wrong with an index on disk. Building it again is the cure for most.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Its files could not be read or written.
    #[error("the index cannot be read or written")]
    Io(#[from] io::Error),
    /// The full-text index refused.
    #[error("the full-text index failed")]
    Search(#[from] tantivy::TantivyError),
    /// A file isn't what was written.
    #[error("the index is damaged: {0}")]
    Damaged(String),
}
