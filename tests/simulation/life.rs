//! The life of a world: its roles run through a storm, then everything has to drain, and then what is
//! left is looked at.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::plan::{Broken, Kind};
use crate::world::{Fault, Shared, World};
use crate::{roles, storm};

/// How often it is looked whether everything has drained.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// The time within which everything has drained. Jobs that kill take turns, for many leases.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2 * 3600);
/// The time within which roles end that have nothing to do.
const END_TIMEOUT: Duration = Duration::from_secs(300);

/// What is known of a world at its end.
pub(crate) struct Verdict {
    pub(crate) violations: Vec<String>,
    pub(crate) faults: BTreeMap<Fault, u64>,
    /// Everything that happened, if it was to be written down.
    pub(crate) trace: Vec<String>,
}

/// Lives the world of `seed`.
pub(crate) fn live(seed: u64, broken: Broken, is_traced: bool) -> Verdict {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().expect("needs nothing");
    let world = runtime.block_on(async {
        let world = World::new(seed, broken, is_traced);
        live_through(&world).await;
        world
    });
    drop(runtime);
    let mut ledger = world.ledger();
    let violations = std::mem::take(&mut ledger.violations);
    Verdict { violations, faults: std::mem::take(&mut ledger.faults), trace: world.trace() }
}

async fn live_through(world: &World) {
    world.note(|| format!("{:?}", world.plan));
    let (mut workers, mut others) = (JoinSet::new(), JoinSet::new());
    let mut collectors = JoinSet::new();
    others.spawn(roles::produce(world.clone()));
    others.spawn(storm::rage(world.clone()));
    if world.plan.retries {
        others.spawn(roles::retry(world.clone()));
    }
    for rank in 0..world.plan.num_workers {
        workers.spawn(roles::work(world.clone(), rank as u32));
    }
    for number in 0..world.plan.num_collectors {
        collectors.spawn(roles::collect(world.clone(), number));
    }
    if timeout(DRAIN_TIMEOUT, drained(world)).await.is_err() {
        let (jobs, outcomes) = (world.jobs.state().len(), world.outcomes.state().len());
        world.violation(format!("it never drains: {jobs} jobs and {outcomes} outcomes are queued"));
    }
    world.calm();
    // Workers first: one that was stopped may still have an outcome.
    world.workers_over.cancel();
    end(world, "the workers", &mut workers).await;
    end(world, "the producer", &mut others).await;
    world.collectors_over.cancel();
    end(world, "the collectors", &mut collectors).await;
    check(world);
}

/// Waits until all is published, and nothing is queued.
async fn drained(world: &World) {
    loop {
        let all_published = world.all_published.load(Ordering::Relaxed)
            && !world.is_retrying.load(Ordering::Relaxed);
        if all_published && world.jobs.state().len() + world.outcomes.state().len() == 0 {
            return;
        }
        sleep(LOOK_INTERVAL).await;
    }
}

async fn end(world: &World, who: &str, tasks: &mut JoinSet<()>) {
    let ending = async {
        while let Some(joined) = tasks.join_next().await {
            if let Err(error) = joined {
                world.violation(format!("{who}: {error}"));
            }
        }
    };
    if timeout(END_TIMEOUT, ending).await.is_err() {
        world.violation(format!("{who} do not end"));
    }
}

/// What must hold at the end.
fn check(world: &World) {
    let (jobs, outcomes) = (world.jobs.state().len(), world.outcomes.state().len());
    if jobs + outcomes > 0 {
        world.violation(format!("{jobs} jobs and {outcomes} outcomes are left queued"));
    }
    let mut lines: BTreeMap<String, Vec<bool>> = BTreeMap::new();
    for (id, failed) in world.disk.lines() {
        lines.entry(id).or_default().push(failed);
    }
    let mut violations = Vec::new();
    let ledger = world.ledger();
    for (number, &kind) in world.plan.jobs.iter().enumerate() {
        let id = Shared::id(number);
        let is_dead = ledger.dead.contains(&id);
        let lines = lines.remove(&id).unwrap_or_default();
        match lines[..] {
            [failed] => violations.extend(
                wrong(kind, ledger.may_fail.contains(&id), failed, is_dead)
                    .map(|what| format!("{id} ({kind:?}) {what}")),
            ),
            [] => violations.push(format!("{id} ({kind:?}) has no line")),
            _ => violations.push(format!("{id} ({kind:?}) has {} lines", lines.len())),
        }
    }
    if world.plan.is_peaceful {
        let twice = ledger.starts.iter().filter(|(_, starts)| **starts > 1);
        violations.extend(twice.map(|(number, starts)| {
            format!("{} was computed {starts} times for no reason", Shared::id(*number))
        }));
    }
    violations.extend(lines.keys().map(|id| format!("{id} has a line and was never published")));
    drop(ledger);
    for violation in violations {
        world.violation(violation);
    }
}

/// What is wrong with the line and the dead letter of a job.
fn wrong(kind: Kind, may_fail: bool, failed: bool, is_dead: bool) -> Option<&'static str> {
    match (kind.fails(), failed, is_dead) {
        (true, false, _) => Some("can't be answered and is"),
        (true, true, false) => Some("failed and is no dead letter"),
        (false, true, _) if !may_fail => Some("failed for no reason"),
        (false, _, true) if !may_fail => Some("is a dead letter for no reason"),
        // With much bad luck one worker may give a job up and another answer it.
        _ => None,
    }
}
