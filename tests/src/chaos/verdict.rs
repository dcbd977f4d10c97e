//! Whether a round ended as it must: everything drained, one line for each id and no other; and what
//! it cost, read from what the servers have counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_nats::jetstream;
use serde_json::Value;
use shared::queue::nats::NatsConfig;
use tokio::runtime::Runtime;

use super::plan::Kind;
use super::roles::{Fleet, POISON, RUN};
use super::wipe::Wiped;

/// What a round survived, and what it cost.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed of its faults.
    pub seed: u64,
    /// How many faults of each kind happened.
    pub faults: BTreeMap<Kind, usize>,
    /// How long it took.
    pub time: Duration,
    /// How long the rest took after the last fault.
    pub drained: Duration,
    /// What the servers counted.
    pub counted: Counted,
    /// What the wiped store cost after that, if it was.
    pub wiped: Option<Wiped>,
    /// What the lines tell.
    pub lines: Lines,
}

/// What the servers counted.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// Jobs stored, those of repeated publishes included that the queue no longer knew.
    pub jobs: u64,
    /// Outcomes stored: answers that were computed and published.
    pub outcomes: u64,
}

/// What the lines tell.
#[derive(Clone, Copy, Debug)]
pub struct Lines {
    /// How many there are: one for each id.
    pub count: u64,
    /// Those whose job was delivered more than once.
    pub redelivered: u64,
    /// Deliveries of those jobs beyond the first, as far as the lines know.
    pub redeliveries: u64,
    /// Most deliveries of one job.
    pub max_attempts: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, faults, time, drained, counted, wiped, lines } = self;
        let total: usize = faults.values().sum();
        writeln!(f, "every id has exactly one line (seed {seed})")?;
        writeln!(f, "  {total:>7} faults survived:")?;
        for (kind, count) in faults.iter().filter(|(_, count)| **count > 0) {
            writeln!(f, "          {count:>5}  {kind}")?;
        }
        let queries = lines.count - wiped.map_or(0, |wiped| wiped.queries as u64);
        let again = counted.jobs.saturating_sub(queries);
        let repeats = counted.outcomes.saturating_sub(queries);
        let share = |part: u64| 100.0 * part as f64 / queries.max(1) as f64;
        writeln!(f, "  {queries:>7} queries, each with its line")?;
        writeln!(
            f,
            "  {:>7} jobs stored, {again} of them published again by producers that were run again",
            counted.jobs
        )?;
        writeln!(
            f,
            "  {:>7} deliveries beyond the first, of {} jobs that became lines, at most {} of one job",
            lines.redeliveries, lines.redelivered, lines.max_attempts
        )?;
        writeln!(
            f,
            "  {:>7} answers stored, {repeats} of them work done twice ({:.1} %) and dropped: {again} for jobs published again, {} for jobs delivered again ({:.1} %)",
            counted.outcomes,
            share(repeats),
            repeats.saturating_sub(again),
            share(repeats.saturating_sub(again))
        )?;
        if let Some(wiped) = wiped {
            writeln!(f, "  {wiped}")?;
        }
        write!(
            f,
            "  {:>6.1}s in all, {:.1}s of them for what was left after the last fault",
            time.as_secs_f64(),
            drained.as_secs_f64()
        )
    }
}

/// Looks at what has come of the ids: an answer of each, but for the poisonous job.
pub(super) struct Watch {
    ids: BTreeSet<String>,
    /// Whether one of them is the poisonous job's.
    is_poisoned: bool,
    output: PathBuf,
    url: String,
    runtime: Runtime,
}

impl Watch {
    /// Of these ids, each fed once.
    pub(super) fn new(fleet: &Fleet, ids: Vec<String>) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let ids = ids.into_iter().collect();
        Self {
            ids,
            is_poisoned: fleet.is_poisoned,
            output: fleet.output(),
            url: fleet.nats.url(),
            runtime,
        }
    }

    /// These ids too, each fed once.
    pub(super) fn expect(&mut self, ids: Vec<String>) {
        self.ids.extend(ids);
    }

    /// What is not at its end yet, if anything.
    pub(super) fn missing(&self) -> Result<Option<String>, String> {
        let text = std::fs::read_to_string(&self.output).unwrap_or_default();
        let lines = text.lines().count();
        if lines < self.ids.len() {
            let queued = self.queued()?;
            return Ok(Some(format!("{lines} of {} lines; queued: {queued:?}", self.ids.len())));
        }
        let queued = self.queued()?;
        Ok((queued != (0, 0)).then(|| format!("all {lines} lines, but queued: {queued:?}")))
    }

    /// Jobs and outcomes that the queues hold.
    fn queued(&self) -> Result<(u64, u64), String> {
        let config = NatsConfig { url: self.url.clone(), ..NatsConfig::default() };
        let counting = async {
            let fleet = shared::queue::nats::Fleet::connect(&config).await?;
            let jobs = fleet.num_jobs_queued().await?.into_values().sum();
            Ok((jobs, fleet.num_outcomes_queued().await?.into_values().sum()))
        };
        let counted: Result<_, shared::queue::nats::FleetError> = self.runtime.block_on(counting);
        counted.map_err(|error| format!("cannot count what is queued: {error}"))
    }

    /// What the servers have counted.
    pub(super) fn count(&self) -> Result<Counted, String> {
        let counting = async {
            let context = jetstream::new(async_nats::connect(&self.url).await?);
            let jobs = context.get_stream("FLOTILLA_JOBS").await?;
            let dead = context.get_stream("FLOTILLA_DEAD").await?;
            let (letters, expected) =
                (dead.cached_info().state.messages, u64::from(self.is_poisoned));
            if letters != expected {
                return Err(format!("expected {expected} dead letters, found {letters}").into());
            }
            let results = context.get_stream("FLOTILLA_RESULTS").await?;
            Ok(Counted {
                jobs: jobs.cached_info().state.last_sequence,
                outcomes: results.cached_info().state.last_sequence,
            })
        };
        let counted: Result<_, async_nats::Error> = self.runtime.block_on(counting);
        counted.map_err(|error| format!("cannot count: {error}"))
    }

    /// One line for each id, and no other; an error says which is wrong.
    pub(super) fn check(&self) -> Result<Lines, String> {
        let text = std::fs::read_to_string(&self.output).map_err(|error| error.to_string())?;
        if !text.ends_with('\n') && !text.is_empty() {
            return Err("the last line is torn".to_owned());
        }
        let mut lines = Lines { count: 0, redelivered: 0, redeliveries: 0, max_attempts: 0 };
        let mut seen = BTreeSet::new();
        for (number, line) in text.lines().enumerate() {
            let wrong = |what: &str| format!("line {}: {what}: {line}", number + 1);
            let line: Value = serde_json::from_str(line).map_err(|e| wrong(&e.to_string()))?;
            let Some(id) = line["id"].as_str() else { return Err(wrong("no id")) };
            if !self.ids.contains(id) {
                return Err(wrong("nobody asked this"));
            }
            if !seen.insert(id.to_owned()) {
                return Err(wrong("this id has two lines"));
            }
            let is_answered =
                line["success"] == true && line["answer"] == format!("no answer to {id}");
            if is_answered == (id == POISON) {
                return Err(wrong("not the answer"));
            }
            let attempts = line["attempts"].as_u64().unwrap_or_default();
            lines.count += 1;
            lines.redelivered += u64::from(attempts > 1);
            lines.redeliveries += attempts.saturating_sub(1);
            lines.max_attempts = lines.max_attempts.max(attempts);
        }
        let missing: Vec<&String> = self.ids.difference(&seen).collect();
        if let Some(first) = missing.first() {
            let run = RUN;
            return Err(format!("{} ids of run {run} have no line, {first} first", missing.len()));
        }
        Ok(lines)
    }
}
