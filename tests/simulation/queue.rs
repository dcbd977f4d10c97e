//! The queues as a process sees them: a broker behind a network, which loses requests and answers,
//! refuses, restarts. Promises what `shared::queue` says and no more.

use std::pin::pin;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use shared::{Delivery, Job, Message, Outcome, Publishing, Queue, QueueError, Settled, Stored};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::plan::Broken;
use crate::process::Process;
use crate::stream::{Storing, Stream, Taken};
use crate::world::{Fault, World, lock};

/// How long an answer is waited for before the request is made again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a full queue is left alone.
const FULL_DELAY: Duration = Duration::from_millis(200);
/// A settlement is tried at least so long.
const MIN_SETTLE_TIME: Duration = Duration::from_secs(5);
/// Delay with which a delivery comes again whose pull was dropped.
const GIVE_BACK_DELAY: Duration = Duration::from_millis(10);
/// Longest way of a message, in milliseconds.
const LATENCY: u64 = 30;

/// A stream, and who waits for its messages.
pub(crate) struct Channel<T> {
    stream: Mutex<Stream<T>>,
    arrived: Notify,
}

impl<T> Channel<T> {
    pub(crate) fn new(stream: Stream<T>) -> Self {
        Self { stream: Mutex::new(stream), arrived: Notify::new() }
    }

    /// Tells those who wait that there is a message.
    pub(crate) fn has_arrived(&self) {
        self.arrived.notify_waiters();
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, Stream<T>> {
        lock(&self.stream)
    }
}

/// What the queues carry.
pub(crate) trait Carried: Message {
    /// The queue it goes through.
    fn channel(world: &World) -> &Channel<Self>;
    /// The job's id.
    fn job_id(&self) -> &str;
    /// If it tells that a job failed: after how many deliveries, and why.
    fn failure(&self) -> Option<(u32, &str)>;
    /// Whether deliveries of it are followed.
    const IS_JOB: bool;
}

impl Carried for Job {
    fn channel(world: &World) -> &Channel<Self> {
        &world.jobs
    }

    fn job_id(&self) -> &str {
        &self.id().0
    }

    fn failure(&self) -> Option<(u32, &str)> {
        None
    }

    const IS_JOB: bool = true;
}

impl Carried for Settled {
    fn channel(world: &World) -> &Channel<Self> {
        &world.outcomes
    }

    fn job_id(&self) -> &str {
        &self.context.id.0
    }

    fn failure(&self) -> Option<(u32, &str)> {
        match &self.outcome {
            Outcome::Failed(reason) => Some((self.attempts, reason)),
            Outcome::Completed(_) => None,
        }
    }

    const IS_JOB: bool = false;
}

/// A process' handle of a queue.
#[derive(Clone)]
pub(crate) struct SimQueue {
    pub(crate) world: World,
    pub(crate) process: Process,
}

impl SimQueue {
    /// Until when the broker can't be reached, as far as is known.
    fn cut_until(&self) -> Instant {
        self.world.outages().broker.max(self.process.is_cut_until())
    }

    async fn reached(&self) {
        self.world.gate(&self.process).await;
        loop {
            let until = self.cut_until();
            if until <= Instant::now() {
                break;
            }
            sleep_until(until).await;
        }
        self.world.pass(LATENCY).await;
        self.world.gate(&self.process).await;
    }

    /// Whether a message of this kind is lost on its way.
    fn is_lost(&self, fault: Fault) -> bool {
        let lost = self.cut_until() > Instant::now() || self.world.strikes(60);
        if lost {
            self.world.count(fault);
        }
        lost
    }

    fn check(&self) -> Result<(), QueueError> {
        if !self.world.strikes(1_000) {
            return Ok(());
        }
        self.world.count(Fault::BrokerRefused);
        self.world.note(|| format!("the broker refuses to serve {}", self.process.name()));
        Err(QueueError::Server("the simulated broker refuses".into()))
    }

    /// Publishes until it is confirmed; `false` if the queue is full and that isn't waited out.
    async fn store<T: Carried>(&self, message: &T, waits: bool) -> Result<bool, QueueError> {
        let world = &self.world;
        let channel = T::channel(world);
        // As with the real queue: a job published again is the same, each outcome is another.
        let id = if T::IS_JOB { message.message_id() } else { world.fresh_id() };
        loop {
            self.reached().await;
            self.check()?;
            if self.is_lost(Fault::RequestLost) {
                sleep(ANSWER_TIMEOUT).await;
                continue;
            }
            let stored = channel.state().store(Instant::now(), id.clone(), message);
            let sequence = match stored {
                Storing::Held(sequence) => sequence,
                Storing::Full if waits => {
                    sleep(FULL_DELAY).await;
                    continue;
                }
                Storing::Full => return Ok(false),
            };
            channel.arrived.notify_waiters();
            world.note(|| {
                let (name, id) = (self.process.name(), message.job_id());
                format!("{name} stores {} of {id} as {sequence}", kind::<T>())
            });
            // The broker syncs, and tells it then.
            world.pass(LATENCY).await;
            if !channel.state().confirm(sequence) || self.is_lost(Fault::AnswerLost) {
                sleep(ANSWER_TIMEOUT).await;
                continue;
            }
            world.gate(&self.process).await;
            return Ok(true);
        }
    }

    /// What a broken queue does: tells that it is stored before it is.
    fn store_later<T: Carried>(&self, message: T) {
        let queue = self.clone();
        tokio::spawn(async move {
            sleep(Duration::from_millis(500)).await;
            if !queue.process.dead().is_cancelled() {
                let _never = queue.store(&message, true).await;
            }
        });
    }
}

fn kind<T: Carried>() -> &'static str {
    if T::IS_JOB { "the job" } else { "the outcome" }
}

impl<T: Carried> Queue<T> for SimQueue {
    type Delivery = SimDelivery<T>;

    async fn publish(&self, message: T) -> Result<Stored, QueueError> {
        if let Some(failure) = message.failure() {
            self.world.failed(&self.process, message.job_id(), failure);
        }
        if !T::IS_JOB && self.world.plan.broken == Broken::OutcomesConfirmEarly {
            self.store_later(message);
            return Ok(Stored::New);
        }
        self.store(&message, true).await.map(|_| Stored::New)
    }

    async fn try_publish(&self, message: T) -> Result<Publishing, QueueError> {
        let stored = self.store(&message, false).await?;
        Ok(if stored { Publishing::Stored } else { Publishing::Full })
    }

    async fn pull(&self, max: usize, wait: Duration) -> Result<Vec<Self::Delivery>, QueueError> {
        let deadline = Instant::now() + wait;
        let (world, channel) = (&self.world, T::channel(&self.world));
        loop {
            world.gate(&self.process).await;
            self.check()?;
            let now = Instant::now();
            let cut_until = self.cut_until();
            if cut_until > now {
                sleep_until(cut_until.min(deadline)).await;
                if cut_until >= deadline {
                    return Ok(Vec::new());
                }
                continue;
            }
            let mut arrived = pin!(channel.arrived.notified());
            arrived.as_mut().enable();
            let taken = channel.state().take(now, max, &world.chance);
            let due = match taken {
                Ok(taken) => {
                    let parcel = Parcel::new(self, taken);
                    if self.is_lost(Fault::DeliveryLost) {
                        parcel.lose();
                        continue;
                    }
                    world.gate(&self.process).await;
                    return Ok(parcel.open());
                }
                Err(due) => due,
            };
            if now >= deadline {
                return Ok(Vec::new());
            }
            let wake_at = due.map_or(deadline, |due| due.min(deadline));
            let _either = timeout_at(wake_at, arrived).await;
            world.pass(LATENCY).await;
        }
    }
}

/// What a pull brings, until it is taken over.
struct Parcel<T: Carried>(Vec<SimDelivery<T>>);

impl<T: Carried> Parcel<T> {
    fn new(queue: &SimQueue, taken: Vec<Taken<T>>) -> Self {
        Self(taken.into_iter().map(|taken| SimDelivery::new(queue, taken)).collect())
    }

    fn open(mut self) -> Vec<SimDelivery<T>> {
        std::mem::take(&mut self.0)
    }

    /// It never comes: its leases run.
    fn lose(mut self) {
        self.0.clear();
    }
}

impl<T: Carried> Drop for Parcel<T> {
    /// A pull that is dropped strands none, unless its process is dead.
    fn drop(&mut self) {
        for delivery in self.0.drain(..) {
            if !delivery.queue.process.dead().is_cancelled() {
                let due = Instant::now() + GIVE_BACK_DELAY;
                T::channel(&delivery.queue.world).state().delay(delivery.sequence, due);
            }
        }
    }
}

/// A message received and not settled.
pub(crate) struct SimDelivery<T: Carried> {
    queue: SimQueue,
    sequence: u64,
    attempt: u32,
    message: T,
    /// When the lease began, as far as this side knows.
    alive_at: Mutex<Instant>,
}

impl<T: Carried> SimDelivery<T> {
    fn new(queue: &SimQueue, taken: Taken<T>) -> Self {
        let Taken { sequence, attempt, message } = taken;
        queue.world.note(|| {
            let (name, id) = (queue.process.name(), message.job_id());
            format!("{name} is sent {} of {id}, {sequence}, delivery {attempt}", kind::<T>())
        });
        if T::IS_JOB {
            queue.process.hold(sequence, message.job_id());
        }
        let alive_at = Mutex::new(Instant::now());
        Self { queue: queue.clone(), sequence, attempt, message, alive_at }
    }

    fn expired(&self) -> QueueError {
        QueueError::LeaseExpired(self.message.message_id())
    }

    /// Tells the broker what becomes of it, until that is confirmed or the lease is over.
    async fn settle(
        &self,
        what: &str,
        change: impl Fn(&mut Stream<T>, Instant) + Send + Sync,
    ) -> Result<(), QueueError> {
        let queue = &self.queue;
        let settling = async {
            loop {
                queue.reached().await;
                if !queue.is_lost(Fault::RequestLost) {
                    change(&mut T::channel(&queue.world).state(), Instant::now());
                    T::channel(&queue.world).arrived.notify_waiters();
                    queue.world.note(|| {
                        let (name, id) = (queue.process.name(), self.message.job_id());
                        format!("{name} {what} {} of {id}, {}", kind::<T>(), self.sequence)
                    });
                    queue.world.pass(LATENCY).await;
                    if !queue.is_lost(Fault::AnswerLost) {
                        queue.world.gate(&queue.process).await;
                        return;
                    }
                }
                sleep(ANSWER_TIMEOUT).await;
            }
        };
        let limit = self.lease().max(MIN_SETTLE_TIME);
        timeout(limit, settling).await.map_err(|_late| self.expired())
    }
}

impl<T: Carried> Drop for SimDelivery<T> {
    fn drop(&mut self) {
        if T::IS_JOB {
            self.queue.process.let_go(self.sequence);
        }
    }
}

impl<T: Carried> Delivery<T> for SimDelivery<T> {
    fn message(&self) -> &T {
        &self.message
    }

    fn attempt(&self) -> u32 {
        self.attempt
    }

    fn lease(&self) -> Duration {
        self.queue.world.plan.lease
    }

    /// As with JetStream it isn't confirmed, and that it can't be sent shows after a lease.
    async fn keep_alive(&self) -> Result<(), QueueError> {
        let (queue, now) = (&self.queue, Instant::now());
        queue.world.gate(&queue.process).await;
        if queue.cut_until() > now {
            let alive_at = *lock(&self.alive_at);
            return if now >= alive_at + self.lease() { Err(self.expired()) } else { Ok(()) };
        }
        *lock(&self.alive_at) = now;
        if !queue.is_lost(Fault::RequestLost) {
            T::channel(&queue.world).state().keep(now, self.sequence);
        }
        Ok(())
    }

    async fn ack(self) -> Result<(), QueueError> {
        let sequence = self.sequence;
        self.settle("acks", |stream, now| stream.remove(now, sequence)).await
    }

    async fn retry(self, delay: Duration) -> Result<(), QueueError> {
        let sequence = self.sequence;
        self.settle("gives back", |stream, now| stream.delay(sequence, now + delay)).await
    }

    async fn reject(self, reason: String) -> Result<(), QueueError> {
        let (world, id) = (&self.queue.world, self.message.job_id());
        if !T::IS_JOB {
            world.violation(format!("the outcome of {id} is rejected: {reason}"));
        }
        world.note(|| format!("{id} is rejected in delivery {}: {reason}", self.attempt));
        self.queue.reached().await;
        world.dead_letter(id);
        let sequence = self.sequence;
        self.settle("rejects", |stream, now| stream.remove(now, sequence)).await
    }
}
