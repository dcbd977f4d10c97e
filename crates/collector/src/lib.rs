//! Outcomes in, lines out: every answer exactly once, as a line of a JSONL file.
//!
//! [`Output`] is the file and the truth, [`Answered`] an index of the ids in it, [`Report`] what
//! was counted. [`run`] is the role: it takes outcomes off the queue and acks each only after its
//! line is on disk, so that a crash at any moment costs a repeated delivery and nothing else.

mod answered;
mod line;
mod report;
mod sink;

use std::time::Duration;

use shared::{Delivery, JobId, Queue, QueueError, Settled};
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;

pub use answered::Answered;
pub use line::Line;
pub use report::{Report, WorkerReport};
pub use sink::Output;

/// Most outcomes written and synced together.
const MAX_BATCH: usize = 128;
/// Longest time an outcome waits for others to share its sync.
const MAX_BATCH_AGE: Duration = Duration::from_millis(50);
/// How often to look whether everything expected has come.
const PULL_WAIT: Duration = Duration::from_millis(200);

/// Why the collector could not go on. Nothing that was acked is lost; what was not is delivered
/// again to the next collector.
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
    /// Reading, writing or syncing the output failed.
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
}

/// When a collector's work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Not yet known.
    Open,
    /// When this many new lines are written.
    AtLines(u64),
    /// When no outcome is left in the queue.
    WhenDrained,
}

/// What the collector tells as it goes.
pub trait Observer: Send {
    /// The lines of these outcomes are on disk. Also called with none, now and then, so that time
    /// can be told to pass.
    fn written(&mut self, outcomes: &[Settled]);
}

/// Writes every outcome of `queue` that isn't in `output` yet, and acks it.
///
/// Ends when `end` says so: at that many new lines, or as soon as no outcome is left. Any error ends it at
/// once, nothing acked that isn't on disk: a failed sync is never tried again, since the kernel
/// may have dropped the pages.
pub async fn run<Q: Queue<Settled>>(
    queue: &Q,
    output: &mut Output,
    end: watch::Receiver<End>,
    observer: &mut impl Observer,
) -> Result<(), Error> {
    let mut written = 0;
    loop {
        // Read before the pull: what ended the run was published before the end was told.
        let end = *end.borrow();
        if matches!(end, End::AtLines(lines) if written >= lines) {
            return Ok(());
        }
        let deliveries = pull_batch(queue).await?;
        if deliveries.is_empty() {
            if end == End::WhenDrained {
                return Ok(());
            }
            observer.written(&[]);
            continue;
        }
        let new = tokio::task::block_in_place(|| append(output, &deliveries))?;
        written += new.len() as u64;
        observer.written(&new);
        for delivery in deliveries {
            // An expired lease means that it comes again and is dropped as known.
            if let Err(error) = delivery.ack().await {
                tracing::debug!(%error, "late ack of an outcome");
            }
        }
    }
}

/// At least one outcome, and those that come soon after it.
async fn pull_batch<Q: Queue<Settled>>(queue: &Q) -> Result<Vec<Q::Delivery>, Error> {
    let mut batch = queue.pull(MAX_BATCH, PULL_WAIT).await?;
    let deadline = Instant::now() + MAX_BATCH_AGE;
    while !batch.is_empty() && batch.len() < MAX_BATCH {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        batch.extend(queue.pull(MAX_BATCH - batch.len(), left).await?);
    }
    Ok(batch)
}

/// Appends the lines that are new, one a job id, syncs them, and only then marks their ids.
fn append<D: Delivery<Settled>>(
    output: &mut Output,
    deliveries: &[D],
) -> Result<Vec<Settled>, Error> {
    let mut ids: Vec<&JobId> = Vec::new();
    let mut new = Vec::new();
    for delivery in deliveries {
        let settled = delivery.message();
        let id = &settled.context.id;
        if !output.answered().contains(id) && !ids.contains(&id) {
            ids.push(id);
            new.push(settled.clone());
        }
    }
    output.append(&new)?;
    Ok(new)
}
