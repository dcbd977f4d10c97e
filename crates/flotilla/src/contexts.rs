//! `flotilla contexts`: a context for each query, written to a file, without a model.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use producer::{BadInput, Retriever};
use shared::Context;

use crate::cli::{self, ContextsOptions};
use crate::rejects::Rejects;
use crate::{FINISHED_WITH_FAILURES, telemetry};

/// Runs `flotilla contexts`.
pub(crate) fn main(options: &ContextsOptions) -> anyhow::Result<ExitCode> {
    if options.retrieval.corpus_path.is_none() {
        bail!("contexts are retrieved from a corpus: give --corpus-path");
    }
    let tokenizer = cli::model_path(options.model_path.as_ref())?.join("tokenizer.json");
    let retriever = Retriever::open(&options.retrieval, Some(&tokenizer))?;
    let contexts = producer::contexts(&options.source, Some(Arc::new(retriever)), |_id| false)?;
    let mut rejects = Rejects::beside(&options.output_file)?;
    let mut sink = Sink::create(&options.output_file)?;
    let started = Instant::now();
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
        let special = path.metadata().is_ok_and(|metadata| !metadata.is_file());
        // A pipe or device has no name to take: it is written to as it is.
        let partial = if special { path.to_owned() } else { suffixed(path, ".partial") };
        let file = File::options().write(true).create(true).truncate(!special).open(&partial);
        let file = file.with_context(|| format!("cannot create {}", partial.display()))?;
        Ok(Self { path: path.to_owned(), partial, file: BufWriter::new(file) })
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

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// What was found how.
#[derive(Default)]
struct Counts {
    by_method: BTreeMap<String, u64>,
    failed: u64,
    rejected: u64,
    retrieval_seconds: f64,
}

impl Counts {
    fn add(&mut self, context: &Context) {
        if context.success {
            let method = format!("{:?}", context.retrieval_method);
            *self.by_method.entry(method).or_default() += 1;
            self.retrieval_seconds += context.retrieval_time;
        } else {
            self.failed += 1;
        }
    }

    fn statistics(&self, elapsed: f64) -> String {
        let found: u64 = self.by_method.values().sum();
        let of = |method: &str| self.by_method.get(method).copied().unwrap_or(0);
        let mut text = format!(
            "CONTEXT GENERATION STATISTICS\n{}\n\
             Total samples processed: {}\n\
             Exact API matches: {}\n\
             String matches: {}\n\
             RAG fallbacks: {}\n\
             Nothing found: {}\n\
             Errors: {}\n",
            "=".repeat(60),
            found + self.failed,
            of("ExactApiMatch"),
            of("RagStringMatch"),
            of("RagFallback"),
            of("None"),
            self.failed + self.rejected,
        );
        if found > 0 {
            let average = 1e3 * self.retrieval_seconds / found as f64;
            text += &format!("Average retrieval time: {average:.2}ms\n");
        }
        text + &format!("Elapsed time: {elapsed:.2}s\n")
    }
}
