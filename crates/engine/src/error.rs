//! Why the engine could not do what was asked, by what the caller can do about it.

use std::path::PathBuf;

/// An error of the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model's files are missing something, are damaged, or ask for what is not supported: another model is needed.
    #[error("{0}")]
    Model(String),
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// There is not enough memory for what was asked: ask for less.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// A GPU or what it needs is missing, or it has failed: go on without it, or in a new process.
    #[error("{0}")]
    Device(String),
    /// A step or a request that cannot be computed; the model and its cache are as before.
    #[error("{0}")]
    Input(String),
    /// A request that can never be served: the caller rejects it and goes on with the others.
    #[error("{0}")]
    Reject(String),
}
