//! Which deliveries run alone, so that a job that takes its worker down is found and harms nobody else.
//!
//! All that is known of a job's past is how often it was delivered. An engine that goes down, in a process that
//! lives on, is told from its neighbours by running it alone at delivery `max_attempts` ([`Treatment::Alone`]):
//! if the engine goes down again, it was this job. A job that takes the whole process down leaves no witness,
//! and every job that its worker holds is delivered once more as well. Hence:
//!
//! - From delivery `max_attempts` on a job runs alone: its worker first settles everything else that it
//!   holds, and takes nothing until the job is settled. Innocents that were often near a guilty one get
//!   their answer there, and the guilty one takes nobody along any more.
//! - The worker asks the queue for a single job first, and for as many as it has room for only if that one
//!   is a first delivery (see `pull`): queues deliver again before they deliver anew, so jobs that come again come
//!   one by one. So hardly ever are two such jobs held at a time.
//! - A job that waits for its turn alone while a neighbour takes the engine down was never in that engine: it is kept
//!   for the next one. Going back would cost it a delivery, and it has few left. A neighbour that takes the process down
//!   does cost it one: so several such neighbours, one after another, can use up those of an innocent one.
//! - Deliveries also end without guilt: a machine goes away, is stopped for a while, or is asked to end; the
//!   server starts again. Therefore a job is given up without being run only [`SPARE_DELIVERIES`] later
//!   ([`Treatment::GiveUp`]): when its worker was gone at the end of that many deliveries with nothing else in it.
//!
//! With 5 attempts a job that kills its worker's process is delivered 4 times among others, 4 times alone, and
//! given up at delivery 9.

use std::sync::Arc;

use shared::{Delivery, Job, WIRE_VERSION};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

/// Deliveries alone, beyond the first, before a job is given up.
pub(crate) const SPARE_DELIVERIES: u32 = 3;

/// What happens with a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// Answered, among others.
    Together,
    /// Answered, with nothing else in this worker.
    Alone,
    /// Failed without being run.
    GiveUp,
    /// Left to a newer worker.
    PassOn,
}

impl Treatment {
    pub(crate) fn of<D: Delivery<Job>>(delivery: &D, max_attempts: u32) -> Self {
        let attempt = delivery.attempt();
        if delivery.message().version > WIRE_VERSION {
            Self::PassOn
        } else if attempt > max_attempts.saturating_add(SPARE_DELIVERIES) {
            Self::GiveUp
        } else if attempt >= max_attempts {
            Self::Alone
        } else {
            Self::Together
        }
    }
}

/// Lets jobs run together, or one alone.
#[derive(Clone, Default)]
pub(crate) struct Quarantine(Arc<RwLock<()>>);

/// A job's place among those that this worker holds.
pub(crate) enum Place {
    /// Among others. Holds off those that run alone until it is dropped.
    Together(#[expect(dead_code, reason = "held, never read")] OwnedRwLockReadGuard<()>),
    /// Has to wait until it is alone.
    Queued(Quarantine),
    /// Alone until it is dropped.
    Alone(#[expect(dead_code, reason = "held, never read")] OwnedRwLockWriteGuard<()>),
    /// Does not run.
    Aside(Treatment),
}

impl Quarantine {
    /// The place of a delivery that was just received.
    ///
    /// Those that run together take theirs in the pulling loop, before any task of the same pull
    /// starts. So one that runs alone can't begin while another of its pull has yet to.
    pub(crate) async fn place(&self, treatment: Treatment) -> Place {
        match treatment {
            Treatment::Together => Place::Together(Arc::clone(&self.0).read_owned().await),
            Treatment::Alone => Place::Queued(self.clone()),
            Treatment::GiveUp | Treatment::PassOn => Place::Aside(treatment),
        }
    }
}

impl Place {
    /// Waits for its turn.
    pub(crate) async fn wait(&mut self) {
        if let Self::Queued(quarantine) = self {
            *self = Self::Alone(Arc::clone(&quarantine.0).write_owned().await);
        }
    }

    /// Whether nothing else is held by this worker.
    pub(crate) fn is_alone(&self) -> bool {
        matches!(self, Self::Alone(_))
    }
}
