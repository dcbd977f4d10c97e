//! A broker's stream as plain data: what it holds, what it has delivered, what it forgets when the
//! power fails. Who may reach it, and what is lost on the way, is `queue.rs`.
//!
//! As JetStream does: late acks count, whoever sends them; redeliveries come before new messages; a
//! message published again is recognised for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::chance::Chance;

/// For how long a settlement may be forgotten: the consumer's state is synced now and then.
const UNSYNCED: Duration = Duration::from_secs(3);

/// What became of a publish.
pub(crate) enum Storing {
    /// It is held under this number, or was held already.
    Held(u64),
    /// There is no room.
    Full,
}

/// A message on its way to a consumer.
pub(crate) struct Taken<T> {
    pub(crate) sequence: u64,
    pub(crate) attempt: u32,
    pub(crate) message: T,
}

#[derive(Clone)]
struct Stored<T> {
    message: T,
    id: String,
    attempts: u32,
    /// Not before: the end of a lease or a delay.
    due: Option<Instant>,
    /// Synced, and so confirmed to its publisher. What isn't may be gone after a power failure.
    confirmed: bool,
}

pub(crate) struct Stream<T> {
    capacity: usize,
    lease: Duration,
    duplicate_window: Duration,
    reorders: bool,
    messages: BTreeMap<u64, Stored<T>>,
    /// Ids published lately.
    recent: BTreeMap<String, (Instant, u64)>,
    /// Settled lately.
    removed: Vec<(Instant, u64, Stored<T>)>,
    /// Gone in a power failure, their publisher not told.
    vanished: BTreeSet<u64>,
    next_sequence: u64,
}

impl<T: Clone> Stream<T> {
    pub(crate) fn new(
        capacity: usize,
        lease: Duration,
        duplicate_window: Duration,
        reorders: bool,
    ) -> Self {
        Self {
            capacity,
            lease,
            duplicate_window,
            reorders,
            messages: BTreeMap::new(),
            recent: BTreeMap::new(),
            removed: Vec::new(),
            vanished: BTreeSet::new(),
            next_sequence: 1,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.messages.len()
    }

    pub(crate) fn store(&mut self, now: Instant, id: String, message: &T) -> Storing {
        if let Some((at, sequence)) = self.recent.get(&id)
            && now < *at + self.duplicate_window
        {
            return Storing::Held(*sequence);
        }
        if self.messages.len() >= self.capacity {
            return Storing::Full;
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.recent.insert(id.clone(), (now, sequence));
        let message = message.clone();
        let stored = Stored { message, id, attempts: 0, due: None, confirmed: false };
        self.messages.insert(sequence, stored);
        Storing::Held(sequence)
    }

    /// Syncs a message that was stored; whether it was still there to be synced.
    pub(crate) fn confirm(&mut self, sequence: u64) -> bool {
        if let Some(stored) = self.messages.get_mut(&sequence) {
            stored.confirmed = true;
        }
        !self.vanished.contains(&sequence)
    }

    /// Delivers up to `max` messages; or tells when there may be one.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        max: usize,
        chance: &Chance,
    ) -> Result<Vec<Taken<T>>, Option<Instant>> {
        let is_due = |stored: &Stored<T>| stored.due.is_none_or(|due| due <= now);
        let due = self.messages.iter().filter(|(_, stored)| is_due(stored));
        let (mut again, mut new): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
        for (&sequence, stored) in due {
            if stored.attempts > 0 { again.push(sequence) } else { new.push(sequence) }
        }
        if again.is_empty() && new.is_empty() {
            return Err(self.messages.values().filter_map(|stored| stored.due).min());
        }
        if self.reorders {
            chance.shuffle(&mut again);
            chance.shuffle(&mut new);
        }
        again.append(&mut new);
        // A pull may bring less than there is.
        again.truncate(chance.between(1, max as u64) as usize);
        let lease_end = now + self.lease;
        let mut taken = Vec::with_capacity(again.len());
        for sequence in again {
            if let Some(stored) = self.messages.get_mut(&sequence) {
                stored.attempts += 1;
                stored.due = Some(lease_end);
                let (attempt, message) = (stored.attempts, stored.message.clone());
                taken.push(Taken { sequence, attempt, message });
            }
        }
        Ok(taken)
    }

    /// Starts a lease anew.
    pub(crate) fn keep(&mut self, now: Instant, sequence: u64) {
        if let Some(stored) = self.messages.get_mut(&sequence) {
            stored.due = Some(now + self.lease);
        }
    }

    /// Delivers it again from `due` on.
    pub(crate) fn delay(&mut self, sequence: u64, due: Instant) {
        if let Some(stored) = self.messages.get_mut(&sequence) {
            stored.due = Some(due);
        }
    }

    pub(crate) fn remove(&mut self, now: Instant, sequence: u64) {
        if let Some(stored) = self.messages.remove(&sequence) {
            self.removed.retain(|(at, ..)| *at + UNSYNCED > now);
            self.removed.push((now, sequence, stored));
        }
    }

    /// The power fails: of what isn't synced, some is gone. Gives the messages whose number of
    /// deliveries was forgotten.
    pub(crate) fn lose_power(&mut self, now: Instant, chance: &Chance) -> Vec<u64> {
        for (at, sequence, stored) in std::mem::take(&mut self.removed) {
            if at + UNSYNCED > now && chance.one_in(2) {
                self.messages.insert(sequence, Stored { due: None, ..stored });
            }
        }
        let unconfirmed = self.messages.iter().filter(|(_, stored)| !stored.confirmed);
        let unconfirmed: Vec<u64> = unconfirmed.map(|(&sequence, _)| sequence).collect();
        for sequence in unconfirmed {
            if chance.one_in(2) {
                self.messages.remove(&sequence);
                self.vanished.insert(sequence);
            }
        }
        let mut forgotten = Vec::new();
        for (&sequence, stored) in &mut self.messages {
            if stored.attempts > 0 && chance.one_in(3) {
                stored.attempts -= 1;
                stored.due = None;
                forgotten.push(sequence);
            }
        }
        // What it recognises after a start is what it holds.
        self.recent.clear();
        for (&sequence, stored) in &self.messages {
            self.recent.insert(stored.id.clone(), (now, sequence));
        }
        forgotten
    }
}
