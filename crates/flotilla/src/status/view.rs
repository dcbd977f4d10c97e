//! The state of a fleet, put together from the queues and from what the roles said of themselves.
//! The names here are those of `flotilla status --json`, and stay.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use shared::RunId;
use shared::status::{Role, RunStatus, WorkerStatus};

use crate::producers::{self, Producers};

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
    /// Those among them that no worker has, so that these jobs wait.
    pub(crate) models_without_worker: Vec<String>,
    /// Jobs published, as the producers count.
    pub(crate) published: Option<u64>,
    /// Queries of the input, once the producers have counted them.
    pub(crate) total: Option<u64>,
    /// Jobs that wait for a worker.
    pub(crate) queued: u64,
    /// Jobs that a worker holds.
    pub(crate) in_flight: u64,
    /// Of these, jobs of workers that are silent: others get them when their leases end.
    pub(crate) held_by_silent: u64,
    /// Outcomes that are not in the output yet.
    pub(crate) unwritten: u64,
    /// Lines of the output.
    pub(crate) done: Option<u64>,
    /// Lines of jobs that failed.
    pub(crate) failed: Option<u64>,
    /// Dead letters: jobs that `flotilla retry` can put back.
    pub(crate) dead: u64,
    /// Lines that the output lacks although nothing is left to do: at least so many.
    pub(crate) missing: u64,
    /// Lines a second, lately.
    pub(crate) lines_per_second: f64,
    /// Seconds until everything has its line, at that rate.
    pub(crate) eta_seconds: Option<f64>,
    /// Whether its producers have published everything.
    pub(crate) is_published: bool,
    /// Producers that are gone and have not.
    pub(crate) gone_producers: Vec<String>,
    /// Whether a collector writes it now.
    pub(crate) is_collected: bool,
    /// The output.
    pub(crate) output: Option<String>,
    /// Why a collector that would write it can't.
    pub(crate) error: Option<String>,
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
    let collector = gathered.runs.iter().find(|s| s.run == id && s.role == Role::Collector);
    let producers = Producers::of(&gathered.runs, &id, gathered.now);
    let jobs = gathered.jobs.iter().filter(|((_, run), _)| *run == id);
    let unsettled: u64 = jobs.clone().map(|(_, count)| count).sum();
    let now = gathered.now;
    let held_by = |is_silent: bool| {
        let workers = gathered.workers.iter();
        let workers = workers.filter(|w| w.holds_jobs(now) && w.is_silent(now) == is_silent);
        workers.filter_map(|worker| worker.held.get(&id)).sum::<u64>()
    };
    // A worker's word is some seconds old, the queue's is of now.
    let live = held_by(false).min(unsettled);
    let held_by_silent = held_by(true).min(unsettled - live);
    let in_flight = live + held_by_silent;
    let models: Vec<String> = jobs.map(|((model, _), _)| model.clone()).collect();
    let has_worker =
        |model: &&String| gathered.workers.iter().any(|w| w.model == **model && !w.is_silent(now));
    let models_without_worker = models.iter().filter(|model| !has_worker(model)).cloned().collect();
    let unwritten = gathered.outcomes.get(&id).copied().unwrap_or(0);
    let writing = collector.filter(|status| !status.finished && !status.is_gone(gathered.now));
    let error = writing.and_then(|status| status.error.clone());
    let is_collected = writing.is_some() && error.is_none();
    let lines_per_second = collector.filter(|_| is_collected).map_or(0.0, |status| status.rate);
    let known = producers.total();
    let left = match (known, collector) {
        (Some(total), Some(collector)) => {
            total.saturating_sub(collector.done).max(unsettled.max(unwritten))
        }
        _ => unsettled.max(unwritten),
    };
    let is_drained = unsettled + unwritten == 0 && producers.have_finished();
    let missing = collector
        .filter(|_| is_drained)
        .map(|status| producers.least_lines().saturating_sub(status.done));
    let eta = |left: u64| match left {
        0 => Some(0.0),
        left => (lines_per_second > 0.0).then(|| left as f64 / lines_per_second),
    };
    RunView {
        run: name.to_owned(),
        models,
        models_without_worker,
        published: producers.published(),
        total: known,
        queued: unsettled - in_flight,
        in_flight,
        held_by_silent,
        unwritten,
        done: collector.map(|status| status.done),
        failed: collector.map(|status| status.failed),
        dead: gathered.dead.get(&id).copied().unwrap_or(0),
        missing: missing.unwrap_or(0),
        lines_per_second,
        eta_seconds: match () {
            () if is_drained => Some(0.0),
            // Nobody works, whatever the rate of the last half minute says.
            () if held_by_silent > 0 && in_flight == held_by_silent => None,
            () => eta(left),
        },
        is_published: producers.have_finished(),
        gone_producers: producers.gone().map(producers::label).collect(),
        is_collected,
        output: collector.and_then(|status| status.output.clone()),
        error,
    }
}

fn worker(status: &WorkerStatus, now: f64) -> WorkerView {
    let is_silent = status.is_silent(now);
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
    fn jobs_of_a_silent_worker_are_its_own_until_its_lease_ends() {
        let silent = |seen_at| WorkerStatus { lease: 60.0, ..holding("r", 30, seen_at) };
        let workers = vec![silent(NOW - 50.0)];
        let view = View::of(&Gathered { workers, ..gathered() }, None);
        let run = &view.runs[1];
        assert_eq!((run.queued, run.in_flight, run.held_by_silent), (20, 30, 30));
        assert_eq!(
            (run.eta_seconds, &run.models_without_worker[..]),
            (None, &["m".to_owned()][..])
        );
        let workers =
            vec![silent(NOW - 61.0), WorkerStatus { model: "m".into(), ..holding("r", 1, NOW) }];
        let view = View::of(&Gathered { workers, ..gathered() }, None);
        let run = &view.runs[1];
        assert_eq!((run.queued, run.in_flight, run.held_by_silent), (49, 1, 0));
        assert!(run.models_without_worker.is_empty());
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
    fn what_is_drained_and_short_of_lines_is_missing_some() {
        let producer = RunStatus {
            published: 200,
            total: Some(200),
            finished: true,
            ended: true,
            ..said("r", Role::Producer, NOW - 60.0)
        };
        let collector = RunStatus { done: 190, ..said("r", Role::Collector, NOW - 1.0) };
        let runs = vec![producer, collector];
        let drained = Gathered { runs: runs.clone(), now: NOW, ..Gathered::default() };
        let view = View::of(&drained, None);
        assert_eq!((view.runs[0].missing, view.runs[0].eta_seconds), (10, Some(0.0)));
        // What is on its way is not missing.
        let view = View::of(&Gathered { runs, ..gathered() }, Some(&name("r")));
        assert_eq!(view.runs[0].missing, 0);
    }

    #[test]
    fn a_collector_that_is_silent_collects_nothing() {
        let collector = RunStatus { rate: 10.0, ..said("r", Role::Collector, NOW - 60.0) };
        let view = View::of(&Gathered { runs: vec![collector], ..gathered() }, None);
        assert!(!view.runs[1].is_collected);
        assert_eq!(view.runs[1].eta_seconds, None);
    }

    #[test]
    fn a_collector_that_cannot_write_collects_nothing_and_says_why() {
        let error = Some("no room".to_owned());
        let collector = RunStatus { done: 7, error, ..said("r", Role::Collector, NOW - 1.0) };
        let view = View::of(&Gathered { runs: vec![collector.clone()], ..gathered() }, None);
        let run = &view.runs[1];
        assert_eq!((run.is_collected, run.done), (false, Some(7)));
        assert_eq!(run.error.as_deref(), Some("no room"));
        // One that is gone can't write either, whatever it said last.
        let runs = vec![RunStatus { seen_at: NOW - 60.0, ..collector }];
        assert_eq!(View::of(&Gathered { runs, ..gathered() }, None).runs[1].error, None);
    }

    #[test]
    fn runs_with_nothing_but_dead_letters_are_shown_and_one_can_be_asked_for() {
        let view = View::of(&gathered(), None);
        assert_eq!((view.runs[0].run.as_str(), view.runs[0].dead), ("old", 2));
        assert_eq!(View::of(&gathered(), Some(&name("r"))).runs.len(), 1);
    }
}
