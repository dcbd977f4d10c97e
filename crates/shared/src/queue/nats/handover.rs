//! From the task that pulls to whoever waits for it, who may stop waiting at any moment.
//!
//! A request for messages can't be taken back: what the server sends after the client has unsubscribed is
//! lost to everybody until the lease runs out. So a pull that is dropped goes on by itself, and the
//! next one takes it over. What comes while nobody waits is kept a moment, then given back.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::delivery::NatsDelivery;
use super::queue::Inner;
use crate::queue::{Delivery, Message, QueueError};

/// How long what came for a dropped pull waits for the next one, before it goes back.
const KEEP: Duration = Duration::from_millis(300);
/// Delay with which it goes back.
const GIVE_BACK_DELAY: Duration = Duration::from_millis(10);

/// What is on its way to a queue's next pulls.
pub(super) struct Pending<T: Message> {
    /// Deliveries that nobody waited for, with the number of their coming.
    leftovers: Mutex<VecDeque<(u64, NatsDelivery<T>)>>,
    /// Pulls that go on though nobody waits.
    open: Mutex<Vec<Arc<Slot<T>>>>,
}

impl<T: Message> Default for Pending<T> {
    fn default() -> Self {
        Self { leftovers: Mutex::new(VecDeque::new()), open: Mutex::new(Vec::new()) }
    }
}

fn lock<V>(mutex: &Mutex<V>) -> MutexGuard<'_, V> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: Message> Pending<T> {
    /// Up to `max` deliveries that nobody waited for.
    pub(super) fn take_leftovers(&self, max: usize) -> Vec<NatsDelivery<T>> {
        let mut leftovers = lock(&self.leftovers);
        let count = max.min(leftovers.len());
        leftovers.drain(..count).map(|(_, delivery)| delivery).collect()
    }
}

/// What a pull brought. What is still in it when it is dropped is left to the next pulls.
pub(super) struct Parcel<T: Message> {
    queue: Arc<Inner<T>>,
    deliveries: Vec<NatsDelivery<T>>,
}

impl<T: Message> Parcel<T> {
    pub(super) fn new(queue: &Arc<Inner<T>>, deliveries: Vec<NatsDelivery<T>>) -> Self {
        Self { queue: Arc::clone(queue), deliveries }
    }

    /// Takes up to `max` over.
    pub(super) fn take(mut self, max: usize) -> Vec<NatsDelivery<T>> {
        let count = max.min(self.deliveries.len());
        self.deliveries.drain(..count).collect()
    }
}

impl<T: Message> Drop for Parcel<T> {
    fn drop(&mut self) {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        if self.deliveries.is_empty() {
            return;
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let deliveries = std::mem::take(&mut self.deliveries).into_iter();
        lock(&self.queue.pending.leftovers).extend(deliveries.map(|delivery| (number, delivery)));
        // Without a runtime the leases run out, as if this process had died.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(give_back(Arc::clone(&self.queue), number));
        }
    }
}

/// Gives back what no pull has taken in time.
async fn give_back<T: Message>(queue: Arc<Inner<T>>, number: u64) {
    tokio::time::sleep(KEEP.min(queue.lease() / 4)).await;
    let mut old = Vec::new();
    {
        let mut leftovers = lock(&queue.pending.leftovers);
        for (came, delivery) in std::mem::take(&mut *leftovers) {
            if came == number { old.push(delivery) } else { leftovers.push_back((came, delivery)) }
        }
    }
    for delivery in old {
        if let Err(error) = delivery.retry(GIVE_BACK_DELAY).await {
            tracing::debug!(%error, "a delivery that nobody took could not be given back");
        }
    }
}

/// Where a pull puts what it brought. Written by the task that pulls, read by whoever waits for it.
pub(super) struct Slot<T: Message> {
    state: Mutex<SlotState<T>>,
    /// Told once, when the pull is over.
    over: Notify,
}

struct SlotState<T: Message> {
    is_watched: bool,
    is_over: bool,
    result: Option<Result<Parcel<T>, QueueError>>,
}

impl<T: Message> Slot<T> {
    /// Whether somebody waits for the pull.
    pub(super) fn is_watched(&self) -> bool {
        lock(&self.state).is_watched
    }

    fn finish(&self, result: Result<Parcel<T>, QueueError>) {
        let mut state = lock(&self.state);
        state.is_over = true;
        if state.is_watched {
            state.result = Some(result);
            self.over.notify_one();
        } else {
            drop(state);
            // Outside the lock: a parcel that is dropped sees to its deliveries.
            drop(result);
        }
    }
}

/// The pulling task's side of a slot. The pull is over when it is dropped, whatever happened.
pub(super) struct Giving<T: Message> {
    queue: Arc<Inner<T>>,
    pub(super) slot: Arc<Slot<T>>,
}

impl<T: Message> Giving<T> {
    pub(super) fn give(&self, deliveries: Result<Vec<NatsDelivery<T>>, QueueError>) {
        self.slot.finish(deliveries.map(|deliveries| Parcel::new(&self.queue, deliveries)));
    }
}

impl<T: Message> Drop for Giving<T> {
    fn drop(&mut self) {
        if !lock(&self.slot.state).is_over {
            self.slot.finish(Ok(Parcel::new(&self.queue, Vec::new())));
        }
    }
}

/// The waiting side of a slot. Dropped before the pull is over, it leaves it to the next one.
pub(super) struct Watching<T: Message> {
    queue: Arc<Inner<T>>,
    slot: Arc<Slot<T>>,
}

impl<T: Message> Watching<T> {
    /// The two sides of a new pull.
    pub(super) fn new(queue: &Arc<Inner<T>>) -> (Self, Giving<T>) {
        let state = SlotState { is_watched: true, is_over: false, result: None };
        let slot = Arc::new(Slot { state: Mutex::new(state), over: Notify::new() });
        let giving = Giving { queue: Arc::clone(queue), slot: Arc::clone(&slot) };
        (Self { queue: Arc::clone(queue), slot }, giving)
    }

    /// A pull that goes on though nobody waits for it.
    pub(super) fn adopt(queue: &Arc<Inner<T>>) -> Option<Self> {
        loop {
            let slot = lock(&queue.pending.open).pop()?;
            let mut state = lock(&slot.state);
            if !state.is_over {
                state.is_watched = true;
                drop(state);
                return Some(Self { queue: Arc::clone(queue), slot });
            }
        }
    }

    /// What the pull brought; `None` if it isn't over by `deadline`.
    pub(super) async fn result(self, deadline: Instant) -> Option<Result<Parcel<T>, QueueError>> {
        let over = self.slot.over.notified();
        tokio::time::timeout_at(deadline, over).await.ok()?;
        lock(&self.slot.state).result.take()
    }
}

impl<T: Message> Drop for Watching<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.slot.state);
        state.is_watched = false;
        let (unseen, is_over) = (state.result.take(), state.is_over);
        drop(state);
        drop(unseen);
        if !is_over {
            let mut open = lock(&self.queue.pending.open);
            open.retain(|slot| !lock(&slot.state).is_over);
            open.push(Arc::clone(&self.slot));
        }
    }
}
