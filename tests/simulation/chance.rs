//! Chance, from a seed: every draw of a world comes from here, so that the seed is the world.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A source of draws.
pub(crate) struct Chance(Mutex<StdRng>);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Mutex::new(StdRng::seed_from_u64(seed)))
    }

    /// A number from `low` to `high`, both included.
    pub(crate) fn between(&self, low: u64, high: u64) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).random_range(low..=high)
    }

    /// True once in `times` draws.
    pub(crate) fn one_in(&self, times: u64) -> bool {
        self.between(1, times) == 1
    }

    /// A time from `low` to `high` milliseconds.
    pub(crate) fn millis(&self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.between(low, high))
    }

    /// An index into something of this length, which isn't 0.
    pub(crate) fn index(&self, len: usize) -> usize {
        self.between(0, len as u64 - 1) as usize
    }

    /// Brings what is in `list` into another order.
    pub(crate) fn shuffle<T>(&self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.index(last + 1));
        }
    }
}
