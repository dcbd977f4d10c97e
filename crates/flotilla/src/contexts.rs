//! `flotilla contexts`: a context for each query, written to a file, without a model.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use producer::{BadInput, Retriever};
use rustix::fs::{FlockOperation, flock};
use shared::{Context, RetrievalMethod};

use crate::cli::{ContextsOptions, Usage};
use crate::files::{self, suffixed};
use crate::hub::Need;
use crate::rejects::Rejects;
use crate::{FINISHED_WITH_FAILURES, produce, telemetry};

/// Between two lines that tell how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// Runs `flotilla contexts`.
pub(crate) fn main(options: &ContextsOptions) -> anyhow::Result<ExitCode> {
    options.retrieval.validate()?;
    if options.retrieval.corpus_path.is_none() || options.source.contexts_file.is_some() {
        let text = "contexts are retrieved for queries from a corpus: expected --queries-file and \
                    --corpus-path";
        return Err(Usage(text.to_owned()).into());
    }
    files::check(options.source.file()?.0, &options.output_file)?;
    let tokenizer = produce::tokenizer_json(&options.model_path.find(Need::Tokenizer)?)?;
    let mut sink = Sink::create(&options.output_file)?;
    let retriever = Retriever::open(&options.retrieval, Some(&tokenizer))?;
    let contexts = producer::contexts(&options.source, Some(Arc::new(retriever)))?;
    let mut rejects = Rejects::beside(&options.output_file)?;
    let started = Instant::now();
    let mut told = started;
    let mut counts = Counts::default();
    for next in contexts {
        match next.or_else(BadInput::into_context) {
            Ok(context) => {
                counts.add(&context);
                sink.write(&context)?;
            }
            Err(bad) => {
                counts.rejected += 1;
                rejects.add(&bad);
            }
        }
        if told.elapsed() >= PROGRESS_INTERVAL {
            told = Instant::now();
            let done = counts.succeeded() + counts.failed;
            tracing::info!("{done} done, {} failed", counts.failed);
        }
    }
    sink.finish()?;
    rejects.finish()?;
    telemetry::print(&counts.statistics(started.elapsed().as_secs_f64()))?;
    let failures = counts.failed + counts.rejected;
    Ok(if failures > 0 { ExitCode::from(FINISHED_WITH_FAILURES) } else { ExitCode::SUCCESS })
}

/// A file that gets its name only once it is whole.
struct Sink {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
}

impl Sink {
    fn create(path: &Path) -> anyhow::Result<Self> {
        // A link stays, what it points to is replaced.
        let path = path.canonicalize().unwrap_or_else(|_new| path.to_owned());
        let is_special = path.metadata().is_ok_and(|metadata| !metadata.is_file());
        // A pipe or device has no name to take: it is written to as it is.
        let partial = if is_special { path.clone() } else { suffixed(&path, ".partial") };
        let failed = || format!("cannot create {}", partial.display());
        let file = File::options().write(true).create(true).truncate(false).open(&partial);
        let file = file.with_context(failed)?;
        if !is_special {
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                bail!("{} is being written by another flotilla process", path.display());
            }
            file.set_len(0).with_context(failed)?;
        }
        Ok(Self { path, partial, file: BufWriter::new(file) })
    }

    fn write(&mut self, context: &Context) -> anyhow::Result<()> {
        let written = serde_json::to_writer(&mut self.file, context)
            .map_err(std::io::Error::from)
            .and_then(|()| self.file.write_all(b"\n"));
        written.with_context(|| format!("cannot write {}", self.partial.display()))
    }

    fn finish(mut self) -> anyhow::Result<()> {
        let flushed = self.file.flush();
        flushed.with_context(|| format!("cannot write {}", self.partial.display()))?;
        if self.partial != self.path {
            let named = self.file.get_ref().sync_all();
            named
                .and_then(|()| std::fs::rename(&self.partial, &self.path))
                .with_context(|| format!("cannot write {}", self.path.display()))?;
        }
        Ok(())
    }
}

/// What was found how.
#[derive(Default)]
struct Counts {
    exact: u64,
    by_string: u64,
    fallback: u64,
    nothing: u64,
    failed: u64,
    rejected: u64,
    retrieval_seconds: f64,
}

impl Counts {
    fn add(&mut self, context: &Context) {
        if !context.success {
            self.failed += 1;
            return;
        }
        self.retrieval_seconds += context.retrieval_time;
        *match context.retrieval_method {
            RetrievalMethod::ExactApiMatch => &mut self.exact,
            RetrievalMethod::RagStringMatch => &mut self.by_string,
            RetrievalMethod::RagFallback => &mut self.fallback,
            RetrievalMethod::None => &mut self.nothing,
        } += 1;
    }

    fn succeeded(&self) -> u64 {
        self.exact + self.by_string + self.fallback + self.nothing
    }

    fn statistics(&self, elapsed: f64) -> String {
        let succeeded = self.succeeded();
        let mut text = format!(
            "CONTEXT GENERATION STATISTICS\n{}\n\
             Total samples processed: {}\n\
             Exact API matches: {}\n\
             String matches: {}\n\
             RAG fallbacks: {}\n\
             Nothing found: {}\n\
             Errors: {}\n",
            "=".repeat(60),
            succeeded + self.failed,
            self.exact,
            self.by_string,
            self.fallback,
            self.nothing,
            self.failed + self.rejected,
        );
        if succeeded > 0 {
            let average = 1e3 * self.retrieval_seconds / succeeded as f64;
            text += &format!("Average retrieval time: {average:.2}ms\n");
        }
        text + &format!("Elapsed time: {elapsed:.2}s\n")
    }
}
