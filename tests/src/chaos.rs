//! Chaos: the real program in all its roles, with real servers, while processes are killed and
//! stopped, servers lose their memory and links break, from a seed; at the end every id has one line.
//!
//! A round is: a fleet starts, queries stream in, the faults of the [`plan`] happen, all faults end,
//! everything drains, the queue's store is wiped in the middle of some more (if that is wanted), everybody is told
//! to end, the output is checked. `make chaos` runs it for
//! minutes, the tests of the fleet for seconds. A seed repeats the faults and their times; what
//! they meet differs from run to run.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

mod feed;
pub mod plan;
mod roles;
mod verdict;
mod wipe;

use feed::{Feed, Order};
use roles::{Fleet, Remedy};
use verdict::Watch;

pub use verdict::Report;
pub use wipe::Wiped;

/// Between two looks at whether everybody is well.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// How long the fleet may take for what is left when the faults are over.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(120);

/// Settings of a round.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The program.
    pub program: PathBuf,
    /// What the faults are made from.
    pub seed: u64,
    /// How long faults happen.
    pub time: Duration,
    /// Between two faults, on the average.
    pub fault_interval: Duration,
    /// Workers at first.
    pub workers: usize,
    /// Whether nats-server loses its store at the end.
    pub wipe: bool,
}

/// Something that must not be.
#[derive(Debug)]
pub struct Failure {
    /// What.
    pub text: String,
    /// Where the files of the round are kept: its own, those of nats-server, those of redis-server.
    pub kept: Vec<PathBuf>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.text)?;
        writeln!(f, "everything is kept in")?;
        self.kept.iter().try_for_each(|path| writeln!(f, "  {}", path.display()))
    }
}

/// Runs one round; what it survived, or what went wrong.
pub fn run(settings: &Settings) -> Result<Report, Box<Failure>> {
    let (order, orders) = mpsc::channel();
    let mut fleet = Fleet::start(settings, order);
    let done = catch_unwind(AssertUnwindSafe(|| Round::new(settings, &mut fleet, orders).run()));
    let text = match done {
        Ok(Ok(report)) => return Ok(report),
        Ok(Err(text)) => text,
        Err(panic) => panic_text(panic.as_ref()),
    };
    let kept = fleet.keep().map(PathBuf::from).to_vec();
    Err(Box::new(Failure { text, kept }))
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let owned = panic.downcast_ref::<String>().cloned();
    let text = owned.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
    text.unwrap_or_else(|| "something panicked".to_owned())
}

/// A round while it runs.
struct Round<'a> {
    settings: &'a Settings,
    fleet: &'a mut Fleet,
    feeds: Vec<Feed>,
    started: Instant,
    /// What ends the faults that last, and when.
    remedies: Vec<(Instant, Remedy)>,
}

impl<'a> Round<'a> {
    fn new(settings: &'a Settings, fleet: &'a mut Fleet, orders: mpsc::Receiver<Order>) -> Self {
        let address = fleet.listen_address();
        let feeds = vec![
            Feed::file(fleet.input(), settings.seed, orders),
            Feed::post(address, roles::TOKEN.to_owned(), settings.seed),
        ];
        Self { settings, fleet, feeds, started: Instant::now(), remedies: Vec::new() }
    }

    fn run(mut self) -> Result<Report, String> {
        let settings = self.settings;
        for fault in plan::plan(settings.seed, settings.time, settings.fault_interval) {
            self.wait_until(self.started + fault.at)?;
            if let Some(remedy) = self.fleet.apply(&fault) {
                self.remedies.push((Instant::now() + fault.time, remedy));
            }
        }
        self.wait_until(self.started + settings.time)?;
        let faults_ended = Instant::now();
        for (_, remedy) in std::mem::take(&mut self.remedies) {
            self.fleet.remedy(&remedy);
        }
        let mut ids = Vec::new();
        for feed in std::mem::take(&mut self.feeds) {
            ids.extend(feed.end()?);
        }
        let mut watch = Watch::new(self.fleet, ids);
        self.drain(&watch)?;
        let counted = watch.count()?;
        let drained = faults_ended.elapsed();
        watch.check()?;
        let wiped = if settings.wipe { Some(self.wipe(&mut watch)?) } else { None };
        self.fleet.end()?;
        let lines = watch.check()?;
        Ok(Report {
            seed: settings.seed,
            faults: self.fleet.counts.clone(),
            time: self.started.elapsed(),
            drained,
            counted,
            wiped,
            lines,
        })
    }

    /// Waits until every id has its line and nothing is queued.
    fn drain(&mut self, watch: &Watch) -> Result<(), String> {
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while let Some(missing) = watch.missing()? {
            if Instant::now() > deadline {
                return Err(format!("not drained within {DRAIN_TIMEOUT:?}: {missing}"));
            }
            self.pass(LOOK_INTERVAL)?;
        }
        Ok(())
    }

    fn wipe(&mut self, watch: &mut Watch) -> Result<Wiped, String> {
        watch.expect(wipe::publish(self.fleet)?);
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while !wipe::is_due(self.fleet) {
            if Instant::now() > deadline {
                return Err("the queries before the wipe are not answered".to_owned());
            }
            self.pass(LOOK_INTERVAL)?;
        }
        let wiped = wipe::wipe(self.fleet)?;
        self.drain(watch)?;
        Ok(wiped)
    }

    /// Lets time pass, ending faults that are due; an error as soon as somebody is not well.
    fn wait_until(&mut self, until: Instant) -> Result<(), String> {
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let now = Instant::now();
            let mut next = left.min(LOOK_INTERVAL);
            let (due, later): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.remedies).into_iter().partition(|(at, _)| *at <= now);
            self.remedies = later;
            for (_, remedy) in due {
                self.fleet.remedy(&remedy);
            }
            for (at, _) in &self.remedies {
                next = next.min(at.saturating_duration_since(now));
            }
            self.pass(next)?;
        }
        Ok(())
    }

    fn pass(&mut self, time: Duration) -> Result<(), String> {
        // Nothing is waited for: the time of a round is its subject.
        std::thread::park_timeout(time);
        self.fleet.check()?;
        match self.feeds.iter().position(Feed::is_over) {
            Some(over) => {
                let fed = self.feeds.swap_remove(over).end();
                Err(format!("feeding ended early: {fed:?}"))
            }
            None => Ok(()),
        }
    }
}
