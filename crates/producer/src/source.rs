//! Queries (or finished contexts) from a file of any size, in its order, in bounded memory.
//!
//! The file is a JSON array or has a record on each line. Queries are looked up a chunk at a
//! time, on all cores; of what comes slowly, such as a pipe or a file that grows, as many as have
//! come. A bad record is an item of its own and ends nothing.

use std::collections::VecDeque;
use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use shared::{Context, JobId, Query};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::config::{FollowConfig, SourceConfig};
use crate::error::Error;
use crate::known::{Known, MAX_ASKED};
use crate::retrieve::Retriever;

mod array;
mod context_line;
mod fields;
mod follow;
mod generation;
mod input;
mod query;
mod records;
mod seen;

use follow::Follow;
pub(crate) use input::Division;
use input::{Input, NO_ARRAY, buffered};
use records::Records;
use seen::{Novelty, Seen};

/// Queries looked up at once; fewer where contexts are long.
const MAX_CHUNK: usize = 128;
/// Bytes of records that are asked about at once.
const MAX_ASKED_BYTES: usize = 1 << 20;
/// Questions whose answers may be waited for at a time.
const MAX_QUESTIONS: usize = 4;

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
/// Without a retriever, the contexts of queries are empty; a contexts file needs none. An exact
/// repeat of an earlier query doesn't appear; another query with an id that came before is bad input.
pub fn contexts(
    source: &SourceConfig,
    retriever: Option<Arc<Retriever>>,
) -> Result<Contexts, Error> {
    if source.is_stdin()? {
        return contexts_from(std::io::stdin(), source, retriever);
    }
    let (file, _) = source.file()?;
    let input = Input::file(file.clone()).map_err(Error::input(file))?;
    Contexts::new(input, source, retriever)
}

/// The contexts of what `reader` reads, as those of a file; standard input in reports.
pub fn contexts_from(
    reader: impl Read + Send + 'static,
    source: &SourceConfig,
    retriever: Option<Arc<Retriever>>,
) -> Result<Contexts, Error> {
    let input = Input::reader(buffered(reader), STDIN, Division::Lines);
    Contexts::new(input, source, retriever)
}

/// The contexts of a file that grows, and of those that follow it under its name, until
/// `shutdown` or until nothing came for too long. The file need not be there yet.
pub fn follow(
    source: &SourceConfig,
    config: &FollowConfig,
    retriever: Option<Arc<Retriever>>,
    shutdown: &CancellationToken,
) -> Result<Contexts, Error> {
    let (file, _) = source.file()?;
    check_followed(source)?;
    let follow = Follow::new(file.clone(), config.idle_timeout()?, shutdown.clone());
    Contexts::new(Input::followed(file.clone(), follow), source, retriever)
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
        Err(error) => return Err(Error::input(file)(error)),
    };
    if !is_file {
        let text = format!("expected a regular file to --follow, given {}", file.display());
        return Err(Error::Config(text));
    }
    let opened = std::fs::File::open(file)
        .and_then(|opened| Records::open(buffered(opened), Division::Lines));
    match opened.map_err(Error::input(file))? {
        Records::Array(_) => Err(Error::Config(format!("{}: {NO_ARRAY}", file.display()))),
        _ => Ok(()),
    }
}

/// Contexts of the queries in one body.
pub(crate) fn body_contexts(
    reader: impl Read + Send + 'static,
    division: Division,
    retriever: Option<Arc<Retriever>>,
    known: Box<dyn Known>,
) -> Contexts {
    let input = Input::reader(buffered(reader), "<body>", division);
    Contexts { known, ..Contexts::over(input, false, &SourceConfig::default(), retriever) }
}

/// Queries in the file: what `contexts` gives, repeats and what is left out included. `None` for
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
pub struct Contexts {
    input: Input,
    /// Whether the records are contexts already.
    finished: bool,
    /// Number of the next record.
    index: u64,
    num_to_pass: u64,
    num_to_take: u64,
    max_chunk: usize,
    retriever: Option<Arc<Retriever>>,
    known: Box<dyn Known>,
    num_left_out: Arc<AtomicU64>,
    seen: Seen,
    /// Read, and not yet asked about.
    read: VecDeque<Pending>,
    questions: VecDeque<Question>,
    /// Not known to have their line.
    pending: VecDeque<Pending>,
    ready: VecDeque<Result<Context, BadInput>>,
}

/// Records, and the answer to which of them have their line: of those that have an id, in their order.
struct Question {
    records: Vec<Pending>,
    answer: oneshot::Receiver<Vec<bool>>,
}

/// What a record has become before retrieval.
enum Pending {
    Query(Query),
    Done(Result<Context, BadInput>),
}

impl Iterator for Contexts {
    type Item = Result<Context, BadInput>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() {
            if self.pending.is_empty() && !self.find_pending() {
                return None;
            }
            let num = self.pending.len().min(self.max_chunk);
            let chunk = self.pending.drain(..num).collect();
            self.ready.extend(look_up(chunk, self.retriever.as_deref()));
        }
        self.ready.pop_front()
    }
}

impl Contexts {
    fn new(
        input: Input,
        source: &SourceConfig,
        retriever: Option<Arc<Retriever>>,
    ) -> Result<Self, Error> {
        let (_, finished) = source.file()?;
        Ok(Self::over(input, finished, source, retriever))
    }

    fn over(
        input: Input,
        finished: bool,
        source: &SourceConfig,
        retriever: Option<Arc<Retriever>>,
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
            known: Box::new(|_: &JobId| false),
            num_left_out: Arc::default(),
            seen: Seen::default(),
            read: VecDeque::new(),
            questions: VecDeque::new(),
            pending: VecDeque::new(),
            ready: VecDeque::new(),
        }
    }

    /// Leaves out what `known` knows: it costs nothing and doesn't appear, be it a query or a bad
    /// record.
    pub fn leaving_out(self, known: impl Known + 'static) -> Self {
        Self { known: Box::new(known), ..self }
    }

    /// How many are left out so far.
    pub(crate) fn num_left_out(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.num_left_out)
    }

    /// Waits for records that are not known to have their line; false at the end.
    ///
    /// The next questions are on their way before an answer is waited for, but never does what was
    /// read wait for what has not come yet.
    fn find_pending(&mut self) -> bool {
        while self.pending.is_empty() {
            while self.questions.len() < MAX_QUESTIONS {
                self.read_ahead(self.questions.is_empty());
                if self.read.is_empty() {
                    break;
                }
                let num = self.read.len().min(MAX_ASKED);
                let records: Vec<Pending> = self.read.drain(..num).collect();
                let ids: Vec<&JobId> = records.iter().filter_map(Pending::id).collect();
                let answer = self.known.ask(&ids);
                self.questions.push_back(Question { records, answer });
            }
            let Some(Question { records, answer }) = self.questions.pop_front() else {
                return false;
            };
            let written = answer.blocking_recv().unwrap_or_default();
            let mut written = written.into_iter();
            let num_records = records.len();
            let is_left =
                |record: &Pending| record.id().is_none() || !written.next().unwrap_or(false);
            self.pending.extend(records.into_iter().filter(is_left));
            let num_left_out = num_records - self.pending.len();
            self.num_left_out.fetch_add(num_left_out as u64, Ordering::Relaxed);
        }
        true
    }

    /// Reads records until there are enough to ask about, no more to read, or no more that are
    /// there without waiting; for the first one it waits where it may.
    fn read_ahead(&mut self, may_wait: bool) {
        let mut num_bytes = 0;
        loop {
            let goes_on = self.input.is_ready() || (may_wait && self.read.is_empty());
            let enough = self.read.len() >= MAX_ASKED
                || (num_bytes >= MAX_ASKED_BYTES && !self.read.is_empty());
            if enough || !goes_on {
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

    /// Takes one record's results, unless they are repeats.
    fn add(&mut self, line: u64, results: Vec<Result<Pending, Rejected>>) {
        self.num_to_take -= 1;
        let place = Place { file: &self.input.name, line, index: self.index };
        for result in results {
            let pending = place.locate(result);
            match self.seen.note(&pending, &place) {
                Novelty::New => self.read.push_back(pending),
                Novelty::Repeat => {}
                Novelty::Conflict(reason) => {
                    let rejected = Err(Rejected::nameless(reason));
                    self.read.push_back(place.locate(rejected));
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
