//! Where records come from: a file, a reader such as stdin, or the files that follow one another
//! under a name. The records of one after the other; what they mean is the caller's.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::PathBuf;

use super::follow::Follow;
use super::records::{Record, Records};

const BUFFER_BYTES: usize = 1 << 16;

pub(super) type Reader = BufReader<Box<dyn Read + Send>>;

pub(super) fn buffered(reader: impl Read + Send + 'static) -> Reader {
    BufReader::with_capacity(BUFFER_BYTES, Box::new(reader))
}

/// How a reader's text is divided into records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Division {
    /// By lines, or an array: what files are.
    Lines,
    /// JSON values one after another, however spread over lines, or an array.
    Values,
}

impl Division {
    /// Elements of an array that may be given up: any number in the user's own file, few in what
    /// comes over the network.
    pub(super) fn patience(self) -> u32 {
        match self {
            Self::Lines => u32::MAX,
            Self::Values => 16,
        }
    }
}

/// Records from somewhere.
pub(super) struct Input {
    /// Its name in reports.
    pub(super) name: PathBuf,
    records: Option<Records<Reader>>,
    rest: Rest,
    /// Whether more may come only after a while.
    live: bool,
}

/// What comes after the records at hand.
enum Rest {
    Nothing,
    /// Opened only when it is read, since that may wait.
    Reader(Reader, Division),
    Files(Follow),
}

impl Input {
    /// A file, from its start to its end.
    pub(super) fn file(path: PathBuf) -> io::Result<Self> {
        let file = File::open(&path)?;
        if file.metadata()?.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        // What is no regular file may be a pipe, with a slow writer.
        let live = !file.metadata()?.is_file();
        let reader = buffered(file);
        let (records, rest) = match live {
            false => (Some(Records::open(reader, Division::Lines)?), Rest::Nothing),
            true => (None, Rest::Reader(reader, Division::Lines)),
        };
        Ok(Self { name: path, records, rest, live })
    }

    /// A reader that may be slow.
    pub(super) fn reader(reader: Reader, name: &str, division: Division) -> Self {
        Self { name: name.into(), records: None, rest: Rest::Reader(reader, division), live: true }
    }

    /// All files that get a name, one after another.
    pub(super) fn followed(path: PathBuf, follow: Follow) -> Self {
        Self { name: path, records: None, rest: Rest::Files(follow), live: true }
    }

    /// Whether the next record is there without waiting for it.
    pub(super) fn is_ready(&self) -> bool {
        !self.live || self.records.as_ref().is_some_and(Records::is_ready)
    }

    /// The next record of those at hand; `None` at their end.
    pub(super) fn next(&mut self) -> io::Result<Option<Record<'_>>> {
        match &mut self.records {
            Some(records) => records.next(),
            None => Ok(None),
        }
    }

    /// Goes on to the next records, waiting for them; false if there are no more.
    pub(super) fn advance(&mut self) -> io::Result<bool> {
        self.records = None;
        let (reader, division) = match std::mem::replace(&mut self.rest, Rest::Nothing) {
            Rest::Nothing => return Ok(false),
            Rest::Reader(reader, division) => (reader, division),
            Rest::Files(mut follow) => {
                let Some(tail) = follow.next() else {
                    return Ok(false);
                };
                self.rest = Rest::Files(follow);
                (buffered(tail), Division::Lines)
            }
        };
        let records = Records::open(reader, division)?;
        if matches!((&self.rest, &records), (Rest::Files(_), Records::Array(_))) {
            return Err(io::Error::other(NO_ARRAY));
        }
        self.records = Some(records);
        Ok(true)
    }

    /// The line that reading has come to.
    pub(super) fn line(&self) -> u64 {
        self.records.as_ref().map_or(1, Records::line)
    }

    /// Whether what comes now is of no use any more: perhaps a piece of a line.
    pub(super) fn is_shut_down(&self) -> bool {
        matches!(&self.rest, Rest::Files(follow) if follow.is_shut_down())
    }

    /// Reads no more.
    pub(super) fn close(&mut self) {
        self.records = None;
        self.rest = Rest::Nothing;
    }
}

/// What is wrong with following an array: it has an end.
pub(super) const NO_ARRAY: &str =
    "expected one JSON object on each line in a file that is followed, given an array";
