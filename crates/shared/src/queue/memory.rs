//! The queue of a run in one process: nothing is durable, everything else is as in the real one.
//!
//! Time is tokio's, so that tests can pause it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::{Delivery, Message, Publishing, Queue, QueueError, Stored};

/// Dead letters kept for inspection; the oldest go first. Few, since a message may be megabytes.
const MAX_DEAD_LETTERS: usize = 16;

/// A message that was rejected.
#[derive(Clone, Debug)]
pub struct DeadLetter<T> {
    /// The message.
    pub message: T,
    /// Why it can never work.
    pub reason: String,
    /// Deliveries it took.
    pub attempts: u32,
}

/// A bounded queue in this process's memory.
pub struct MemoryQueue<T> {
    inner: Arc<Inner<T>>,
}

impl<T> Clone for MemoryQueue<T> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

struct Inner<T> {
    capacity: usize,
    lease: Duration,
    state: Mutex<State<T>>,
    /// Pullers wait here for a message.
    arrived: Notify,
    /// Publishers wait here for room.
    settled: Notify,
}

struct Entry<T> {
    message: T,
    message_id: String,
    attempts: u32,
}

struct State<T> {
    ready: VecDeque<Entry<T>>,
    /// Waiting out a retry's delay, by when it ends; the number keeps equal times apart.
    delayed: BTreeMap<(Instant, u64), Entry<T>>,
    /// Delivered and not settled: when the lease ends, and the message to deliver again.
    leased: HashMap<u64, (Instant, Entry<T>)>,
    /// Ids of everything held.
    ids: HashSet<String>,
    dead: VecDeque<DeadLetter<T>>,
    next_number: u64,
}

impl<T: Message> MemoryQueue<T> {
    /// A queue that holds at most `capacity` messages, delivered ones included, and gives a
    /// delivery back after `lease` without a sign of life.
    pub fn new(capacity: usize, lease: Duration) -> Self {
        let state = State {
            ready: VecDeque::new(),
            delayed: BTreeMap::new(),
            leased: HashMap::new(),
            ids: HashSet::new(),
            dead: VecDeque::new(),
            next_number: 0,
        };
        Self {
            inner: Arc::new(Inner {
                capacity: capacity.max(1),
                lease,
                state: Mutex::new(state),
                arrived: Notify::new(),
                settled: Notify::new(),
            }),
        }
    }

    /// The newest rejected messages, oldest first.
    pub fn dead_letters(&self) -> Vec<DeadLetter<T>> {
        self.inner.lock().dead.iter().cloned().collect()
    }

    /// Messages held: waiting, delayed and delivered.
    pub fn len(&self) -> usize {
        self.inner.lock().ids.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Inner<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No code panics while it holds the lock, and every change is complete when it lets go.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a delivery's entry back, if its lease still holds.
    fn settle(&self, number: u64) -> Option<Entry<T>> {
        self.lock().leased.remove(&number).map(|(_, entry)| entry)
    }

    /// Forgets a message for good and makes room for a publisher.
    fn forget(&self, message_id: &str) {
        self.lock().ids.remove(message_id);
        self.settled.notify_one();
    }
}

impl<T> State<T> {
    /// Moves what is due, delays over and leases run out, to the ready messages.
    fn reclaim(&mut self, now: Instant) {
        while let Some(first) = self.delayed.first_entry() {
            if first.key().0 > now {
                break;
            }
            let entry = first.remove();
            self.ready.push_back(entry);
        }
        let mut expired: Vec<u64> = self
            .leased
            .iter()
            .filter(|(_, (deadline, _))| *deadline <= now)
            .map(|(&number, _)| number)
            .collect();
        expired.sort_unstable();
        // The oldest delivery ends up in front of the others, and all of them before new messages.
        for number in expired.into_iter().rev() {
            if let Some((_, entry)) = self.leased.remove(&number) {
                self.ready.push_front(entry);
            }
        }
    }

    /// When `reclaim` will next have something to do.
    fn next_due(&self) -> Option<Instant> {
        let delayed = self.delayed.keys().next().map(|&(due, _)| due);
        let leased = self.leased.values().map(|&(deadline, _)| deadline).min();
        delayed.into_iter().chain(leased).min()
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }
}

impl<T: Message> Queue<T> for MemoryQueue<T> {
    type Delivery = MemoryDelivery<T>;

    async fn publish(&self, message: T) -> Result<Stored, QueueError> {
        loop {
            let mut room = pin!(self.inner.settled.notified());
            // Registered before the look, so that room made in between isn't missed.
            room.as_mut().enable();
            if let Some(stored) = self.store(&message) {
                return Ok(stored);
            }
            room.await;
        }
    }

    async fn try_publish(&self, message: T) -> Result<Publishing, QueueError> {
        Ok(self.store(&message).map_or(Publishing::Full, |_| Publishing::Stored))
    }

    async fn pull(&self, max: usize, wait: Duration) -> Result<Vec<Self::Delivery>, QueueError> {
        let deadline = Instant::now() + wait;
        loop {
            let mut arrived = pin!(self.inner.arrived.notified());
            arrived.as_mut().enable();
            let now = Instant::now();
            let wake_at = {
                let mut state = self.inner.lock();
                state.reclaim(now);
                let count = max.min(state.ready.len());
                if count > 0 {
                    let entries: Vec<_> = state.ready.drain(..count).collect();
                    return Ok(entries.into_iter().map(|e| self.deliver(&mut state, e)).collect());
                }
                state.next_due().map_or(deadline, |due| due.min(deadline))
            };
            if now >= deadline {
                return Ok(Vec::new());
            }
            // Whether a message came or a lease may have run out, the next turn looks.
            let _either = tokio::time::timeout_at(wake_at, arrived).await;
        }
    }
}

impl<T: Message> MemoryQueue<T> {
    /// Stores a copy of `message`, unless it is held already; `None` if there is no room.
    fn store(&self, message: &T) -> Option<Stored> {
        let message_id = message.message_id();
        {
            let mut state = self.inner.lock();
            if state.ids.contains(&message_id) {
                return Some(Stored::Repeated);
            }
            if state.ids.len() >= self.inner.capacity {
                return None;
            }
            state.ids.insert(message_id.clone());
            let message = message.clone();
            state.ready.push_back(Entry { message, message_id, attempts: 0 });
        }
        self.inner.arrived.notify_waiters();
        Some(Stored::New)
    }

    fn deliver(&self, state: &mut State<T>, mut entry: Entry<T>) -> MemoryDelivery<T> {
        entry.attempts += 1;
        let number = state.number();
        let delivery = MemoryDelivery {
            queue: Arc::clone(&self.inner),
            number,
            message: entry.message.clone(),
            attempt: entry.attempts,
        };
        state.leased.insert(number, (Instant::now() + self.inner.lease, entry));
        delivery
    }
}

/// A message from a [`MemoryQueue`].
pub struct MemoryDelivery<T> {
    queue: Arc<Inner<T>>,
    number: u64,
    message: T,
    attempt: u32,
}

impl<T: Message> MemoryDelivery<T> {
    fn expired(&self) -> QueueError {
        QueueError::LeaseExpired(self.message.message_id())
    }
}

impl<T: Message> Delivery<T> for MemoryDelivery<T> {
    fn message(&self) -> &T {
        &self.message
    }

    fn attempt(&self) -> u32 {
        self.attempt
    }

    fn lease(&self) -> Duration {
        self.queue.lease
    }

    async fn keep_alive(&self) -> Result<(), QueueError> {
        let mut state = self.queue.lock();
        let (deadline, _) = state.leased.get_mut(&self.number).ok_or_else(|| self.expired())?;
        *deadline = Instant::now() + self.queue.lease;
        Ok(())
    }

    async fn ack(self) -> Result<(), QueueError> {
        let entry = self.queue.settle(self.number).ok_or_else(|| self.expired())?;
        self.queue.forget(&entry.message_id);
        Ok(())
    }

    async fn retry(self, delay: Duration) -> Result<(), QueueError> {
        let entry = self.queue.settle(self.number).ok_or_else(|| self.expired())?;
        {
            let mut state = self.queue.lock();
            let number = state.number();
            state.delayed.insert((Instant::now() + delay, number), entry);
        }
        // Pullers sleep until the earliest moment they knew of: this one may be earlier.
        self.queue.arrived.notify_waiters();
        Ok(())
    }

    async fn reject(self, reason: String) -> Result<(), QueueError> {
        let entry = self.queue.settle(self.number).ok_or_else(|| self.expired())?;
        {
            let mut state = self.queue.lock();
            if state.dead.len() == MAX_DEAD_LETTERS {
                state.dead.pop_front();
            }
            state.dead.push_back(DeadLetter {
                message: entry.message,
                reason,
                attempts: entry.attempts,
            });
        }
        self.queue.forget(&entry.message_id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{self, Harness};
    use super::*;
    use crate::message::Job;

    const LEASE: Duration = Duration::from_secs(60);

    struct Memory;

    impl Harness for Memory {
        type Queue = MemoryQueue<Job>;

        async fn queue(&self, capacity: usize) -> Self::Queue {
            MemoryQueue::new(capacity, LEASE)
        }

        async fn dead_letters(&self, queue: &Self::Queue) -> Vec<(Job, String, u32)> {
            queue.dead_letters().into_iter().map(|d| (d.message, d.reason, d.attempts)).collect()
        }
    }

    /// With time paused, a lease of a minute passes at once when everybody waits for it.
    #[tokio::test(start_paused = true)]
    async fn memory_queue_passes_the_conformance_suite() {
        conformance::run_all(&Memory).await;
    }

    #[tokio::test(start_paused = true)]
    async fn dead_letters_are_bounded() {
        let queue = MemoryQueue::new(1, LEASE);
        for number in 0..MAX_DEAD_LETTERS + 5 {
            queue.publish(conformance::job(&format!("{number}"))).await.unwrap();
            let mut pulled = queue.pull(1, LEASE).await.unwrap();
            pulled.remove(0).reject("bad".into()).await.unwrap();
        }
        let dead = queue.dead_letters();
        assert_eq!(dead.len(), MAX_DEAD_LETTERS);
        assert_eq!(dead[0].message.id().0, "5");
        assert!(queue.is_empty());
    }
}
