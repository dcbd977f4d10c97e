//! The last fault of a round: nats-server loses all that it has stored, while everybody lives on. What was
//! queued is gone, which no role can mend; `flotilla reconcile` publishes what has no line. A fault of its own, after
//! everything else has drained and was found whole: reconcile would mend what another fault had lost.

use std::fmt;
use std::path::PathBuf;

use super::feed::line;
use super::roles::{Fleet, RUN};

/// Queries that are queued when the store goes.
const QUERIES: usize = 3_000;
/// Lines of them that are written by then.
const WRITTEN: usize = 300;

/// What the fault cost.
#[derive(Clone, Copy, Debug)]
pub struct Wiped {
    /// Queries that were published before.
    pub queries: usize,
    /// Those that `flotilla reconcile` published again.
    pub published_again: usize,
}

impl fmt::Display for Wiped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { queries, published_again } = self;
        write!(
            f,
            "nats-server's store wiped in the middle of {queries} more queries: {published_again} published again"
        )
    }
}

/// Has queries of its own published, before any worker takes one; their ids.
pub(super) fn publish(fleet: &mut Fleet) -> Result<Vec<String>, String> {
    let ids: Vec<String> = (0..QUERIES).map(|number| format!("wiped-{number}")).collect();
    let text: String = ids.iter().map(|id| line(id)).collect();
    std::fs::write(input(fleet), text).map_err(|error| error.to_string())?;
    // On a busy machine they would answer as fast as is published, and leave nothing to lose.
    fleet.stop_workers();
    let published = fleet.run(&format!("produce --queries-file wiped.jsonl --run {RUN}"));
    fleet.continue_workers();
    published.map(|_log| ids)
}

/// Whether enough of them are written for the rest to be lost.
pub(super) fn is_due(fleet: &Fleet) -> bool {
    let text = std::fs::read_to_string(fleet.output()).unwrap_or_default();
    text.matches("{\"id\":\"wiped-").count() >= WRITTEN
}

/// Wipes the store, and has published again what has no line.
pub(super) fn wipe(fleet: &mut Fleet) -> Result<Wiped, String> {
    fleet.nats.wipe();
    fleet.nats.restart();
    // By force: what the workers hold gets its line from them, or from those that get it now.
    let log = fleet.run(&format!(
        "reconcile --queries-file wiped.jsonl --output-file results.jsonl --run {RUN} --force"
    ))?;
    let (before, _) = log.split_once(" jobs published again").unwrap_or_default();
    let number = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    let published_again = number.parse().map_err(|_| format!("how many were lost?\n{log}"))?;
    if published_again == 0 {
        return Err("the wiped store had nothing to lose".to_owned());
    }
    Ok(Wiped { queries: QUERIES, published_again })
}

fn input(fleet: &Fleet) -> PathBuf {
    fleet.input().with_file_name("wiped.jsonl")
}
