//! One job's way through a worker: answer, publish the outcome, settle.
//!
//! What a failure means for the job is decided here. Rejected: a `Failed` outcome and a dead letter.
//! Engine down, or no time left: back to the queue. A job is never acked before its outcome is stored.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shared::{
    Completed, Context, Delivery, Job, Outcome, Queue, QueueError, Settled, WIRE_VERSION,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::Config;
use crate::backend::{Counters, Failure, Serving};
use crate::lease::{Lease, Lost, RENEWALS};
use crate::quarantine::{Place, Quarantine, SPARE_DELIVERIES, Treatment};
use crate::stats::{FailureKind, Held, Source, Stats};

/// How long a job rests that a worker could not finish.
const RETRY_DELAY: Duration = Duration::from_millis(500);
/// How long giving jobs back may take, once there is no time left for them.
pub(crate) const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a job of a newer wire version rests at first, until a newer worker may take it. Twice as
/// long each time: being passed on counts as a delivery, and deliveries are not without limit.
const NEWER_VERSION_DELAY: Duration = Duration::from_secs(30);
/// Most doublings of it: about an hour.
const MAX_DOUBLINGS: u32 = 7;
/// Most of a query that goes into a failure for which the whole outcome was too large.
const MAX_FAILED_QUERY_BYTES: usize = 64 << 10;

/// What all jobs of one worker share while its engine lives.
pub(crate) struct Server<E, O> {
    pub(crate) config: Config,
    pub(crate) engine: E,
    pub(crate) outcomes: O,
    pub(crate) stats: Arc<Stats>,
    pub(crate) quarantine: Quarantine,
    /// Cancelled when there is no time left: what is not settled goes back.
    pub(crate) give_back: CancellationToken,
    /// The engine's step at which it was found to hang, until it makes another.
    pub(crate) hung_at: Mutex<Option<u64>>,
    pub(crate) broken: Broken,
}

/// Notes the first error after which the worker can't go on.
#[derive(Default)]
pub(crate) struct Broken {
    error: Mutex<Option<QueueError>>,
    pub(crate) token: CancellationToken,
}

impl Broken {
    pub(crate) fn set(&self, error: QueueError) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.token.cancel();
    }

    pub(crate) fn take(&self) -> Option<QueueError> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<E: Serving, O: Send + Sync> Source for Server<E, O> {
    fn counters(&self) -> Counters {
        self.engine.counters()
    }
}

/// Why a job has no answer and never will.
struct Rejection {
    kind: FailureKind,
    reason: String,
}

/// Why a job has no answer from this engine.
enum NoAnswer {
    Rejected(Rejection),
    EngineDown,
    /// The engine went down before it had the job.
    NeverInEngine,
}

/// What became of a delivery.
pub(crate) enum Served<D> {
    /// Its outcome is stored, and the job removed from the queue.
    Settled,
    /// It went back to the queue, or was lost.
    Unsettled,
    /// The engine went down before it had the job: the next one answers it. Going back would count as a
    /// delivery, and those that wait for their turn alone have few to spare.
    Kept(D),
}

/// A delivery that waits for an engine, and counts as held.
pub(crate) struct Keeping<D> {
    pub(crate) delivery: D,
    pub(crate) held: Held,
}

impl<E: Serving, O: Queue<Settled>> Server<E, O> {
    /// Takes one job to its end.
    pub(crate) async fn serve<D: Delivery<Job>>(
        &self,
        Keeping { delivery, held }: Keeping<D>,
        place: Place,
    ) -> Served<Keeping<D>> {
        match self.serve_inner(delivery, place).await {
            Ok(Served::Kept(delivery)) => Served::Kept(Keeping { delivery, held }),
            Ok(Served::Settled) => Served::Settled,
            Ok(Served::Unsettled) => Served::Unsettled,
            Err(error @ QueueError::Server(_)) => {
                self.broken.set(error);
                Served::Unsettled
            }
            // The job is somebody else's by now; if both finish, the collector keeps one.
            Err(error) => {
                self.stats.lost_lease();
                tracing::warn!(worker = self.config.name, %error, "cannot settle a job");
                Served::Unsettled
            }
        }
    }

    /// The job keeps its place until it is settled: what runs alone waits for that.
    async fn serve_inner<D: Delivery<Job>>(
        &self,
        delivery: D,
        mut place: Place,
    ) -> Result<Served<D>, QueueError> {
        let (started, attempt) = (Instant::now(), delivery.attempt());
        if let Place::Aside(Treatment::PassOn) = place {
            let doublings = attempt.saturating_sub(1).min(MAX_DOUBLINGS);
            return self.give_back(delivery, NEWER_VERSION_DELAY * (1 << doublings)).await;
        }
        let mut lease = Lease::new(&delivery);
        let answer = tokio::select! {
            biased;
            answer = self.answer(&delivery, &mut place) => answer,
            () = self.give_back.cancelled() => Err(NoAnswer::EngineDown),
            lost = lease.keep_while_working(&self.engine) => return self.lose(&delivery, lost),
        };
        let outcome = match answer {
            Ok(completed) => Ok(completed),
            Err(NoAnswer::Rejected(rejection)) => Err(rejection),
            Err(NoAnswer::EngineDown) => return self.give_back(delivery, RETRY_DELAY).await,
            Err(NoAnswer::NeverInEngine) => return Ok(Served::Kept(delivery)),
        };
        let publishing = self.publish(delivery.message(), (attempt, started), outcome);
        let published = tokio::select! {
            biased;
            published = publishing => Some(published?),
            () = self.give_back.cancelled() => None,
            error = lease.keep() => return Err(error),
        };
        match published {
            Some(None) => delivery.ack().await?,
            Some(Some(Rejection { kind, reason })) => {
                self.stats.failed(kind);
                tracing::debug!(job_id = %delivery.message().id(), reason, "job failed");
                delivery.reject(reason).await?;
            }
            None => return self.give_back(delivery, RETRY_DELAY).await,
        }
        self.stats.settled_after(started.elapsed());
        Ok(Served::Settled)
    }

    /// Answers one job when its turn has come.
    async fn answer<D: Delivery<Job>>(
        &self,
        delivery: &D,
        place: &mut Place,
    ) -> Result<Completed, NoAnswer> {
        let attempt = delivery.attempt();
        place.wait().await;
        if let Place::Aside(_) = place {
            let times = attempt.saturating_sub(1);
            let reason = format!(
                "given up unanswered: its worker was gone at the end of each of {times} deliveries, \
                 of the last {} with no other job in it",
                SPARE_DELIVERIES + 1
            );
            return Err(NoAnswer::Rejected(Rejection { kind: FailureKind::GivenUp, reason }));
        }
        match self.engine.answer(delivery.message()).await {
            Ok(answer) => {
                self.stats.answered(&answer);
                Ok(answer.completed)
            }
            Err(Failure::Rejected(reason)) => {
                Err(NoAnswer::Rejected(Rejection { kind: FailureKind::Refused, reason }))
            }
            Err(Failure::Down { held: true }) if place.is_alone() => {
                let reason = format!(
                    "the engine went down on it in delivery {attempt}, with no other job in it"
                );
                Err(NoAnswer::Rejected(Rejection { kind: FailureKind::TookEngineDown, reason }))
            }
            Err(Failure::Down { held: true }) => Err(NoAnswer::EngineDown),
            Err(Failure::Down { held: false }) => Err(NoAnswer::NeverInEngine),
        }
    }

    /// Stores the outcome; returns why the job failed, if it did. An outcome too large for the queue
    /// becomes a failure without the long texts.
    async fn publish(
        &self,
        job: &Job,
        (attempts, started): (u32, Instant),
        outcome: Result<Completed, Rejection>,
    ) -> Result<Option<Rejection>, QueueError> {
        let settled = |context, outcome| Settled {
            version: WIRE_VERSION,
            run: job.run.clone(),
            context,
            model: Some(self.engine.model_name().to_owned()),
            seed: job.seed(),
            worker_rank: self.config.rank,
            attempts,
            inference_time: started.elapsed().as_secs_f64(),
            outcome,
        };
        let (outcome, rejection) = match outcome {
            Ok(completed) => (Outcome::Completed(completed), None),
            Err(rejection) => (Outcome::Failed(rejection.reason.clone()), Some(rejection)),
        };
        let stored = self.outcomes.publish(settled(job.context.clone(), outcome)).await;
        let reason = match stored {
            Ok(_) => return Ok(rejection),
            Err(QueueError::TooLarge { bytes, limit, .. }) => {
                format!("its outcome has {bytes} bytes, the queue takes {limit} at most")
            }
            Err(error) => return Err(error),
        };
        let short = settled(without_long_texts(&job.context), Outcome::Failed(reason.clone()));
        match self.outcomes.publish(short).await {
            Err(QueueError::TooLarge { .. }) => {
                tracing::error!(job_id = %job.id(), run = job.run.0, reason, "a job has no line");
            }
            stored => drop(stored?),
        }
        Ok(Some(Rejection { kind: FailureKind::TooLarge, reason }))
    }

    async fn give_back<D: Delivery<Job>>(
        &self,
        delivery: D,
        delay: Duration,
    ) -> Result<Served<D>, QueueError> {
        self.stats.gave_back();
        delivery.retry(delay).await?;
        Ok(Served::Unsettled)
    }

    fn lose<D: Delivery<Job>>(&self, delivery: &D, lost: Lost) -> Result<Served<D>, QueueError> {
        let progress = match lost {
            Lost::Queue(error) => return Err(error),
            Lost::Hung(progress) => progress,
        };
        let mut hung_at = self.hung_at.lock().unwrap_or_else(PoisonError::into_inner);
        if hung_at.replace(progress.num_steps).is_none() {
            let attempt = delivery.attempt();
            tracing::error!(
                worker = self.config.name, job_id = %delivery.message().id(), attempt,
                "the engine hangs; its jobs go back, and it gets no others until it goes on"
            );
        }
        self.stats.lost_lease();
        Ok(Served::Unsettled)
    }
}

/// Keeps the leases of what waits for an engine for as long as it is polled.
pub(crate) async fn keep_all<D: Delivery<Job>>(kept: &[Keeping<D>]) -> Infallible {
    let lease = kept.iter().map(|keeping| keeping.delivery.lease()).min();
    let Some(lease) = lease else { return std::future::pending().await };
    loop {
        for Keeping { delivery, .. } in kept {
            // If it is lost somebody else has it; the collector keeps one of the answers.
            if let Err(error) = delivery.keep_alive().await {
                tracing::debug!(job_id = %delivery.message().id(), %error, "cannot keep a job");
            }
        }
        tokio::time::sleep(lease / RENEWALS).await;
    }
}

/// Gives back what no engine will have.
pub(crate) async fn give_all_back<D: Delivery<Job>>(kept: Vec<Keeping<D>>) {
    let giving = async {
        for Keeping { delivery, .. } in kept {
            if let Err(error) = delivery.retry(RETRY_DELAY).await {
                tracing::debug!(%error, "cannot give a job back");
            }
        }
    };
    // What is late comes again when its lease runs out.
    let _late = tokio::time::timeout(GIVE_BACK_TIMEOUT, giving).await;
}

/// The context of a failure that has to be small.
fn without_long_texts(context: &Context) -> Context {
    let query = &context.query[..context.query.floor_char_boundary(MAX_FAILED_QUERY_BYTES)];
    Context { context: String::new(), query: query.to_owned(), ..context.clone() }
}
