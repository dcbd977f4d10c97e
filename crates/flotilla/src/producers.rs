//! The producers of a run, taken together: several may publish it, from several files and machines.
//!
//! Each has a record of its own, by process. One that is gone is replaced by a later one on the same
//! machine with the same input: the same command, run again. Their clocks are one machine's, then.

use shared::RunId;
use shared::queue::nats::{Fleet, FleetError};
use shared::status::{Role, RunStatus};

/// The last words of a run's producers, without those that are replaced.
pub(crate) struct Producers<'a> {
    words: Vec<&'a RunStatus>,
    now: f64,
}

impl<'a> Producers<'a> {
    /// Those of `run` among all that `said` something, at the time of `now`, in unix seconds.
    pub(crate) fn of(said: &'a [RunStatus], run: &RunId, now: f64) -> Self {
        let words: Vec<&RunStatus> =
            said.iter().filter(|s| s.role == Role::Producer && s.run == *run).collect();
        let is_replaced =
            |old: &RunStatus| old.is_gone(now) && words.iter().any(|new| replaces(new, old));
        Self { words: words.iter().copied().filter(|old| !is_replaced(old)).collect(), now }
    }

    /// What they have published together, as far as they know; `None` where there are none.
    pub(crate) fn published(&self) -> Option<u64> {
        self.together(|status| Some(status.published))
    }

    /// What they will have published together, where all know that.
    pub(crate) fn total(&self) -> Option<u64> {
        self.together(|status| status.total)
    }

    /// Lines that the output has at least, when everything is written. A producer publishes no id of
    /// its input twice, but two of them may publish the same one, and one that listens may be sent it
    /// twice: such a count proves nothing.
    pub(crate) fn least_lines(&self) -> u64 {
        let once = self.words.iter().filter(|status| !listens(status));
        once.map(|status| status.published).max().unwrap_or(0)
    }

    /// The counts of all, without the jobs that the queue had already: those were another's, or its own
    /// from before, and then it has them all by itself.
    fn together(&self, count: impl Fn(&RunStatus) -> Option<u64>) -> Option<u64> {
        let counts: Option<Vec<u64>> = self.words.iter().map(|status| count(status)).collect();
        let counts = counts.filter(|counts| !counts.is_empty())?;
        let repeated: u64 = self.words.iter().map(|status| status.repeated).sum();
        let alone = self.words.iter().zip(&counts).map(|(status, count)| {
            if listens(status) { count.saturating_sub(status.repeated) } else { *count }
        });
        Some(counts.iter().sum::<u64>().saturating_sub(repeated).max(alone.max().unwrap_or(0)))
    }

    /// Whether there are any, and each has published everything.
    pub(crate) fn have_finished(&self) -> bool {
        !self.words.is_empty() && self.words.iter().all(|status| status.finished)
    }

    /// Those that are gone without having published everything.
    pub(crate) fn gone(&self) -> impl Iterator<Item = &'a RunStatus> {
        self.words.iter().copied().filter(|status| !status.finished && status.is_gone(self.now))
    }
}

/// Whether this is a producer of requests, among which an id may come again and again.
fn listens(status: &RunStatus) -> bool {
    status.input.as_ref().is_some_and(|input| input.starts_with("http://"))
}

/// Whether `new` is the same command as `old`, run again.
fn replaces(new: &RunStatus, old: &RunStatus) -> bool {
    (&new.host, &new.input) == (&old.host, &old.input) && new.started_at > old.seen_at
}

/// What people know a producer by.
pub(crate) fn label(status: &RunStatus) -> String {
    format!("{} on {}", status.input.as_deref().unwrap_or("unknown input"), status.host)
}

/// Removes the records that one of `now` replaces.
pub(crate) async fn remove_replaced(fleet: &Fleet, now: &RunStatus) -> Result<(), FleetError> {
    for old in fleet.run(&now.run).await? {
        if old.role == Role::Producer && old.is_gone(now.seen_at) && replaces(now, &old) {
            fleet.remove_run(&old).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: f64 = 1_000.0;

    fn run() -> RunId {
        RunId("r".to_owned())
    }

    /// A producer that published from `at` to `seen_at`.
    fn said(host: &str, input: &str, (started_at, seen_at): (f64, f64)) -> RunStatus {
        let (host, input) = (host.to_owned(), Some(input.to_owned()));
        RunStatus { run: run(), host, input, started_at, seen_at, ..RunStatus::default() }
    }

    fn finished(status: RunStatus, published: u64) -> RunStatus {
        let total = Some(published);
        RunStatus { finished: true, ended: true, published, total, ..status }
    }

    fn have_finished(said: &[RunStatus]) -> bool {
        Producers::of(said, &run(), NOW).have_finished()
    }

    #[test]
    fn run_is_published_once_all_of_its_producers_have_finished() {
        assert!(!have_finished(&[]));
        let one = finished(said("a", "one", (100.0, 200.0)), 30);
        assert!(have_finished(std::slice::from_ref(&one)));
        let busy = said("a", "two", (100.0, NOW - 1.0));
        assert!(!have_finished(&[one.clone(), busy.clone()]));
        let words = [one, finished(busy, 12)];
        assert!(have_finished(&words));
        let producers = Producers::of(&words, &run(), NOW);
        assert_eq!((producers.published(), producers.total()), (Some(42), Some(42)));
        assert_eq!(producers.gone().count(), 0);
    }

    #[test]
    fn what_is_published_twice_counts_once() {
        let of = |words: &[RunStatus]| {
            let producers = Producers::of(words, &run(), NOW);
            (producers.published(), producers.least_lines())
        };
        assert_eq!(of(&[]), (None, 0));
        let one = finished(said("a", "one", (100.0, 200.0)), 30);
        let same = RunStatus { repeated: 30, ..finished(said("a", "two", (100.0, 200.0)), 30) };
        assert_eq!(of(&[one.clone(), same.clone()]), (Some(30), 30));
        // The same command, run again: what it had published before is its own.
        let again = RunStatus { repeated: 20, ..one.clone() };
        assert_eq!(of(&[again]), (Some(30), 30));
        // Of requests nobody knows how many ids they were.
        let input = Some("http://127.0.0.1:8080".to_owned());
        let listening = RunStatus { input, published: 90, repeated: 50, total: None, ..same };
        assert_eq!(of(std::slice::from_ref(&listening)), (Some(40), 0));
        assert_eq!(of(&[one, listening]), (Some(70), 30));
    }

    #[test]
    fn producer_that_died_keeps_the_run_open_until_its_command_is_run_again() {
        let dead = said("a", "one", (100.0, 200.0));
        let other = finished(said("b", "one", (300.0, 400.0)), 30);
        let words = [dead.clone(), other];
        let producers = Producers::of(&words, &run(), NOW);
        assert!(!producers.have_finished());
        assert_eq!(producers.gone().map(label).collect::<Vec<_>>(), ["one on a"]);
        let again = finished(said("a", "one", (300.0, 400.0)), 30);
        assert!(have_finished(&[dead.clone(), again.clone()]));
        // One that may be alive is not replaced, whatever began after its last word.
        let alive = RunStatus { seen_at: NOW - 1.0, ..dead };
        let again = RunStatus { started_at: NOW - 0.9, seen_at: NOW - 0.5, ..again };
        assert!(!have_finished(&[alive.clone(), again.clone()]));
        // One that has said that it ends is not alive.
        assert!(have_finished(&[RunStatus { ended: true, ..alive }, again]));
    }
}
