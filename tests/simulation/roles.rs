//! The roles of a world, each supervised: what dies or ends is started again, until there is no more
//! work. The workers and collectors are the product's own; the producer is a few lines of its way.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use collector::{Collector, Control, Dedup, End, Error, MemoryDedup, Observer, Probe};
use gpu_worker::{Config, Stats};
use shared::queue::conformance;
use shared::{JobId, Queue, Settled};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::engine::SimBackend;
use crate::plan::Broken;
use crate::process::{Process, Role};
use crate::queue::SimQueue;
use crate::storage::{SimDedup, SimLog};
use crate::stream::Storing;
use crate::world::{Fault, Shared, World, lock};

/// How long the answer of a collector is waited for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs a process until it ends, which gives how, or dies.
async fn live<F: Future<Output = Result<(), String>>>(
    world: &World,
    process: &Process,
    role: F,
) -> Option<Result<(), String>> {
    let mut role = pin!(role);
    let ended = tokio::select! {
        biased;
        () = process.dead().cancelled() => {
            // Before the role is dropped, and with it the lock on the output.
            crash_disk(world, process);
            None
        }
        ended = &mut role => Some(ended),
    };
    world.forget_process(process);
    world.note(|| format!("{} is over: {ended:?}", process.name()));
    ended
}

/// Runs the processes of a role, one after another, until one ends after it was told that there is no
/// more work. `start` gives what made it end, if that is no wonder.
async fn supervise<F: Future<Output = Result<(), String>>>(
    world: &World,
    (name, role): (String, Role),
    start: impl Fn(Process) -> F,
) {
    let over = if role == Role::Collector { &world.collectors_over } else { &world.workers_over };
    for number in 0_u64.. {
        let process = world.start_process(format!("{name}.{number}"), role);
        let ended = live(world, &process, start(process.clone())).await;
        if ended.is_some() && over.is_cancelled() {
            return;
        }
        sleep(world.chance.millis(50, 4_000)).await;
    }
}

/// What a process that had the output open leaves of it: all of it, or some of what wasn't synced.
fn crash_disk(world: &World, process: &Process) {
    if !process.has_disk() {
        return;
    }
    world.disk.crash(|unsynced| {
        let is_torn = unsynced > 0 && world.chance.one_in(2);
        if !is_torn {
            return unsynced;
        }
        world.count(Fault::TornTail);
        let kept = world.chance.index(unsynced + 1);
        world.note(|| format!("the disk keeps {kept} of {unsynced} bytes"));
        kept
    });
}

/// Jobs that the producer asks about at once.
const MAX_ASKED: usize = 5;

/// Publishes all jobs, and again from the start when it was killed.
pub(crate) async fn produce(world: World) {
    for _run in 0..=world.plan.num_reruns {
        loop {
            let process = world.start_process("producer".to_owned(), Role::Producer);
            let queue = SimQueue { world: world.clone(), process: process.clone() };
            let ended = live(&world, &process, produce_once(&queue)).await;
            sleep(world.chance.millis(50, 4_000)).await;
            if ended == Some(Ok(())) {
                break;
            }
        }
    }
    world.all_published.store(true, Ordering::Relaxed);
}

async fn produce_once(queue: &SimQueue) -> Result<(), String> {
    let world = &queue.world;
    let ids: Vec<String> = (0..world.plan.jobs.len()).map(Shared::id).collect();
    for ids in ids.chunks(MAX_ASKED) {
        let written = known(world, ids).await.unwrap_or_else(|| vec![false; ids.len()]);
        for (id, is_written) in ids.iter().zip(written) {
            world.pass(1_000).await;
            if is_written {
                world.note(|| format!("{id} is left out"));
                world.count(Fault::LeftOut);
                continue;
            }
            let published = queue.publish(conformance::job(id)).await;
            published.map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

/// Asks the collector that serves which jobs have their line; `None` if it doesn't answer.
async fn known(world: &World, ids: &[String]) -> Option<Vec<bool>> {
    let (reply, answer) = oneshot::channel();
    let digests = ids.iter().map(|id| JobId(id.clone()).digest()).collect();
    ask(world, Control::Known { ids: digests, reply })?;
    let known = timeout(ANSWER_TIMEOUT, answer).await.ok()?.ok()?;
    // A retry may have taken lines out since, and what is broken is noticed by its harm.
    if !world.plan.retries && world.plan.broken == Broken::Nothing {
        let lines: BTreeSet<String> = world.disk.synced_lines().into_iter().collect();
        let wrong = ids.iter().zip(&known.written).filter(|(id, is)| **is && !lines.contains(*id));
        wrong.for_each(|(id, _)| world.violation(format!("{id} is said to have a line")));
    }
    Some(known.written)
}

/// Puts a request to the collector that serves, if there is one and it has room for it.
fn ask(world: &World, control: Control) -> Option<()> {
    let controls = lock(&world.controls).clone()?;
    controls.try_send(control).ok()
}

/// A worker's place: it joins some time, and there is always one in it again.
pub(crate) async fn work(world: World, rank: u32) {
    if rank > 0 {
        sleep(world.chance.millis(0, 20_000)).await;
    }
    supervise(&world, (format!("worker-{rank}"), Role::Worker), |process| {
        work_once(world.clone(), process, rank)
    })
    .await;
}

async fn work_once(world: World, process: Process, rank: u32) -> Result<(), String> {
    let config = Config {
        rank,
        name: process.name().to_owned(),
        max_attempts: world.plan.max_attempts,
        drain_timeout: world.plan.drain_timeout,
    };
    let backend = SimBackend { world: world.clone(), process: process.clone() };
    let queue = SimQueue { world: world.clone(), process: process.clone() };
    let control = (Arc::new(Stats::default()), process.shutdown().clone());
    let ran = gpu_worker::run(config, backend, (queue.clone(), queue), control, |_model| ()).await;
    if let Err(gpu_worker::Error::Load(_) | gpu_worker::Error::Thread(_)) = &ran {
        world.violation(format!("{} ends for no reason: {ran:?}", process.name()));
    }
    if ran.is_ok() && !process.shutdown().is_cancelled() {
        world.violation(format!("{} ends although nobody asked it to", process.name()));
    }
    ran.map_err(|error| error.to_string())
}

/// A collector's place.
pub(crate) async fn collect(world: World, number: u64) {
    supervise(&world, (format!("collector-{number}"), Role::Collector), |process| {
        collect_once(world.clone(), process)
    })
    .await;
}

async fn collect_once(world: World, process: Process) -> Result<(), String> {
    let waiting = Arc::clone(&world.lock).lock_owned();
    let _lock = tokio::select! {
        biased;
        lock = waiting => lock,
        () = process.shutdown().cancelled(), if !world.collectors_over.is_cancelled() => return Ok(()),
    };
    world.gate(&process).await;
    process.set_has_disk(true);
    let collected = if world.plan.has_index_server {
        serve(&world, &process, world.index.client()).await
    } else {
        serve(&world, &process, MemoryDedup::default()).await
    };
    match &collected {
        Ok(()) if process.shutdown().is_cancelled() => {}
        // It is dead.
        Err(Error::Stopped(_)) => std::future::pending().await,
        Err(Error::Queue(_)) => {}
        // What could not be synced is still there to be read, unless the power fails.
        Err(Error::Io { .. }) if world.chance.one_in(2) => crash_disk(&world, &process),
        Err(Error::Io { .. }) => {}
        ended => {
            world.violation(format!("{} ends for no reason: {ended:?}", process.name()));
        }
    }
    collected.map_err(|error| error.to_string())
}

async fn serve<D: Dedup + Sync>(world: &World, process: &Process, index: D) -> Result<(), Error> {
    let log = SimLog { world: world.clone(), process: process.clone(), inner: world.disk.open() };
    let is_remote = world.plan.has_index_server;
    let dedup =
        SimDedup { world: world.clone(), process: process.clone(), inner: index, is_remote };
    let mut collector = Collector::open(log, dedup).await?;
    let queue = SimQueue { world: world.clone(), process: process.clone() };
    let (tell, end) = watch::channel(End::Open);
    let (control, controls) = mpsc::channel(1);
    *lock(&world.controls) = Some(control);
    let (watched, probed) = (world.clone(), process.clone());
    collector.set_probe(Probe::new(move |_step| {
        let dies = probed.step_is_last();
        if dies {
            watched.kill(&probed);
        }
        dies
    }));
    let mut lines = Lines { world: world.clone() };
    let told = async {
        process.shutdown().cancelled().await;
        let is_over = world.collectors_over.is_cancelled();
        tell.send_replace(if is_over { End::WhenDrained } else { End::Now });
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        ran = collector::run(&queue, &mut collector, end, controls, &mut lines) => ran,
        () = told => Ok(()),
    }
}

/// Puts the jobs back into the queue that have failed by then, as `flotilla retry` does: their lines leave the
/// output, then they are published anew, then their dead letters go. It is run until it has worked.
pub(crate) async fn retry(world: World) {
    sleep(world.chance.millis(1_000, 100_000)).await;
    let dead: Vec<String> = world.ledger().dead.iter().cloned().collect();
    if dead.is_empty() || world.workers_over.is_cancelled() {
        return;
    }
    world.is_retrying.store(true, Ordering::Relaxed);
    let removed = loop {
        if let Some(removed) = remove_failed(&world, &dead).await {
            break removed;
        }
        sleep(world.chance.millis(50, 2_000)).await;
    };
    world.note(|| format!("{removed} lines are removed, to be retried: {dead:?}"));
    world.count(Fault::Retried);
    for id in dead {
        world.ledger().dead.remove(&id);
        let job = conformance::job(&id);
        let mut stream = world.jobs.state();
        if let Storing::Held(sequence) = stream.store(Instant::now(), world.fresh_id(), &job) {
            stream.confirm(sequence);
        }
    }
    world.jobs.has_arrived();
    world.is_retrying.store(false, Ordering::Relaxed);
}

/// Asks the collector that serves; `None` if it doesn't answer or could not.
async fn remove_failed(world: &World, ids: &[String]) -> Option<u64> {
    let ids = ids.iter().map(|id| JobId(id.clone()).digest()).collect();
    let (reply, answer) = oneshot::channel();
    ask(world, Control::RemoveFailed { ids, reply })?;
    timeout(ANSWER_TIMEOUT, answer).await.ok()?.ok()?.ok()
}

/// Notes the lines that are written.
struct Lines {
    world: World,
}

impl Observer for Lines {
    fn written(&mut self, outcomes: &[Settled]) {
        for outcome in outcomes {
            self.world.note(|| format!("{} has its line", outcome.context.id));
        }
    }
}
