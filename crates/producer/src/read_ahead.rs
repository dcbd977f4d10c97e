//! Reads the input on a thread of its own, ahead of the queue but never by much.
//!
//! Two things bound it: a number of entries, and the bytes of everything that is read and not yet
//! confirmed by the queue. Whoever takes an entry holds its bytes until the queue has it.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use shared::Context;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::BadInput;

/// Entries read ahead of the queue.
const READ_AHEAD: usize = 64;
/// Bytes read and not yet confirmed.
const MAX_BYTES: usize = 64 << 20;
/// What an entry takes beside its texts.
const ENTRY_BYTES: usize = 256;

/// An entry of the input, and its share of the memory.
pub(crate) struct Entry {
    pub(crate) item: Result<Context, BadInput>,
    pub(crate) held: Held,
}

/// Starts reading. The thread ends with the input, or once the receiver is gone.
pub(crate) fn read_ahead(
    contexts: impl Iterator<Item = Result<Context, BadInput>> + Send + 'static,
    budget: &Arc<Budget>,
) -> (mpsc::Receiver<Entry>, JoinHandle<()>) {
    let (sender, inbox) = mpsc::channel(READ_AHEAD);
    let budget = Arc::clone(budget);
    let reader = tokio::task::spawn_blocking(move || {
        for item in contexts {
            let held = budget.take(weight(&item));
            if sender.blocking_send(Entry { item, held }).is_err() {
                break;
            }
        }
    });
    (inbox, reader)
}

fn weight(item: &Result<Context, BadInput>) -> usize {
    let texts = match item {
        Ok(context) => {
            let documents = context.documents.iter().map(|document| document.path.len() + 32);
            context.query.len() + context.context.len() + documents.sum::<usize>()
        }
        Err(bad) => bad.query.as_ref().map_or(0, String::len) + bad.reason.len(),
    };
    texts + ENTRY_BYTES
}

/// How many bytes may be between the input and the queue. Takers wait; what they hold is given
/// back when it is dropped.
pub(crate) struct Budget {
    limit: usize,
    used: Mutex<usize>,
    freed: Condvar,
}

impl Default for Budget {
    fn default() -> Self {
        Self { limit: MAX_BYTES, used: Mutex::new(0), freed: Condvar::new() }
    }
}

impl Budget {
    /// Waits for room. An entry above the limit passes alone, so that it passes at all.
    fn take(self: &Arc<Self>, bytes: usize) -> Held {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |used: &mut usize| *used > 0 && *used + bytes > self.limit;
        let mut used = self.freed.wait_while(used, full).unwrap_or_else(PoisonError::into_inner);
        *used += bytes;
        Held { budget: Arc::clone(self), bytes }
    }
}

/// A share of the budget.
pub(crate) struct Held {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut used = self.budget.used.lock().unwrap_or_else(PoisonError::into_inner);
        *used -= self.bytes;
        self.budget.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_the_budget_waits_until_enough_is_given_back() {
        let budget = Arc::new(Budget { limit: 100, ..Budget::default() });
        let large = budget.take(1000);
        let (tell, told) = std::sync::mpsc::channel();
        let taker = std::thread::spawn({
            let budget = Arc::clone(&budget);
            move || {
                tell.send("waits").unwrap();
                let held = [budget.take(60), budget.take(40)];
                tell.send("has both").unwrap();
                drop(held);
            }
        });
        assert_eq!(told.recv(), Ok("waits"));
        assert!(told.try_recv().is_err(), "took what was not there");
        drop(large);
        assert_eq!(told.recv(), Ok("has both"));
        taker.join().unwrap();
        assert_eq!(*budget.used.lock().unwrap(), 0);
    }
}
