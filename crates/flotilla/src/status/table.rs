//! The state of a fleet as a table on a terminal.

use std::fmt::Write;

use super::view::{RunView, View, WorkerView};
use crate::progress::clock;

/// Columns of numbers are set to the right.
#[derive(Clone, Copy)]
enum Align {
    Left,
    Right,
}
use Align::{Left, Right};

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
    text.push('\n');
    if view.workers.is_empty() {
        text += "no workers\n";
    } else {
        write_table(&mut text, &WORKERS, view.workers.iter().map(worker_row));
    }
    text
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
        format!("{}/{}", worker.running, worker.slots),
        worker.answered.to_string(),
        worker.failed.to_string(),
        format!("{:.1}", worker.answers_per_second),
        format!("{:.0}", worker.tokens_per_second),
        if worker.is_silent { format!("{seen}, SILENT") } else { seen },
    ]
}

fn write_table<const N: usize>(
    text: &mut String,
    columns: &[(&str, Align); N],
    rows: impl Iterator<Item = [String; N]>,
) {
    let heads = columns.map(|(head, _)| head.to_owned());
    // A name is the user's: it must not move the cursor or break the row.
    let clean = |cell: String| cell.replace(char::is_control, "?");
    let rows: Vec<[String; N]> = std::iter::once(heads).chain(rows.map(|r| r.map(clean))).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..N).map(|column| width(column).unwrap_or(0)).collect();
    for row in &rows {
        let mut line = String::new();
        for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(columns) {
            // Writing to a String cannot fail.
            let _infallible = match align {
                Left => write!(line, "{cell:<width$}  "),
                Right => write!(line, "{cell:>width$}  "),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}
