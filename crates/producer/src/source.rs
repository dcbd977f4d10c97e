//! Queries (or finished contexts) from a file of any size, in its order, in bounded memory.
//!
//! The file is a JSON array or has a record on each line. Queries are looked up a chunk at a
//! time, on all cores. A bad record is an item of its own and ends nothing.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::BufReader;
use std::path::PathBuf;
use std::sync::Arc;

use rayon::prelude::*;
use shared::{Context, IdDigest, JobId, Query};

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

impl BadInput {
    /// What stands for it in the output: a context that failed, if it has an id.
    pub fn into_context(self) -> Result<Context, Self> {
        match self {
            Self { id: Some(id), query, reason, .. } => {
                Ok(Context::failed(id, query.unwrap_or_default(), reason))
            }
            nameless => Err(nameless),
        }
    }
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
        Self { id: None, query: None, reason }
    }
}

/// The contexts of a file, in its order.
///
/// Without a retriever, the contexts of queries are empty; a contexts file needs none. `skip` is
/// asked once for each id, in the order of the file and before anything is looked up: what it
/// says yes to costs nothing and doesn't appear, be it a query or a bad record. Nor does an exact
/// repeat of an earlier query; another query with an id that came before is bad input.
pub fn contexts<S>(
    source: &SourceConfig,
    retriever: Option<Arc<Retriever>>,
    skip: S,
) -> Result<Contexts<S>, Error>
where
    S: FnMut(&JobId) -> bool,
{
    let (file, finished, records) = open(source)?;
    Ok(Contexts {
        file,
        records: Some(records),
        finished,
        num_to_pass: source.start_index,
        num_to_take: source.max_samples.unwrap_or(u64::MAX),
        max_chunk: retriever
            .as_ref()
            .map_or(MAX_CHUNK, |retriever| chunk_size(retriever.max_tokens())),
        retriever,
        skip,
        seen: Seen::default(),
        pending: VecDeque::new(),
        ready: VecDeque::new(),
    })
}

/// Queries in the file: what `contexts` gives, repeats and what is skipped included. `None` for a
/// pipe, which can be read only once, and where the file can't be read.
pub fn count(source: &SourceConfig) -> Option<u64> {
    let is_file = source.file().ok()?.0.metadata().ok()?.is_file();
    let (_, finished, mut records) = is_file.then(|| open(source).ok()).flatten()?;
    let (mut num_to_pass, mut num_to_take) =
        (source.start_index, source.max_samples.unwrap_or(u64::MAX));
    let mut num_queries = 0;
    // An error ends the reading there too.
    while let Ok(Some(record)) = records.next() {
        if num_to_pass > 0 {
            num_to_pass -= 1;
        } else if num_to_take > 0 {
            num_to_take -= 1;
            num_queries += read_record(record.content, finished).len() as u64;
        } else {
            break;
        }
    }
    Some(num_queries)
}

type FileRecords = Records<BufReader<File>>;

/// The file, whether it holds finished contexts, and its records.
fn open(source: &SourceConfig) -> Result<(PathBuf, bool, FileRecords), Error> {
    let (file, finished) = source.file()?;
    let file = file.clone();
    let opened = File::open(&file).and_then(|opened| {
        if opened.metadata()?.is_dir() {
            return Err(std::io::ErrorKind::IsADirectory.into());
        }
        Records::open(BufReader::with_capacity(1 << 16, opened))
    });
    let records = opened.map_err(Error::read(&file))?;
    Ok((file, finished, records))
}

/// Fewer contexts at once where each may be long: at most some 64 MB of them.
fn chunk_size(max_tokens: usize) -> usize {
    ((64 << 20) / max_tokens.saturating_mul(8)).clamp(1, MAX_CHUNK)
}

/// Iterator of [`contexts`].
pub struct Contexts<S> {
    file: PathBuf,
    /// `None` once the end is reached.
    records: Option<Records<BufReader<File>>>,
    /// Whether the records are contexts already.
    finished: bool,
    num_to_pass: u64,
    num_to_take: u64,
    max_chunk: usize,
    retriever: Option<Arc<Retriever>>,
    skip: S,
    seen: Seen,
    pending: VecDeque<Pending>,
    ready: VecDeque<Result<Context, BadInput>>,
}

/// What a record has become before retrieval.
enum Pending {
    Query(Query),
    Done(Result<Context, BadInput>),
}

impl<S: FnMut(&JobId) -> bool> Iterator for Contexts<S> {
    type Item = Result<Context, BadInput>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ready.is_empty() {
            self.read_ahead();
            let num = self.pending.len().min(self.max_chunk);
            let chunk = self.pending.drain(..num).collect();
            self.ready.extend(look_up(chunk, self.retriever.as_deref()));
        }
        self.ready.pop_front()
    }
}

impl<S: FnMut(&JobId) -> bool> Contexts<S> {
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
                match self.seen.note(&pending) {
                    Novelty::New if pending.id().is_some_and(&mut self.skip) => {}
                    Novelty::New => self.pending.push_back(pending),
                    Novelty::Repeat => {}
                    Novelty::Conflict(reason) => {
                        let rejected = Err(Rejected::nameless(reason));
                        self.pending.push_back(located(&self.file, line, rejected));
                    }
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
    /// Hash of what was asked, to tell a repeat from a conflict.
    fn body(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        match self {
            Self::Query(query) => {
                (&query.query, &query.target_api, &query.dependencies).hash(&mut hasher);
            }
            Self::Done(Ok(context)) => (&context.query, &context.context).hash(&mut hasher),
            Self::Done(Err(bad)) => (&bad.query, &bad.reason).hash(&mut hasher),
        }
        hasher.finish()
    }

    fn id(&self) -> Option<&JobId> {
        match self {
            Self::Query(query) => Some(&query.id),
            Self::Done(Ok(context)) => Some(&context.id),
            Self::Done(Err(bad)) => bad.id.as_ref(),
        }
    }
}

/// The ids that came so far, each with a hash of what came with it: 24 bytes an id.
#[derive(Default)]
struct Seen {
    bodies: HashMap<IdDigest, u64>,
    warned: bool,
}

/// Whether a record is the first of its id.
enum Novelty {
    New,
    Repeat,
    Conflict(String),
}

impl Seen {
    fn note(&mut self, pending: &Pending) -> Novelty {
        let Some(id) = pending.id() else {
            return Novelty::New;
        };
        match self.bodies.insert(id.digest(), pending.body()) {
            None => Novelty::New,
            Some(earlier) if earlier == pending.body() => {
                if !self.warned {
                    tracing::warn!(job_id = %id, "a query comes twice; repeats are left out");
                    self.warned = true;
                }
                Novelty::Repeat
            }
            Some(earlier) => {
                self.bodies.insert(id.digest(), earlier);
                let reason = format!("id '{id}' already belongs to another query above");
                Novelty::Conflict(reason)
            }
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
