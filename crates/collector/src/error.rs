//! Why the collector could not go on.

use shared::QueueError;
use thiserror::Error;

use crate::Step;

/// Why the collector could not go on. Every one of these ends it with nothing acked that isn't on
/// disk: what was not acked is delivered again to the next collector.
#[derive(Debug, Error)]
pub enum Error {
    /// The output isn't a regular file, so that no later run could read what is answered.
    #[error("{path} is not a regular file; results need one, since it is what a resumed run reads")]
    NotAFile {
        /// The output.
        path: String,
    },
    /// Another process writes this output.
    #[error("{path} is being written by another flotilla process")]
    Locked {
        /// The output.
        path: String,
    },
    /// Waiting for another process to let go of the output was called off.
    #[error("interrupted while waiting for another flotilla process to let go of {path}")]
    Interrupted {
        /// The output.
        path: String,
    },
    /// The output holds something that flotilla didn't write.
    #[error(
        "{path}:{line}: expected a line of flotilla's results, {reason}; choose another output file or remove that line"
    )]
    Foreign {
        /// The output.
        path: String,
        /// Number of the line, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// Reading, writing or syncing the output failed. Never tried again: after a failed sync the
    /// kernel may have dropped the pages, and only opening the file anew tells what it holds.
    #[error("{action} {path}")]
    Io {
        /// What was being done, such as `cannot write`.
        action: &'static str,
        /// The file.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The queue failed.
    #[error("cannot take outcomes from the queue")]
    Queue(#[from] QueueError),
    /// Another collector has claimed the index of this run: this one has no say any more.
    #[error(
        "another collector has taken over the run that was written to {path}: {by} writes it now; one \
         output has the whole run only if all of its collectors write the same file"
    )]
    TakenOver {
        /// The output.
        path: String,
        /// The other one's output and machine, as it says.
        by: String,
    },
    /// The index of ids refuses to serve, and waiting would not help.
    #[error("cannot use the index of answered ids")]
    Dedup(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A test's probe asked for a crash here.
    #[error("stopped by a test's probe after the step '{0}'")]
    Stopped(Step),
}
