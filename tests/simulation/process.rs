//! A process of the simulated fleet: it can die, be stopped for a while, lose its connections.
//!
//! A role runs as a future with tasks of its own. All that it does outside itself goes through
//! [`World::gate`](crate::world::World::gate), before and after: there it dies, or waits until it may go on. A
//! process that is dead never comes back from there, and its future is dropped with all its tasks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Producer,
    Worker,
    Collector,
}

#[derive(Clone)]
pub(crate) struct Process(Arc<State>);

struct State {
    name: String,
    role: Role,
    dead: CancellationToken,
    shutdown: CancellationToken,
    fate: Mutex<Fate>,
}

struct Fate {
    /// It dies at this many more steps.
    steps_left: Option<u64>,
    stopped_until: Instant,
    cut_until: Instant,
    /// Jobs it has received and not settled: their number in the stream, and the id.
    held: Vec<(u64, String)>,
    /// Whether it has the output open.
    has_disk: bool,
}

impl Process {
    pub(crate) fn new(
        name: String,
        role: Role,
        shutdown: CancellationToken,
        steps_left: Option<u64>,
    ) -> Self {
        let now = Instant::now();
        let fate = Fate {
            steps_left,
            stopped_until: now,
            cut_until: now,
            held: Vec::new(),
            has_disk: false,
        };
        let dead = CancellationToken::new();
        Self(Arc::new(State { name, role, dead, shutdown, fate: Mutex::new(fate) }))
    }

    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    pub(crate) fn role(&self) -> Role {
        self.0.role
    }

    /// Whether both are the same process.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Cancelled when it is dead.
    pub(crate) fn dead(&self) -> &CancellationToken {
        &self.0.dead
    }

    /// Cancelled when it is asked to end.
    pub(crate) fn shutdown(&self) -> &CancellationToken {
        &self.0.shutdown
    }

    /// Takes a step; whether it was its last one.
    pub(crate) fn step_is_last(&self) -> bool {
        let mut fate = self.fate();
        let Some(left) = &mut fate.steps_left else { return false };
        *left = left.saturating_sub(1);
        *left == 0
    }

    pub(crate) fn stop_until(&self, until: Instant) {
        self.fate().stopped_until = until;
    }

    pub(crate) fn stopped_until(&self) -> Instant {
        self.fate().stopped_until
    }

    pub(crate) fn cut_until(&self, until: Instant) {
        self.fate().cut_until = until;
    }

    pub(crate) fn is_cut_until(&self) -> Instant {
        self.fate().cut_until
    }

    /// Nothing happens to it any more.
    pub(crate) fn heal(&self, now: Instant) {
        let mut fate = self.fate();
        fate.steps_left = None;
        fate.stopped_until = now;
        fate.cut_until = now;
    }

    pub(crate) fn hold(&self, sequence: u64, id: &str) {
        self.fate().held.push((sequence, id.to_owned()));
    }

    pub(crate) fn let_go(&self, sequence: u64) {
        let held = &mut self.fate().held;
        if let Some(at) = held.iter().position(|(one, _)| *one == sequence) {
            held.swap_remove(at);
        }
    }

    /// The jobs it holds, each once.
    pub(crate) fn held(&self) -> Vec<(u64, String)> {
        let mut held = self.fate().held.clone();
        held.sort_unstable();
        held.dedup();
        held
    }

    pub(crate) fn set_has_disk(&self, has_disk: bool) {
        self.fate().has_disk = has_disk;
    }

    pub(crate) fn has_disk(&self) -> bool {
        self.fate().has_disk
    }

    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.0.fate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
