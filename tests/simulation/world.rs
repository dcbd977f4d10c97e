//! The world of one seed: what its processes share, what happens to them, and what is noticed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use collector::Control;
use collector::dedup::server::{IndexServer, Snapshot};
use collector::log::memory::Disk;
use shared::{IdDigest, Job, Settled};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::chance::Chance;
use crate::plan::{Broken, Kind, Plan};
use crate::process::{Process, Role};
use crate::queue::Channel;
use crate::stream::Stream;

/// Deliveries that end by bad luck, and not by one guilty neighbour, from which on a job may be given up:
/// those that it gets alone, but for the last.
const MIN_BAD_LUCK: u32 = 3;

/// What happens to a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    ProducerKilled,
    WorkerKilled,
    CollectorKilled,
    ProcessStopped,
    LinkCut,
    WorkerTerminated,
    CollectorTerminated,
    KilledByJob,
    EngineKilledByJob,
    EngineDied,
    EngineHung,
    LoadFailed,
    BrokerRestarted,
    BrokerLostPower,
    BrokerRefused,
    RequestLost,
    AnswerLost,
    DeliveryLost,
    IndexDown,
    IndexFlushed,
    IndexRolledBack,
    IndexAnswerLost,
    SyncFailed,
    SyncSlow,
    ShortWrite,
    TornTail,
    /// Not a fault: failed jobs were put back into the queue.
    Retried,
    /// Not a fault: a producer left out a job that has its line.
    LeftOut,
    /// An innocent job had so much bad luck that it was given up.
    InnocentGivenUp,
}

impl Fault {
    pub(crate) const ALL: [Self; 29] = [
        Self::ProducerKilled,
        Self::WorkerKilled,
        Self::CollectorKilled,
        Self::ProcessStopped,
        Self::LinkCut,
        Self::WorkerTerminated,
        Self::CollectorTerminated,
        Self::KilledByJob,
        Self::EngineKilledByJob,
        Self::EngineDied,
        Self::EngineHung,
        Self::LoadFailed,
        Self::BrokerRestarted,
        Self::BrokerLostPower,
        Self::BrokerRefused,
        Self::RequestLost,
        Self::AnswerLost,
        Self::DeliveryLost,
        Self::IndexDown,
        Self::IndexFlushed,
        Self::IndexRolledBack,
        Self::IndexAnswerLost,
        Self::SyncFailed,
        Self::SyncSlow,
        Self::ShortWrite,
        Self::TornTail,
        Self::Retried,
        Self::LeftOut,
        Self::InnocentGivenUp,
    ];
}

#[derive(Clone)]
pub(crate) struct World(Arc<Shared>);

impl Deref for World {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

pub(crate) struct Shared {
    pub(crate) plan: Plan,
    pub(crate) chance: Chance,
    pub(crate) jobs: Channel<Job>,
    pub(crate) outcomes: Channel<Settled>,
    pub(crate) disk: Disk,
    /// The lock on the output.
    pub(crate) lock: Arc<tokio::sync::Mutex<()>>,
    pub(crate) index: IndexServer,
    /// Ids that a broken index takes for answered.
    pub(crate) early: Mutex<BTreeSet<IdDigest>>,
    /// Whether a producer has published all jobs, as often as it should.
    pub(crate) all_published: AtomicBool,
    /// The way to the collector that serves.
    pub(crate) controls: Mutex<Option<mpsc::Sender<Control>>>,
    /// Whether failed jobs are on their way back to the queue.
    pub(crate) is_retrying: AtomicBool,
    /// Cancelled when the workers, then the collectors have no more work.
    pub(crate) workers_over: CancellationToken,
    pub(crate) collectors_over: CancellationToken,
    started: Instant,
    /// No faults any more.
    calm: AtomicBool,
    last_id: AtomicU64,
    trace: Option<Mutex<Vec<String>>>,
    processes: Mutex<Vec<Process>>,
    outages: Mutex<Outages>,
    copies: Mutex<Vec<Snapshot>>,
    ledger: Mutex<Ledger>,
}

/// Until when something is down.
#[derive(Clone, Copy)]
pub(crate) struct Outages {
    pub(crate) broker: Instant,
    pub(crate) index: Instant,
}

/// A guilty job: its number in the stream, and how often the broker forgot a delivery of it.
type Guilty = (u64, u32);

/// What was noticed.
#[derive(Default)]
pub(crate) struct Ledger {
    /// How many deliveries of jobs were ended by which guilty ones.
    poisoned: BTreeMap<u64, BTreeMap<Guilty, u32>>,
    /// How often the broker forgot a delivery of a job: it is as if it came anew.
    forgotten: BTreeMap<u64, u32>,
    /// Jobs that were in an engine when it died for no reason.
    struck: BTreeSet<u64>,
    /// How often jobs were started.
    pub(crate) starts: BTreeMap<usize, u32>,
    /// Innocent jobs with so much bad luck that they may fail.
    pub(crate) may_fail: BTreeSet<String>,
    /// Dead letters, by job.
    pub(crate) dead: BTreeSet<String>,
    pub(crate) violations: Vec<String>,
    pub(crate) faults: BTreeMap<Fault, u64>,
}

impl World {
    pub(crate) fn new(seed: u64, broken: Broken, is_traced: bool) -> Self {
        let chance = Chance::new(seed);
        let plan = Plan::draw(&chance, broken);
        let stream = |capacity| (capacity, plan.lease, plan.duplicate_window, plan.reorders);
        let (jobs, outcomes) = (stream(usize::MAX), stream(plan.max_outcomes));
        let now = Instant::now();
        let disk = Disk::default();
        disk.lie_about_syncs(broken == Broken::DiskLies);
        Self(Arc::new(Shared {
            jobs: Channel::new(Stream::new(jobs.0, jobs.1, jobs.2, jobs.3)),
            outcomes: Channel::new(Stream::new(outcomes.0, outcomes.1, outcomes.2, outcomes.3)),
            chance,
            disk,
            lock: Arc::default(),
            index: IndexServer::default(),
            early: Mutex::default(),
            all_published: AtomicBool::new(false),
            controls: Mutex::default(),
            is_retrying: AtomicBool::new(false),
            workers_over: CancellationToken::new(),
            collectors_over: CancellationToken::new(),
            started: now,
            calm: AtomicBool::new(plan.is_peaceful),
            last_id: AtomicU64::new(0),
            trace: is_traced.then(Mutex::default),
            processes: Mutex::default(),
            outages: Mutex::new(Outages { broker: now, index: now }),
            copies: Mutex::new(vec![Snapshot::default()]),
            ledger: Mutex::default(),
            plan,
        }))
    }

    /// Where a process meets the world: it dies here, or waits while it is stopped.
    pub(crate) async fn gate(&self, process: &Process) {
        if process.step_is_last() {
            self.kill(process);
        }
        loop {
            if process.dead().is_cancelled() {
                std::future::pending::<()>().await;
            }
            let until = process.stopped_until();
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }

    /// Something takes a little time, often none.
    pub(crate) async fn pass(&self, most_millis: u64) {
        if self.chance.one_in(3) {
            tokio::time::sleep(self.chance.millis(1, most_millis)).await;
        }
    }
}

impl Shared {
    /// A process of its own, which may be meant to die at one of its next steps.
    pub(crate) fn start_process(&self, name: String, role: Role) -> Process {
        let over = match role {
            Role::Collector => &self.collectors_over,
            Role::Worker | Role::Producer => &self.workers_over,
        };
        let steps_left = self.strikes(3).then(|| self.chance.between(1, 150));
        let process = Process::new(name, role, over.child_token(), steps_left);
        self.note(|| format!("{} starts", process.name()));
        lock(&self.processes).push(process.clone());
        process
    }

    pub(crate) fn forget_process(&self, process: &Process) {
        lock(&self.processes).retain(|other| !other.is(process));
    }

    /// A process that lives, if there is one.
    pub(crate) fn any_process(&self) -> Option<Process> {
        let processes = lock(&self.processes);
        let living: Vec<&Process> =
            processes.iter().filter(|process| !process.dead().is_cancelled()).collect();
        (!living.is_empty()).then(|| living[self.chance.index(living.len())].clone())
    }

    pub(crate) fn kill(&self, process: &Process) {
        self.count(match process.role() {
            Role::Producer => Fault::ProducerKilled,
            Role::Worker => Fault::WorkerKilled,
            Role::Collector => Fault::CollectorKilled,
        });
        self.note(|| format!("{} is killed", process.name()));
        process.dead().cancel();
    }

    /// Whether a fault with this chance strikes now.
    pub(crate) fn strikes(&self, one_in: u64) -> bool {
        !self.is_calm() && self.chance.one_in(one_in)
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    /// Ends all faults.
    pub(crate) fn calm(&self) {
        self.note(|| "no faults from here on".to_owned());
        self.calm.store(true, Ordering::Relaxed);
        let now = Instant::now();
        self.break_down(|outages| *outages = Outages { broker: now, index: now });
        self.disk.fail_syncs(false);
        for process in lock(&self.processes).iter() {
            process.heal(now);
        }
    }

    pub(crate) fn outages(&self) -> Outages {
        *lock(&self.outages)
    }

    pub(crate) fn break_down(&self, change: impl FnOnce(&mut Outages)) {
        change(&mut lock(&self.outages));
    }

    pub(crate) fn copy_index(&self) {
        lock(&self.copies).push(self.index.snapshot());
    }

    pub(crate) fn roll_index_back(&self) {
        let copies = lock(&self.copies);
        self.index.restore(copies[self.chance.index(copies.len())].clone());
    }

    /// The power of the broker fails.
    pub(crate) fn lose_power(&self) {
        let now = Instant::now();
        let forgotten = self.jobs.state().lose_power(now, &self.chance);
        self.outcomes.state().lose_power(now, &self.chance);
        let mut ledger = self.ledger();
        for sequence in forgotten {
            ledger.poisoned.remove(&sequence);
            *ledger.forgotten.entry(sequence).or_default() += 1;
        }
    }

    /// An id that no other message has.
    pub(crate) fn fresh_id(&self) -> String {
        format!("fresh-{}", self.last_id.fetch_add(1, Ordering::Relaxed))
    }

    /// The id of a job.
    pub(crate) fn id(number: usize) -> String {
        format!("job-{number}")
    }

    /// The number and kind of a job.
    pub(crate) fn kind(&self, id: &str) -> Option<(usize, Kind)> {
        let number = id.strip_prefix("job-")?.parse().ok()?;
        self.plan.jobs.get(number).map(|kind| (number, *kind))
    }

    /// A job starts; how often it has, this time included.
    pub(crate) fn start_job(&self, number: usize) -> u32 {
        let mut ledger = self.ledger();
        let starts = ledger.starts.entry(number).or_default();
        *starts += 1;
        *starts
    }

    /// A job ends the deliveries of all that this process holds.
    pub(crate) fn poison(&self, process: &Process, guilty: &str) {
        let mut ledger = self.ledger();
        let held = process.held();
        let Some(&(guilty, _)) = held.iter().find(|(_, id)| id == guilty) else { return };
        let guilty = (guilty, ledger.forgotten.get(&guilty).copied().unwrap_or_default());
        for (sequence, _) in held {
            *ledger.poisoned.entry(sequence).or_default().entry(guilty).or_default() += 1;
        }
    }

    /// The engine of this process dies for no reason.
    pub(crate) fn strike_engine(&self, process: &Process) {
        self.count(Fault::EngineDied);
        self.note(|| format!("the engine of {} dies", process.name()));
        self.ledger().struck.extend(process.held().into_iter().map(|(sequence, _)| sequence));
    }

    /// A worker tells that a job failed.
    pub(crate) fn failed(&self, process: &Process, id: &str, (attempt, reason): (u32, &str)) {
        let Some((_, kind)) = self.kind(id) else {
            return self.violation(format!("{id} was never published and fails"));
        };
        if kind.fails() {
            return;
        }
        let held = process.held().into_iter().find(|(_, held)| held == id);
        let Some((sequence, _)) = held else {
            return self.violation(format!("{} fails {id} and doesn't hold it", process.name()));
        };
        let mut ledger = self.ledger();
        ledger.may_fail.insert(id.to_owned());
        *ledger.faults.entry(Fault::InnocentGivenUp).or_default() += 1;
        // One guilty job may not do it. Where several are about, the others are bad luck.
        let worst =
            ledger.poisoned.get(&sequence).and_then(|guilty| guilty.values().max().copied());
        let worst = worst.unwrap_or_default();
        let bad_luck = (attempt - 1).saturating_sub(worst);
        if bad_luck < MIN_BAD_LUCK && !ledger.struck.contains(&sequence) {
            let text = format!(
                "{id} is innocent ({kind:?}) and given up in delivery {attempt}, although one guilty job ended \
                 {worst} of its deliveries and bad luck only {bad_luck}: {reason}"
            );
            ledger.violations.push(text);
        }
    }

    pub(crate) fn dead_letter(&self, id: &str) {
        self.ledger().dead.insert(id.to_owned());
    }

    pub(crate) fn violation(&self, text: String) {
        self.note(|| format!("WRONG: {text}"));
        self.ledger().violations.push(text);
    }

    pub(crate) fn count(&self, fault: Fault) {
        *self.ledger().faults.entry(fault).or_default() += 1;
    }

    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    /// Writes down what happens, where somebody wants to read it.
    pub(crate) fn note(&self, what: impl FnOnce() -> String) {
        if let Some(trace) = &self.trace {
            let at = self.started.elapsed().as_secs_f64();
            lock(trace).push(format!("{at:9.3} {}", what()));
        }
    }

    pub(crate) fn trace(&self) -> Vec<String> {
        self.trace.as_ref().map(|trace| lock(trace).clone()).unwrap_or_default()
    }
}

/// No code panics while it holds one of these locks, or the test fails anyhow.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
