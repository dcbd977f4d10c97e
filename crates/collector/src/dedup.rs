//! What the collector needs of an index of the ids that have their line.
//!
//! The file is the truth and the index follows it: ids are marked only after their lines are on
//! disk, together with the [`Position`] up to which the file is indexed. An index that was lost,
//! rolled back or filled from another file shows by its position, and is filled again from
//! the file. Every implementation passes the suite in `dedup/conformance.rs`.

use std::fmt;
use std::future::Future;
use std::str::FromStr;

use shared::IdDigest;
use thiserror::Error;

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod memory;
pub mod redis;
#[cfg(any(test, feature = "conformance"))]
pub mod server;

/// How far the index has followed the file: every id in the file before `offset` is in the index,
/// and no other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Bytes indexed.
    pub offset: u64,
    /// Lines in them.
    pub lines: u64,
    /// Lines of failed jobs among them.
    pub failed: u64,
    /// The file's [`seal`](crate::Log::seal) there.
    pub seal: u64,
}

/// As the index keeps it: `offset lines failed seal`.
impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {:016x}", self.offset, self.lines, self.failed, self.seal)
    }
}

impl FromStr for Position {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let fields: Vec<&str> = text.split(' ').collect();
        let [offset, lines, failed, seal] = fields[..] else { return Err(()) };
        let number = |text: &str| text.parse().map_err(drop);
        let seal = u64::from_str_radix(seal, 16).map_err(drop)?;
        Ok(Self { offset: number(offset)?, lines: number(lines)?, failed: number(failed)?, seal })
    }
}

/// Why an index did not do what it was asked. Trouble that passes is no error: an index that
/// can't be reached is waited for.
#[derive(Debug, Error)]
pub enum DedupError {
    /// It isn't where this collector left it: it lost or rolled back something.
    #[error("the index of answered ids was rolled back")]
    RolledBack,
    /// A later collector has claimed it.
    #[error("another collector has claimed the index of answered ids: {by}")]
    TakenOver {
        /// What that one calls itself.
        by: String,
    },
    /// It can't serve, and waiting would not help.
    #[error("the index of answered ids refused")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// An index of the ids that have their line. All methods wait while it can't be reached; dropping
/// their futures leaves it either as before or as after.
pub trait Dedup: Send {
    /// Claims the index, so that every earlier claim is over. Gives how far it follows the file;
    /// `None` if it can't tell.
    fn claim(&mut self) -> impl Future<Output = Result<Option<Position>, DedupError>> + Send;

    /// How far it follows the file, after [`RolledBack`](DedupError::RolledBack): the claim is
    /// renewed unless a later collector has one.
    fn resume(&mut self) -> impl Future<Output = Result<Option<Position>, DedupError>> + Send;

    /// Forgets everything; the index now follows the file up to `start`.
    fn clear(&mut self, start: &Position) -> impl Future<Output = Result<(), DedupError>> + Send;

    /// Which of `ids` it has, provided that it stands `at` this position.
    fn known(
        &mut self,
        ids: &[IdDigest],
        at: &Position,
    ) -> impl Future<Output = Result<Vec<bool>, DedupError>> + Send;

    /// Moves on from one position to the next, adding the ids of the lines between, all or
    /// nothing. Gives which of them it had already.
    fn mark(
        &mut self,
        ids: &[IdDigest],
        span: Span<'_>,
    ) -> impl Future<Output = Result<Vec<usize>, DedupError>> + Send;

    /// Goes from one position to another of a file that lost the lines of these ids, all or
    /// nothing.
    fn forget(
        &mut self,
        ids: &[IdDigest],
        span: Span<'_>,
    ) -> impl Future<Output = Result<(), DedupError>> + Send;
}

/// From where to where an index moves.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// Where it must stand.
    pub from: &'a Position,
    /// Where it stands then.
    pub to: &'a Position,
}
