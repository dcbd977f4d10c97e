//! The report of input that can have no line in the output: it has no usable id.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use producer::BadInput;
use serde::Serialize;

use crate::files::suffixed;

/// Bad input also shown on stderr.
const MAX_SHOWN: u64 = 10;

/// `<output>.rejected.jsonl`: a line `{file, line, reason}` for each. There is no file where
/// there is nothing to report.
pub(crate) struct Rejects {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    count: u64,
    failure: Option<std::io::Error>,
}

#[derive(Serialize)]
struct Reject<'a> {
    file: String,
    line: u64,
    reason: &'a str,
}

impl Rejects {
    /// The report's path for this output.
    pub(crate) fn path(output_file: &Path) -> PathBuf {
        suffixed(output_file, ".rejected.jsonl")
    }

    /// An empty report beside `output_file`, in place of an earlier run's.
    pub(crate) fn beside(output_file: &Path) -> anyhow::Result<Self> {
        let path = Self::path(output_file);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot replace {}", path.display()))
            }
            _ => Ok(Self { path, file: None, count: 0, failure: None }),
        }
    }

    /// Adds one.
    pub(crate) fn add(&mut self, bad: &BadInput) {
        self.count += 1;
        if self.count <= MAX_SHOWN {
            tracing::warn!("{bad}");
        } else if self.count == MAX_SHOWN + 1 {
            tracing::warn!("more bad input is only written to {}", self.path.display());
        }
        if self.failure.is_none() {
            self.failure = self.write(bad).err();
        }
    }

    fn write(&mut self, bad: &BadInput) -> std::io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(BufWriter::new(File::create(&self.path)?)),
        };
        let reject =
            Reject { file: bad.file.display().to_string(), line: bad.line, reason: &bad.reason };
        serde_json::to_writer(&mut *file, &reject)?;
        file.write_all(b"\n")
    }

    /// Puts the report on disk.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        let synced = match (self.failure, self.file) {
            (Some(error), _) => Err(error),
            (None, Some(mut file)) => file.flush().and_then(|()| file.get_ref().sync_all()),
            (None, None) => Ok(()),
        };
        synced.with_context(|| format!("cannot write {}", self.path.display()))
    }
}
