//! Taking jobs from the queue: no more than there are free slots, and alone what has to be alone.
//!
//! Each round asks for one job. Only if that one is delivered for the first time, the round goes on with as many
//! as there are slots; see `quarantine` for why.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use shared::{Delivery, Job, Queue, Settled};
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::backend::Serving;
use crate::quarantine::Treatment;
use crate::serve::{GIVE_BACK_TIMEOUT, Keeping, Served, Server};

/// How long a round waits for its first job before it looks around.
const PULL_WAIT: Duration = Duration::from_secs(5);
/// How long it waits for the others. Short: what comes later may be jobs that come again.
const FILL_WAIT: Duration = Duration::from_millis(100);
/// How often an engine that hangs is looked at.
const HUNG_INTERVAL: Duration = Duration::from_secs(1);
/// Looks after which the worker gives up on it.
const MAX_HUNG_LOOKS: u32 = 600;

/// Why a worker pulls no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It was told to.
    Shutdown,
    /// The engine is down.
    EngineDown,
    /// The engine hangs for too long.
    Hung,
    /// The queue can't serve it; the error is in `broken`.
    Broken,
}

/// What an engine's life brought.
pub(crate) struct Tally<D> {
    /// Whether any job was settled.
    pub(crate) settled_any: bool,
    /// Jobs that the engine never had, for the next one.
    pub(crate) kept: Vec<Keeping<D>>,
}

impl<D> Tally<D> {
    /// Counts what became of a job. One whose task panicked comes again when its lease runs out.
    fn add(&mut self, joined: Result<Served<Keeping<D>>, JoinError>) {
        match joined {
            Ok(Served::Settled) => self.settled_any = true,
            Ok(Served::Unsettled) => {}
            Ok(Served::Kept(keeping)) => self.kept.push(keeping),
            Err(error) => tracing::error!(%error, "a job's task ended early"),
        }
    }
}

/// Serves until something stops it, then lets the jobs it holds settle; why, and what came of it. Begins with those
/// that were kept when the last engine went down.
pub(crate) async fn serve_until_stopped<E: Serving, J: Queue<Job>, O: Queue<Settled>>(
    server: &Arc<Server<E, O>>,
    jobs: &J,
    shutdown: &CancellationToken,
    kept: Vec<Keeping<J::Delivery>>,
) -> (Stop, Tally<J::Delivery>) {
    let mut puller = Puller {
        server,
        jobs,
        shutdown,
        slots: Arc::new(Semaphore::new(server.engine.num_slots().max(1))),
        held: JoinSet::new(),
        tally: Tally { settled_any: false, kept: Vec::new() },
    };
    let stop = puller.pull_until_stopped(kept).await;
    puller.drain(stop).await;
    (stop, puller.tally)
}

struct Puller<'a, E, J: Queue<Job>, O> {
    server: &'a Arc<Server<E, O>>,
    jobs: &'a J,
    shutdown: &'a CancellationToken,
    slots: Arc<Semaphore>,
    /// The jobs that are held; each tells what became of it.
    held: JoinSet<Served<Keeping<J::Delivery>>>,
    tally: Tally<J::Delivery>,
}

impl<E: Serving, J: Queue<Job>, O: Queue<Settled>> Puller<'_, E, J, O> {
    async fn pull_until_stopped(&mut self, kept: Vec<Keeping<J::Delivery>>) -> Stop {
        let mut fill = false;
        let mut has_alone = self.start(kept).await;
        loop {
            if has_alone {
                tokio::select! {
                    biased;
                    () = settle_all(&mut self.held, &mut self.tally) => {}
                    stop = stopped(self.server, self.shutdown) => return stop,
                }
            }
            self.reap();
            let ready = tokio::select! {
                biased;
                stop = self.stopped() => return stop,
                free = self.ready() => free,
            };
            let Some(free) = ready else { return Stop::Hung };
            let (max, wait) = if fill { (free, FILL_WAIT) } else { (1, PULL_WAIT) };
            let pulled = tokio::select! {
                biased;
                stop = self.stopped() => return stop,
                pulled = self.jobs.pull(max, wait) => pulled,
            };
            let deliveries = match pulled {
                Ok(deliveries) => deliveries,
                Err(error) => {
                    self.server.broken.set(error);
                    return Stop::Broken;
                }
            };
            let is_first = deliveries.first().is_some_and(|delivery| delivery.attempt() == 1);
            has_alone = self.start(self.hold(deliveries)).await;
            // What is at the head of the queue now need not be there any more when a slot gets free.
            fill = !fill && is_first && self.slots.available_permits() > 0;
        }
    }

    fn hold(&self, deliveries: Vec<J::Delivery>) -> Vec<Keeping<J::Delivery>> {
        let hold = |delivery: J::Delivery| {
            let held = self.server.stats.hold(&delivery.message().run, delivery.attempt());
            Keeping { delivery, held }
        };
        deliveries.into_iter().map(hold).collect()
    }

    /// Starts the jobs; whether one of them has to be alone. Nothing may be pulled before that one is settled.
    async fn start(&mut self, held: Vec<Keeping<J::Delivery>>) -> bool {
        let mut any_alone = false;
        let mut placed = Vec::with_capacity(held.len());
        for keeping in held {
            let treatment = Treatment::of(&keeping.delivery, self.server.config.max_attempts);
            any_alone |= treatment == Treatment::Alone;
            let place = self.server.quarantine.place(treatment).await;
            placed.push((keeping, place));
        }
        for (keeping, place) in placed {
            let slot = Arc::clone(&self.slots).try_acquire_owned();
            let server = Arc::clone(self.server);
            self.held.spawn(async move {
                let _slot = slot;
                server.serve(keeping, place).await
            });
        }
        any_alone
    }

    /// Waits until there is a free slot and an engine that works; how many slots are free. `None` if the
    /// engine hangs for good.
    async fn ready(&self) -> Option<usize> {
        // Never closed, so this waits for a slot and leaves it free.
        drop(self.slots.acquire().await);
        for _ in 0..MAX_HUNG_LOOKS {
            if !self.hangs() {
                return Some(self.slots.available_permits().max(1));
            }
            // Looked at again and again: the thread that hangs can't tell when it goes on.
            tokio::time::sleep(HUNG_INTERVAL).await;
        }
        None
    }

    fn hangs(&self) -> bool {
        let mut hung_at = self.server.hung_at.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(num_steps) = *hung_at else { return false };
        let progress = self.server.engine.progress();
        let hangs = progress.is_busy && progress.num_steps == num_steps;
        if !hangs {
            *hung_at = None;
            tracing::info!(worker = self.server.config.name, "the engine goes on");
        }
        hangs
    }

    async fn stopped(&self) -> Stop {
        stopped(self.server, self.shutdown).await
    }

    fn reap(&mut self) {
        while let Some(joined) = self.held.try_join_next() {
            self.tally.add(joined);
        }
    }

    /// Lets what is held settle: while the time for it lasts, where it makes sense. Gives the rest back.
    async fn drain(&mut self, stop: Stop) {
        let server = self.server;
        let no_time_left = async {
            match stop {
                Stop::Shutdown => tokio::time::sleep(server.config.drain_timeout).await,
                // The jobs notice it themselves and go back; those that have their outcome publish it.
                Stop::EngineDown => {
                    tokio::select! {
                        biased;
                        () = self.shutdown.cancelled() => {}
                        () = server.broken.token.cancelled() => return,
                    }
                    tokio::time::sleep(server.config.drain_timeout).await;
                }
                Stop::Hung | Stop::Broken => {}
            }
        };
        tokio::select! {
            biased;
            () = settle_all(&mut self.held, &mut self.tally) => return,
            () = no_time_left => {}
            () = server.broken.token.cancelled() => {}
        }
        server.give_back.cancel();
        let giving_back = settle_all(&mut self.held, &mut self.tally);
        if tokio::time::timeout(GIVE_BACK_TIMEOUT, giving_back).await.is_err() {
            let num_jobs = self.held.len();
            tracing::warn!(
                num_jobs,
                "jobs could not be given back in time; their leases will run out"
            );
            self.held.shutdown().await;
        }
    }
}

/// Waits until nothing is held.
async fn settle_all<D: Send + 'static>(
    held: &mut JoinSet<Served<Keeping<D>>>,
    tally: &mut Tally<D>,
) {
    while let Some(joined) = held.join_next().await {
        tally.add(joined);
    }
}

/// Waits until nothing must be pulled any more.
async fn stopped<E: Serving, O: Queue<Settled>>(
    server: &Server<E, O>,
    shutdown: &CancellationToken,
) -> Stop {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => Stop::Shutdown,
        () = server.broken.token.cancelled() => Stop::Broken,
        () = server.engine.down() => Stop::EngineDown,
    }
}
