//! What a seed's world is like: its jobs, its roles, its times. Small, so that there can be many.

use std::time::Duration;

use crate::chance::Chance;

/// What becomes of a worker that takes a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It answers at once, nearly.
    Quick,
    /// It computes for several leases, and makes progress all the while.
    Long,
    /// It says that this one can't be answered.
    Refused,
    /// Its process dies.
    Kills,
    /// Its process dies so often, and then it answers.
    KillsAtFirst(u32),
    /// Its engine goes down, its process lives on.
    CrashesEngine,
}

impl Kind {
    fn draw(chance: &Chance, harmless: bool) -> Self {
        match chance.between(1, 40) {
            1 if !harmless => Self::Kills,
            2 if !harmless => Self::KillsAtFirst(chance.between(1, 2) as u32),
            3 if !harmless => Self::CrashesEngine,
            4..=6 => Self::Refused,
            7..=10 => Self::Long,
            _ => Self::Quick,
        }
    }

    /// Whether its line has to say that it failed.
    pub(crate) fn fails(self) -> bool {
        matches!(self, Self::Refused | Self::Kills | Self::CrashesEngine)
    }
}

/// What is broken on purpose, to see that it is noticed. Each breaks the order of the steps of a role
/// where the role itself can't tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    Nothing,
    /// The disk says that it has synced and has not: acked before written.
    DiskLies,
    /// The index takes ids for answered as soon as it is asked for them: marked before written.
    IndexMarksEarly,
    /// The index knows no id: nothing is left out.
    IndexForgets,
    /// The queue of outcomes confirms before it has stored: jobs acked before their outcome is published.
    OutcomesConfirmEarly,
}

/// The settings of a world.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) broken: Broken,
    /// By number, which is in the id.
    pub(crate) jobs: Vec<Kind>,
    pub(crate) num_workers: u64,
    pub(crate) num_collectors: u64,
    /// Whether the index of ids is a server; else each collector has its own in memory.
    pub(crate) has_index_server: bool,
    pub(crate) slots: usize,
    pub(crate) max_attempts: u32,
    pub(crate) lease: Duration,
    pub(crate) drain_timeout: Duration,
    /// How long the queues recognise a message published again.
    pub(crate) duplicate_window: Duration,
    /// Outcomes that the queue holds at most.
    pub(crate) max_outcomes: usize,
    /// Whether messages are delivered in another order than published.
    pub(crate) reorders: bool,
    /// Whether nothing goes wrong at all: then nothing may be done twice.
    pub(crate) is_peaceful: bool,
    /// For how long there are faults.
    pub(crate) storm: Duration,
    /// Longest time between two faults, in milliseconds.
    pub(crate) max_lull: u64,
    /// Whether failed jobs are tried again once.
    pub(crate) retries: bool,
    /// How often the producer is run after it is done.
    pub(crate) num_reruns: u64,
}

impl Plan {
    pub(crate) fn draw(chance: &Chance, broken: Broken) -> Self {
        let is_peaceful = broken == Broken::Nothing && chance.one_in(20);
        let harmless = is_peaceful || chance.one_in(3);
        let num_jobs = chance.between(5, 40);
        let jobs = (0..num_jobs).map(|_| Kind::draw(chance, harmless)).collect();
        Self {
            broken,
            jobs,
            num_workers: chance.between(1, 4),
            num_collectors: chance.between(1, 2),
            has_index_server: !chance.one_in(4),
            slots: chance.between(1, 8) as usize,
            max_attempts: chance.between(2, 5) as u32,
            lease: chance.millis(5_000, 15_000),
            drain_timeout: chance.millis(500, 20_000),
            duplicate_window: chance.millis(1_000, 60_000),
            max_outcomes: chance.between(2, 60) as usize,
            reorders: !chance.one_in(3),
            is_peaceful,
            storm: chance.millis(2_000, 90_000),
            max_lull: chance.between(500, 12_000),
            retries: !is_peaceful && chance.one_in(3),
            num_reruns: if is_peaceful { 0 } else { chance.between(0, 4) / 3 },
        }
    }
}
