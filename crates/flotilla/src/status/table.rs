//! The state of a fleet as a table on a terminal.

use super::view::{RunView, View, WorkerView};
use crate::columns::{
    Align::{self, Left, Right},
    write_table,
};
use crate::progress::clock;

const RUNS: [(&str, Align); 11] = [
    ("RUN", Left),
    ("PUBLISHED", Right),
    ("QUEUED", Right),
    ("IN FLIGHT", Right),
    ("UNWRITTEN", Right),
    ("DONE", Right),
    ("FAILED", Right),
    ("DEAD", Right),
    ("LINES/S", Right),
    ("ETA", Right),
    ("STATE", Left),
];
const WORKERS: [(&str, Align); 9] = [
    ("WORKER", Left),
    ("DEVICE", Left),
    ("MODEL", Left),
    ("RUNNING", Right),
    ("ANSWERED", Right),
    ("FAILED", Right),
    ("ANSWERS/S", Right),
    ("TOKENS/S", Right),
    ("LAST SEEN", Left),
];

/// The table.
pub(crate) fn table(view: &View) -> String {
    let mut text = String::new();
    if view.runs.is_empty() {
        text += "no runs\n";
    } else {
        write_table(&mut text, &RUNS, view.runs.iter().map(run_row));
    }
    for line in view.runs.iter().flat_map(troubles) {
        text += &line.replace(char::is_control, "?");
        text.push('\n');
    }
    text.push('\n');
    if view.workers.is_empty() {
        text += "no workers\n";
    } else {
        write_table(&mut text, &WORKERS, view.workers.iter().map(worker_row));
    }
    text
}

/// What somebody has to look after.
fn troubles(run: &RunView) -> impl Iterator<Item = String> {
    let name = &run.run;
    let unwritten =
        run.error.iter().map(move |error| format!("run {name} is not written: {error}"));
    let missing = (run.missing > 0).then(|| {
        format!(
            "run {name} lacks {} lines that nothing is queued for: they are lost, or in another \
             output; flotilla reconcile publishes them again",
            run.missing
        )
    });
    let waiting = run
        .models_without_worker
        .iter()
        .map(move |model| format!("run {name} waits: no worker has its model {model}"));
    let silent = (run.held_by_silent > 0).then(|| {
        format!(
            "run {name}: {} jobs are held by silent workers; others get them when their leases end",
            run.held_by_silent
        )
    });
    unwritten.chain(missing).chain(waiting).chain(silent).chain(run.gone_producers.iter().map(
        move |producer| {
            format!("run {name} is not all published: the producer of {producer} is gone")
        },
    ))
}

fn run_row(run: &RunView) -> [String; 11] {
    let known = |count: Option<u64>| count.map_or("-".to_owned(), |count| count.to_string());
    let published = match (run.published, run.total) {
        (Some(published), Some(total)) if !run.is_published => format!("{published} of {total}"),
        (published, _) => known(published),
    };
    let eta = match run.eta_seconds {
        Some(0.0) => "-".to_owned(),
        Some(seconds) => clock(seconds),
        None => "unknown".to_owned(),
    };
    let left = run.queued + run.in_flight + run.unwritten;
    let state = match (left, run.is_published, run.is_collected) {
        _ if run.error.is_some() => "not written",
        _ if run.missing > 0 => "lines missing",
        (0, true, _) => "complete",
        (_, _, true) => "running",
        (0, false, false) => "idle",
        (_, _, false) => "no collector",
    };
    [
        run.run.clone(),
        published,
        run.queued.to_string(),
        run.in_flight.to_string(),
        run.unwritten.to_string(),
        known(run.done),
        known(run.failed),
        run.dead.to_string(),
        format!("{:.1}", run.lines_per_second),
        eta,
        state.to_owned(),
    ]
}

fn worker_row(worker: &WorkerView) -> [String; 9] {
    let seen = format!("{} ago", clock(worker.last_seen_seconds));
    [
        worker.id.clone(),
        worker.device.clone(),
        worker.model.clone(),
        match worker.is_silent {
            true => "-".to_owned(),
            false => format!("{}/{}", worker.running, worker.slots),
        },
        worker.answered.to_string(),
        worker.failed.to_string(),
        format!("{:.1}", worker.answers_per_second),
        format!("{:.0}", worker.tokens_per_second),
        if worker.is_silent { format!("{seen}, SILENT") } else { seen },
    ]
}
