//! The state of a fleet, put together from the queues and from what the roles said of themselves.
//! The names here are those of `flotilla status --json`, and stay.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use shared::RunId;
use shared::status::{Role, RunStatus, WorkerStatus};

/// Heartbeats that a worker may miss before it is shown as silent.
const MAX_MISSED: f64 = 4.0;
/// Shortest silence that is told, in seconds.
const MIN_SILENCE: f64 = 10.0;

/// What the queues hold and the roles said, as it was read.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    /// Jobs not yet settled, those in flight included.
    pub(crate) jobs: BTreeMap<(String, RunId), u64>,
    /// Outcomes not yet written.
    pub(crate) outcomes: BTreeMap<RunId, u64>,
    /// Dead letters.
    pub(crate) dead: BTreeMap<RunId, u64>,
    /// What producers and collectors said.
    pub(crate) runs: Vec<RunStatus>,
    /// What workers said.
    pub(crate) workers: Vec<WorkerStatus>,
    /// Now, in unix seconds.
    pub(crate) now: f64,
}

/// The state of a fleet.
#[derive(Debug, Serialize)]
pub(crate) struct View {
    /// When, in unix seconds.
    pub(crate) at: f64,
    /// The runs, by name.
    pub(crate) runs: Vec<RunView>,
    /// The workers, by id.
    pub(crate) workers: Vec<WorkerView>,
}

/// One run.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(crate) struct RunView {
    /// Its name.
    pub(crate) run: String,
    /// Models that its queued jobs are for.
    pub(crate) models: Vec<String>,
    /// Jobs published, as the producer counts.
    pub(crate) published: Option<u64>,
    /// Queries of the input, once the producer has counted them.
    pub(crate) total: Option<u64>,
    /// Jobs that wait for a worker.
    pub(crate) queued: u64,
    /// Jobs that a worker holds.
    pub(crate) in_flight: u64,
    /// Outcomes that are not in the output yet.
    pub(crate) unwritten: u64,
    /// Lines of the output.
    pub(crate) done: Option<u64>,
    /// Lines of jobs that failed.
    pub(crate) failed: Option<u64>,
    /// Dead letters: jobs that `flotilla retry` can put back.
    pub(crate) dead: u64,
    /// Lines a second, lately.
    pub(crate) lines_per_second: f64,
    /// Seconds until everything has its line, at that rate.
    pub(crate) eta_seconds: Option<f64>,
    /// Whether the producer has published everything.
    pub(crate) is_published: bool,
    /// Whether a collector writes it now.
    pub(crate) is_collected: bool,
    /// The output.
    pub(crate) output: Option<String>,
}

/// One worker.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct WorkerView {
    /// Its id.
    pub(crate) id: String,
    /// The machine.
    pub(crate) host: String,
    /// The device.
    pub(crate) device: String,
    /// The model.
    pub(crate) model: String,
    /// Jobs that it can compute at once.
    pub(crate) slots: u32,
    /// Jobs that it computes.
    pub(crate) running: u32,
    /// Jobs answered since it started.
    pub(crate) answered: u64,
    /// Jobs failed since it started.
    pub(crate) failed: u64,
    /// Generated tokens a second, lately.
    pub(crate) tokens_per_second: f64,
    /// Answers a second, lately.
    pub(crate) answers_per_second: f64,
    /// Seconds since it was last heard of.
    pub(crate) last_seen_seconds: f64,
    /// Whether it has been silent for so long that it may be gone.
    pub(crate) is_silent: bool,
}

impl View {
    /// The view of all runs, or of `only` and the workers.
    pub(crate) fn of(gathered: &Gathered, only: Option<&RunId>) -> Self {
        let mut names: BTreeSet<&str> = BTreeSet::new();
        names.extend(gathered.jobs.keys().map(|(_, run)| run.0.as_str()));
        names
            .extend(gathered.outcomes.keys().chain(gathered.dead.keys()).map(|run| run.0.as_str()));
        names.extend(gathered.runs.iter().map(|status| status.run.0.as_str()));
        let runs = names.into_iter().filter(|name| only.is_none_or(|only| only.0 == *name));
        let mut workers: Vec<WorkerView> =
            gathered.workers.iter().map(|status| worker(status, gathered.now)).collect();
        workers.sort_by(|a, b| a.id.cmp(&b.id));
        Self { at: gathered.now, runs: runs.map(|name| run(gathered, name)).collect(), workers }
    }
}

fn run(gathered: &Gathered, name: &str) -> RunView {
    let id = RunId(name.to_owned());
    let of_role = |role| gathered.runs.iter().find(|s| s.run == id && s.role == role);
    let (producer, collector) = (of_role(Role::Producer), of_role(Role::Collector));
    let jobs = gathered.jobs.iter().filter(|((_, run), _)| *run == id);
    let unsettled: u64 = jobs.clone().map(|(_, count)| count).sum();
    let live = gathered.workers.iter().filter(|w| !is_silent(w, gathered.now));
    let held: u64 = live.filter_map(|worker| worker.held.get(&id)).sum();
    // A worker's word is some seconds old, the queue's is of now.
    let in_flight = held.min(unsettled);
    let unwritten = gathered.outcomes.get(&id).copied().unwrap_or(0);
    let is_collected = collector
        .is_some_and(|status| !status.finished && gathered.now - status.seen_at < MIN_SILENCE);
    let lines_per_second = collector.filter(|_| is_collected).map_or(0.0, |status| status.rate);
    let known = producer.and_then(|status| status.total);
    let left = match (known, collector) {
        (Some(total), Some(collector)) => {
            total.saturating_sub(collector.done).max(unsettled.max(unwritten))
        }
        _ => unsettled.max(unwritten),
    };
    let eta = |left: u64| match left {
        0 => Some(0.0),
        left => (lines_per_second > 0.0).then(|| left as f64 / lines_per_second),
    };
    RunView {
        run: name.to_owned(),
        models: jobs.map(|((model, _), _)| model.clone()).collect(),
        published: producer.map(|status| status.published),
        total: known,
        queued: unsettled - in_flight,
        in_flight,
        unwritten,
        done: collector.map(|status| status.done),
        failed: collector.map(|status| status.failed),
        dead: gathered.dead.get(&id).copied().unwrap_or(0),
        lines_per_second,
        eta_seconds: eta(left),
        is_published: producer.is_some_and(|status| status.finished),
        is_collected,
        output: collector.and_then(|status| status.output.clone()),
    }
}

fn worker(status: &WorkerStatus, now: f64) -> WorkerView {
    let is_silent = is_silent(status, now);
    let lately = |rate: f64| if is_silent { 0.0 } else { rate };
    WorkerView {
        id: status.id.clone(),
        host: status.host.clone(),
        device: status.device.clone(),
        model: status.model.clone(),
        slots: status.slots,
        running: status.running,
        answered: status.answered,
        failed: status.failed,
        tokens_per_second: lately(status.tokens_per_second),
        answers_per_second: lately(status.answers_per_second),
        last_seen_seconds: (now - status.seen_at).max(0.0),
        is_silent,
    }
}

fn is_silent(status: &WorkerStatus, now: f64) -> bool {
    now - status.seen_at > (MAX_MISSED * status.stats_interval).max(MIN_SILENCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: f64 = 1_000.0;

    fn name(run: &str) -> RunId {
        RunId(run.to_owned())
    }

    fn said(run: &str, role: Role, seen_at: f64) -> RunStatus {
        RunStatus { run: name(run), role, seen_at, ..RunStatus::default() }
    }

    fn holding(run: &str, held: u64, seen_at: f64) -> WorkerStatus {
        let held = [(name(run), held)].into();
        WorkerStatus { held, seen_at, stats_interval: 2.0, ..WorkerStatus::default() }
    }

    fn gathered() -> Gathered {
        Gathered {
            jobs: [(("m".to_owned(), name("r")), 50)].into(),
            outcomes: [(name("r"), 5)].into(),
            dead: [(name("old"), 2)].into(),
            now: NOW,
            ..Gathered::default()
        }
    }

    #[test]
    fn jobs_held_by_live_workers_are_in_flight_and_the_others_queued() {
        let workers = vec![holding("r", 8, NOW - 1.0), holding("r", 30, NOW - 60.0)];
        let view = View::of(&Gathered { workers, ..gathered() }, None);
        let run = &view.runs[1];
        assert_eq!((run.queued, run.in_flight, run.unwritten), (42, 8, 5));
        assert_eq!(run.models, ["m"]);
        assert_eq!(view.workers.iter().filter(|worker| worker.is_silent).count(), 1);
    }

    #[test]
    fn more_held_than_queued_is_a_late_word() {
        let workers = vec![holding("r", 80, NOW)];
        let view = View::of(&Gathered { workers, ..gathered() }, None);
        assert_eq!((view.runs[1].queued, view.runs[1].in_flight), (0, 50));
    }

    #[test]
    fn time_left_counts_what_the_producer_has_not_published_yet() {
        let producer = RunStatus { total: Some(1_000), ..said("r", Role::Producer, NOW) };
        let collector =
            RunStatus { done: 400, rate: 10.0, ..said("r", Role::Collector, NOW - 1.0) };
        let runs = vec![producer, collector.clone()];
        let view = View::of(&Gathered { runs, ..gathered() }, None);
        assert_eq!(view.runs[1].eta_seconds, Some(60.0));
        // Without its word, what is queued is what is left.
        let view = View::of(&Gathered { runs: vec![collector], ..gathered() }, None);
        assert_eq!(view.runs[1].eta_seconds, Some(5.0));
    }

    #[test]
    fn a_collector_that_is_silent_collects_nothing() {
        let collector = RunStatus { rate: 10.0, ..said("r", Role::Collector, NOW - 60.0) };
        let view = View::of(&Gathered { runs: vec![collector], ..gathered() }, None);
        assert!(!view.runs[1].is_collected);
        assert_eq!(view.runs[1].eta_seconds, None);
    }

    #[test]
    fn runs_with_nothing_but_dead_letters_are_shown_and_one_can_be_asked_for() {
        let view = View::of(&gathered(), None);
        assert_eq!((view.runs[0].run.as_str(), view.runs[0].dead), ("old", 2));
        assert_eq!(View::of(&gathered(), Some(&name("r"))).runs.len(), 1);
    }
}
