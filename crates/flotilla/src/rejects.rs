//! The report of input that can have no line in the output: it has no usable id.

use std::fs::File;
use std::io::Write;
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
    /// `None` where they are only shown.
    path: Option<PathBuf>,
    file: Option<File>,
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
        Self::at(Self::path(output_file))
    }

    /// An empty report at `path`, in place of an earlier run's.
    pub(crate) fn at(path: PathBuf) -> anyhow::Result<Self> {
        // Made once, to see now and not in the middle of the work that it can be.
        let cleared = File::create(&path).and_then(|_| std::fs::remove_file(&path));
        cleared
            .with_context(|| format!("cannot write the rejected input to {}", path.display()))?;
        Ok(Self { path: Some(path), ..Self::shown() })
    }

    /// A report on stderr alone.
    pub(crate) fn shown() -> Self {
        Self { path: None, file: None, count: 0, failure: None }
    }

    /// Adds one.
    pub(crate) fn add(&mut self, bad: &BadInput) {
        self.count += 1;
        match &self.path {
            None => tracing::warn!("{bad}"),
            Some(_) if self.count <= MAX_SHOWN => tracing::warn!("{bad}"),
            Some(path) if self.count == MAX_SHOWN + 1 => {
                tracing::warn!("more bad input is only written to {}", path.display());
            }
            Some(_) => {}
        }
        if self.failure.is_none() {
            self.failure = self.write(bad).err();
        }
    }

    /// One write a line, so that the report of a producer that follows its input is never behind.
    fn write(&mut self, bad: &BadInput) -> std::io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(File::create(path)?),
        };
        let reject =
            Reject { file: bad.file.display().to_string(), line: bad.line, reason: &bad.reason };
        let mut line = serde_json::to_vec(&reject)?;
        line.push(b'\n');
        file.write_all(&line)
    }

    /// Puts the report on disk; where it is, if there was anything to report.
    pub(crate) fn finish(self) -> anyhow::Result<Option<PathBuf>> {
        let synced = match (self.failure, &self.file) {
            (Some(error), _) => Err(error),
            (None, Some(file)) => file.sync_all(),
            (None, None) => return Ok(None),
        };
        let path = self.path.unwrap_or_default();
        synced.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Some(path))
    }
}
