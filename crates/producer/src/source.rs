//! Queries (or finished contexts) from a file of any size, in its order, in bounded memory.
//!
//! The file is a JSON array or has a record on each line. Queries are looked up a chunk at a
//! time, on all cores. A bad record is an item of its own and ends nothing.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use rayon::prelude::*;
use shared::{Context, JobId, Query};

use crate::config::SourceConfig;
use crate::error::Error;
use crate::retrieve::Retriever;

mod array;
mod context_line;
mod fields;
mod query;
mod records;

use records::Records;

/// Queries looked up at once; fewer where contexts are long.
const MAX_CHUNK: usize = 128;
/// Bytes of records read ahead.
const MAX_CHUNK_BYTES: usize = 4 << 20;

/// A record that is no query: where it is, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct BadInput {
    /// The file.
    pub file: PathBuf,
    /// The line that the record starts on, from 1.
    pub line: u64,
    /// Its id, where that can be read.
    pub id: Option<JobId>,
    /// Its question, where that can be read.
    pub query: Option<String>,
    /// What was expected and what was given.
    pub reason: String,
}

impl fmt::Display for BadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.reason)
    }
}

/// A [`BadInput`] before it is known where it stands.
struct Rejected {
    id: Option<JobId>,
    query: Option<String>,
    reason: String,
}

impl Rejected {
    fn nameless(reason: String) -> Self {
        Self {
            id: None,
            query: None,
            reason,
        }
    }
}

/// The contexts of a file, in its order.
///
/// Without a retriever, the contexts of queries are empty; a contexts file needs none. `skip` is
/// asked once for each id, in the order of the file and before anything is looked up: what it
/// says yes to costs nothing and doesn't appear, be it a query or a bad record.
pub fn contexts<'r, S>(
    source: &SourceConfig,
    retriever: Option<&'r Retriever>,
    skip: S,
) -> Result<Contexts<'r, S>, Error>
where
    S: FnMut(&JobId) -> bool,
{
    let (file, finished) = match (&source.queries_file, &source.contexts_file) {
        (Some(file), None) => (file.clone(), false),
        (None, Some(file)) => (file.clone(), true),
        (None, None) => {
            let text = "expected --queries-file or --contexts-file, given neither";
            return Err(Error::Config(text.to_owned()));
        }
        (Some(_), Some(_)) => {
            let text = "expected either --queries-file or --contexts-file, given both";
            return Err(Error::Config(text.to_owned()));
        }
    };
    let opened = File::open(&file).and_then(|opened| {
        if opened.metadata()?.is_dir() {
            return Err(std::io::ErrorKind::IsADirectory.into());
        }
        Records::open(BufReader::with_capacity(1 << 16, opened))
    });
    let records = opened.map_err(Error::read(&file))?;
    Ok(Contexts {
        file,
        records: Some(records),
        finished,
        num_to_pass: source.start_index,
        num_to_take: source.max_samples.unwrap_or(u64::MAX),
        max_chunk: retriever.map_or(MAX_CHUNK, |retriever| chunk_size(retriever.max_tokens())),
        retriever,
        skip,
        pending: VecDeque::new(),
        ready: VecDeque::new(),
    })
}

/// Fewer contexts at once where each may be long: at most some 64 MB of them.
fn chunk_size(max_tokens: usize) -> usize {
    ((64 << 20) / max_tokens.saturating_mul(8)).clamp(1, MAX_CHUNK)
}

/// Iterator of [`contexts`].
pub struct Contexts<'r, S> {
    file: PathBuf,
    /// `None` once the end is reached.
    records: Option<Records<BufReader<File>>>,
    /// Whether the records are contexts already.
    finished: bool,
    num_to_pass: u64,
    num_to_take: u64,
    max_chunk: usize,
    retriever: Option<&'r Retriever>,
    skip: S,
    pending: VecDeque<Pending>,
    ready: VecDeque<Result<Context, BadInput>>,
}

/// What a record has become before retrieval.
enum Pending {
    Query(Query),
    Done(Result<Context, BadInput>),
}

impl<S: FnMut(&JobId) -> bool> Iterator for Contexts<'_, S> {
    type Item = Result<Context, BadInput>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ready.is_empty() {
            self.read_ahead();
            let num = self.pending.len().min(self.max_chunk);
            let chunk = self.pending.drain(..num).collect();
            self.ready.extend(look_up(chunk, self.retriever));
        }
        self.ready.pop_front()
    }
}

impl<S: FnMut(&JobId) -> bool> Contexts<'_, S> {
    /// Reads records until there is a chunk to look up, or no more to read.
    fn read_ahead(&mut self) {
        let mut num_bytes = 0;
        while let Some(records) = &mut self.records {
            let enough = self.pending.len() >= self.max_chunk
                || (num_bytes >= MAX_CHUNK_BYTES && !self.pending.is_empty());
            if enough {
                return;
            }
            if self.num_to_take == 0 {
                self.records = None;
                return;
            }
            let (line, results) = match records.next() {
                Ok(Some(_)) if self.num_to_pass > 0 => {
                    self.num_to_pass -= 1;
                    continue;
                }
                Ok(Some(record)) => {
                    num_bytes += record.content.as_ref().map_or(0, |bytes| bytes.len());
                    (record.line, read_record(record.content, self.finished))
                }
                Ok(None) => {
                    self.records = None;
                    return;
                }
                Err(error) => {
                    let line = records.line();
                    self.records = None;
                    let reason = format!("cannot read on: {error}");
                    (line, vec![Err(Rejected::nameless(reason))])
                }
            };
            self.num_to_take -= 1;
            for result in results {
                let pending = located(&self.file, line, result);
                if !pending.id().is_some_and(&mut self.skip) {
                    self.pending.push_back(pending);
                }
            }
        }
    }
}

fn read_record(content: Result<&[u8], String>, finished: bool) -> Vec<Result<Pending, Rejected>> {
    match content {
        Err(reason) => vec![Err(Rejected::nameless(reason))],
        Ok(bytes) if finished => {
            vec![context_line::read(bytes).map(|context| Pending::Done(Ok(context)))]
        }
        Ok(bytes) => {
            let queries = query::read(bytes).into_iter();
            queries.map(|query| query.map(Pending::Query)).collect()
        }
    }
}

impl Pending {
    fn id(&self) -> Option<&JobId> {
        match self {
            Self::Query(query) => Some(&query.id),
            Self::Done(Ok(context)) => Some(&context.id),
            Self::Done(Err(bad)) => bad.id.as_ref(),
        }
    }
}

fn located(file: &std::path::Path, line: u64, result: Result<Pending, Rejected>) -> Pending {
    result.unwrap_or_else(|rejected| {
        Pending::Done(Err(BadInput {
            file: file.to_owned(),
            line,
            id: rejected.id,
            query: rejected.query,
            reason: rejected.reason,
        }))
    })
}

fn look_up(chunk: Vec<Pending>, retriever: Option<&Retriever>) -> Vec<Result<Context, BadInput>> {
    let done = |pending| match (pending, retriever) {
        (Pending::Done(done), _) => done,
        (Pending::Query(query), Some(retriever)) => Ok(retriever.retrieve(query)),
        (Pending::Query(query), None) => Ok(Context::empty(query)),
    };
    if retriever.is_some() {
        chunk.into_par_iter().map(done).collect()
    } else {
        chunk.into_iter().map(done).collect()
    }
}
