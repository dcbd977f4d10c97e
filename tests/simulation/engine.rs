//! An engine that computes nothing: what it does with a job is what the job's kind says.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use gpu_worker::{Answer, Backend, Counters, Error, Failure, Progress, Serving};
use shared::{Completed, FinishReason, Job};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::plan::Kind;
use crate::process::Process;
use crate::world::{Fault, World};

/// Steps in the time of a lease.
const STEPS_PER_LEASE: u32 = 6;

#[derive(Clone)]
pub(crate) struct SimBackend {
    pub(crate) world: World,
    pub(crate) process: Process,
}

impl Backend for SimBackend {
    type Engine = SimEngine;

    async fn start(&self) -> Result<SimEngine, Error> {
        let world = &self.world;
        sleep(world.chance.millis(10, 2_000)).await;
        world.gate(&self.process).await;
        if world.strikes(40) {
            world.count(Fault::LoadFailed);
            return Err(Error::LoadPanicked);
        }
        let now = Instant::now();
        let after = |one_in| world.strikes(one_in).then(|| now + world.chance.millis(500, 60_000));
        let (dies_at, hangs_at) = (after(4), after(6));
        let hangs_until =
            hangs_at.map(|at| at + world.plan.lease * world.chance.between(1, 5) as u32);
        Ok(SimEngine {
            backend: self.clone(),
            num_steps: AtomicU64::new(0),
            num_busy: AtomicU64::new(0),
            down: CancellationToken::new(),
            dies_at,
            hangs: hangs_at.zip(hangs_until),
        })
    }
}

pub(crate) struct SimEngine {
    backend: SimBackend,
    num_steps: AtomicU64,
    num_busy: AtomicU64,
    down: CancellationToken,
    /// It dies for no reason at its first step from then on, if there are faults at all.
    dies_at: Option<Instant>,
    /// It makes no steps from then until then.
    hangs: Option<(Instant, Instant)>,
}

impl Serving for SimEngine {
    fn model_name(&self) -> &str {
        "simulated"
    }

    fn num_slots(&self) -> usize {
        self.backend.world.plan.slots
    }

    fn progress(&self) -> Progress {
        let num_steps = self.num_steps.load(Ordering::Relaxed);
        Progress { num_steps, is_busy: self.num_busy.load(Ordering::Relaxed) > 0 }
    }

    fn counters(&self) -> Counters {
        Counters { num_running: self.num_busy.load(Ordering::Relaxed), ..Counters::default() }
    }

    async fn down(&self) {
        self.down.cancelled().await;
    }

    async fn answer(&self, job: &Job) -> Result<Answer, Failure> {
        // As the real one: what was never handed to the engine can't have taken it down.
        if self.down.is_cancelled() {
            return Err(Failure::Down { held: false });
        }
        let _busy = Busy::new(&self.num_busy);
        tokio::select! {
            biased;
            () = self.down.cancelled() => Err(Failure::Down { held: true }),
            done = self.compute(job) => done.map(|()| answer(job)),
        }
    }
}

impl SimEngine {
    async fn compute(&self, job: &Job) -> Result<(), Failure> {
        let SimBackend { world, process } = &self.backend;
        let Some((number, kind)) = world.kind(&job.id().0) else {
            world.violation(format!("a worker got {}, which nobody published", job.id()));
            return Err(Failure::Rejected("never published".to_owned()));
        };
        let starts = world.start_job(number);
        world.note(|| format!("{} computes {}, {kind:?}", process.name(), job.id()));
        let num_steps = match kind {
            Kind::Long => world.chance.between(1, u64::from(STEPS_PER_LEASE * 4)),
            _ => 0,
        };
        for _ in 0..num_steps {
            self.step(world.plan.lease / STEPS_PER_LEASE).await;
        }
        self.step(world.chance.millis(1, 800)).await;
        match kind {
            Kind::Quick | Kind::Long => Ok(()),
            Kind::KillsAtFirst(times) if starts > times => Ok(()),
            Kind::Refused => Err(Failure::Rejected("refused".to_owned())),
            Kind::CrashesEngine => {
                world.count(Fault::EngineKilledByJob);
                world.note(|| format!("{} takes the engine of {} down", job.id(), process.name()));
                world.poison(process, &job.id().0);
                self.down.cancel();
                Err(Failure::Down { held: true })
            }
            Kind::Kills | Kind::KillsAtFirst(_) => {
                world.count(Fault::KilledByJob);
                world.note(|| format!("{} takes {} down", job.id(), process.name()));
                world.poison(process, &job.id().0);
                process.dead().cancel();
                std::future::pending().await
            }
        }
    }

    /// One step, which takes so long, or for as long as the engine hangs.
    async fn step(&self, time: Duration) {
        let SimBackend { world, process } = &self.backend;
        sleep(time).await;
        let now = Instant::now();
        if let Some((from, until)) = self.hangs
            && (from..until).contains(&now)
            && !world.is_calm()
        {
            world.count(Fault::EngineHung);
            world.note(|| format!("the engine of {} hangs", process.name()));
            sleep_until(until).await;
        }
        world.gate(process).await;
        if self.dies_at.is_some_and(|at| at <= now) && !world.is_calm() && !self.down.is_cancelled()
        {
            world.strike_engine(process);
            self.down.cancel();
        }
        self.num_steps.fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts up until dropped.
struct Busy<'a>(&'a AtomicU64);

impl<'a> Busy<'a> {
    fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn answer(job: &Job) -> Answer {
    Answer {
        completed: Completed {
            answer: format!("answer to {}", job.id()),
            finish_reason: FinishReason::Stop,
            prompt_tokens: 1,
            completion_tokens: 1,
            prompt_sha256: String::new(),
            context_truncated: false,
            logprobs: None,
        },
        queue_time: Duration::ZERO,
        time_to_first_token: Duration::ZERO,
        generation_time: Duration::ZERO,
    }
}
