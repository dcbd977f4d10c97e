//! Queries (or finished contexts) from a file of any size, in its order, in bounded memory.
//!
//! The file is a JSON array or has a record on each line. Queries are looked up a chunk at a
//! time, on all cores; of what comes slowly, such as a pipe or a file that grows, as many as have
//! come. A bad record is an item of its own and ends nothing.

use std::collections::VecDeque;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use rayon::prelude::*;
use shared::{Context, IdTable, JobId, Query};
use tokio_util::sync::CancellationToken;

use crate::config::{FollowConfig, SourceConfig};
use crate::error::Error;
use crate::retrieve::Retriever;

mod array;
mod context_line;
mod fields;
mod follow;
mod input;
mod query;
mod records;

use follow::Follow;
pub(crate) use input::Division;
use input::{Input, NO_ARRAY, buffered};
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
    /// The number of the record, from 0, as `--start-index` counts.
    pub index: u64,
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

/// What standard input is called in reports.
const STDIN: &str = "<stdin>";

/// The contexts of a file, in its order; of standard input where the file is called `-`.
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
    if source.is_stdin()? {
        return contexts_from(std::io::stdin(), source, retriever, skip);
    }
    let (file, _) = source.file()?;
    let input = Input::file(file.clone()).map_err(Error::read(file))?;
    Contexts::new(input, source, retriever, skip)
}

/// The contexts of what `reader` reads, as those of a file; standard input in reports.
pub fn contexts_from<S>(
    reader: impl Read + Send + 'static,
    source: &SourceConfig,
    retriever: Option<Arc<Retriever>>,
    skip: S,
) -> Result<Contexts<S>, Error>
where
    S: FnMut(&JobId) -> bool,
{
    let input = Input::reader(buffered(reader), STDIN, Division::Lines);
    Contexts::new(input, source, retriever, skip)
}

/// The contexts of a file that grows, and of those that follow it under its name, until
/// `shutdown` or until nothing came for too long. The file need not be there yet.
pub fn follow<S>(
    source: &SourceConfig,
    config: &FollowConfig,
    retriever: Option<Arc<Retriever>>,
    skip: S,
    shutdown: &CancellationToken,
) -> Result<Contexts<S>, Error>
where
    S: FnMut(&JobId) -> bool,
{
    let (file, _) = source.file()?;
    check_followed(source)?;
    let follow = Follow::new(file.clone(), config.idle_timeout()?, shutdown.clone());
    Contexts::new(Input::followed(file.clone(), follow), source, retriever, skip)
}

/// Checks what can be known before anything is there to follow.
fn check_followed(source: &SourceConfig) -> Result<(), Error> {
    let (file, _) = source.file()?;
    if source.is_stdin()? {
        let text = "standard input is read to its end as it comes: expected a file to --follow";
        return Err(Error::Config(text.to_owned()));
    }
    let is_file = match file.metadata() {
        Ok(metadata) => metadata.is_file(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::read(file)(error)),
    };
    if !is_file {
        let text = format!("expected a regular file to --follow, given {}", file.display());
        return Err(Error::Config(text));
    }
    let opened = std::fs::File::open(file)
        .and_then(|opened| Records::open(buffered(opened), Division::Lines));
    match opened.map_err(Error::read(file))? {
        Records::Array(_) => Err(Error::Config(format!("{}: {NO_ARRAY}", file.display()))),
        _ => Ok(()),
    }
}

/// Contexts of the queries in one body.
pub(crate) fn body_contexts(
    reader: impl Read + Send + 'static,
    division: Division,
    retriever: Option<Arc<Retriever>>,
) -> Contexts<fn(&JobId) -> bool> {
    let input = Input::reader(buffered(reader), "<body>", division);
    Contexts::over(input, false, &SourceConfig::default(), (retriever, |_| false))
}

/// Queries in the file: what `contexts` gives, repeats and what is skipped included. `None` for
/// standard input and pipes, which can be read only once, and where the file can't be read.
pub fn count(source: &SourceConfig) -> Option<u64> {
    let (file, finished) = source.file().ok()?;
    let is_file = !source.is_stdin().ok()? && file.metadata().ok()?.is_file();
    let mut input = is_file.then(|| Input::file(file.clone()).ok()).flatten()?;
    let (mut num_to_pass, mut num_to_take) =
        (source.start_index, source.max_samples.unwrap_or(u64::MAX));
    let mut num_queries = 0;
    // An error ends the reading there too.
    while let Ok(Some(record)) = input.next() {
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

/// Fewer contexts at once where each may be long: at most some 64 MB of them.
fn chunk_size(max_tokens: usize) -> usize {
    ((64 << 20) / max_tokens.saturating_mul(8)).clamp(1, MAX_CHUNK)
}

/// Iterator of [`contexts`].
pub struct Contexts<S> {
    input: Input,
    /// Whether the records are contexts already.
    finished: bool,
    /// Number of the next record.
    index: u64,
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
    fn new(
        input: Input,
        source: &SourceConfig,
        retriever: Option<Arc<Retriever>>,
        skip: S,
    ) -> Result<Self, Error> {
        let (_, finished) = source.file()?;
        Ok(Self::over(input, finished, source, (retriever, skip)))
    }

    fn over(
        input: Input,
        finished: bool,
        source: &SourceConfig,
        (retriever, skip): (Option<Arc<Retriever>>, S),
    ) -> Self {
        Self {
            input,
            finished,
            index: 0,
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
        }
    }

    /// Reads records until there is a chunk to look up, or no more to read.
    fn read_ahead(&mut self) {
        let mut num_bytes = 0;
        loop {
            let waits = !self.pending.is_empty() && !self.input.is_ready();
            let enough = self.pending.len() >= self.max_chunk
                || (num_bytes >= MAX_CHUNK_BYTES && !self.pending.is_empty());
            if enough || waits {
                return;
            }
            if self.num_to_take == 0 {
                return self.input.close();
            }
            let next = match self.input.next() {
                Ok(Some(record)) if self.num_to_pass == 0 => {
                    num_bytes += record.content.as_ref().map_or(0, |bytes| bytes.len());
                    Ok(Some((record.line, read_record(record.content, self.finished))))
                }
                Ok(Some(_)) => Ok(None),
                Ok(None) => match self.input.advance() {
                    Ok(true) => continue,
                    Ok(false) => return,
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            // What comes after a shutdown may be a piece of a line.
            if self.input.is_shut_down() {
                return self.input.close();
            }
            match next {
                Ok(Some((line, results))) => self.add(line, results),
                Ok(None) => self.num_to_pass -= 1,
                Err(error) => {
                    let line = self.input.line();
                    self.input.close();
                    let reason = format!("cannot read on: {error}");
                    self.add(line, vec![Err(Rejected::nameless(reason))]);
                }
            }
            self.index += 1;
        }
    }

    /// Takes one record's results, unless they are repeats or to be skipped.
    fn add(&mut self, line: u64, results: Vec<Result<Pending, Rejected>>) {
        self.num_to_take -= 1;
        let place = Place { file: &self.input.name, line, index: self.index };
        for result in results {
            let pending = place.locate(result);
            match self.seen.note(&pending) {
                Novelty::New if pending.id().is_some_and(&mut self.skip) => {}
                Novelty::New => self.pending.push_back(pending),
                Novelty::Repeat => {}
                Novelty::Conflict(reason) => {
                    let rejected = Err(Rejected::nameless(reason));
                    self.pending.push_back(place.locate(rejected));
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
    fn body(&self) -> u32 {
        let mut hasher = DefaultHasher::new();
        match self {
            Self::Query(query) => {
                (&query.query, &query.target_api, &query.dependencies).hash(&mut hasher);
            }
            Self::Done(Ok(context)) => (&context.query, &context.context).hash(&mut hasher),
            Self::Done(Err(bad)) => (&bad.query, &bad.reason).hash(&mut hasher),
        }
        // Half of it: enough to tell another question under the same id.
        hasher.finish() as u32
    }

    fn id(&self) -> Option<&JobId> {
        match self {
            Self::Query(query) => Some(&query.id),
            Self::Done(Ok(context)) => Some(&context.id),
            Self::Done(Err(bad)) => bad.id.as_ref(),
        }
    }
}

/// The ids that came so far, each with a hash of what came with it: 20 bytes an id.
#[derive(Default)]
struct Seen {
    bodies: IdTable<u32>,
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
        let body = pending.body();
        match self.bodies.insert(id.digest(), body) {
            None => Novelty::New,
            Some(earlier) if earlier == body => {
                if !self.warned {
                    tracing::warn!(job_id = %id, "a query comes twice; repeats are left out");
                    self.warned = true;
                }
                Novelty::Repeat
            }
            Some(_) => {
                let reason = format!("id '{id}' already belongs to another query above");
                Novelty::Conflict(reason)
            }
        }
    }
}

/// Where a record stands.
struct Place<'f> {
    file: &'f std::path::Path,
    line: u64,
    index: u64,
}

impl Place<'_> {
    fn locate(&self, result: Result<Pending, Rejected>) -> Pending {
        result.unwrap_or_else(|rejected| {
            Pending::Done(Err(BadInput {
                file: self.file.to_owned(),
                line: self.line,
                index: self.index,
                id: rejected.id,
                query: rejected.query,
                reason: rejected.reason,
            }))
        })
    }
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
