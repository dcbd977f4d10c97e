//! Keeping a delivery: renews its lease every third of it, and says when it is lost.
//!
//! While an engine is to answer, the renewal is bound to the engine's progress, so that a device
//! that hangs lets its jobs go. That holds for a job that is computed as for one that waits for a
//! slot, for its prompt to be rendered, or for its turn to be alone: as long as the engine works on
//! anything, its turn will come. An engine that has nothing to do does not hang. While an outcome
//! waits to be stored, the lease is renewed whatever the engine does.

use shared::{Delivery, Job, QueueError};
use tokio::time::{Duration, Instant, sleep_until};

use crate::backend::{Progress, Serving};

/// Renewals in the time of a lease.
pub(crate) const RENEWALS: u32 = 3;

/// Why a delivery has to be let go.
pub(crate) enum Lost {
    /// The queue says so.
    Queue(QueueError),
    /// The engine hangs: for a whole lease it has done nothing although it had work.
    Hung(Progress),
}

/// The lease of a delivery.
pub(crate) struct Lease<'a, D> {
    delivery: &'a D,
    renewed_at: Instant,
}

impl<'a, D: Delivery<Job>> Lease<'a, D> {
    /// Of a delivery just received.
    pub(crate) fn new(delivery: &'a D) -> Self {
        Self { delivery, renewed_at: Instant::now() }
    }

    /// Renews while `engine` makes progress; returns when the delivery is lost.
    pub(crate) async fn keep_while_working(&mut self, engine: &impl Serving) -> Lost {
        let mut seen = engine.progress();
        let mut looked_at = Instant::now();
        loop {
            looked_at = self.turn(looked_at).await;
            let now = engine.progress();
            let works = !now.is_busy || now.num_steps != seen.num_steps;
            seen = now;
            if works {
                if let Err(error) = self.renew().await {
                    return Lost::Queue(error);
                }
            } else if self.renewed_at.elapsed() >= self.delivery.lease() {
                return Lost::Hung(now);
            }
        }
    }

    /// Renews; returns only an error of the server. When the delivery is lost, it stops renewing: what
    /// was computed is worth storing even so.
    pub(crate) async fn keep(&mut self) -> QueueError {
        loop {
            self.turn(self.renewed_at).await;
            match self.renew().await {
                Ok(()) => {}
                Err(error @ QueueError::Server(_)) => return error,
                Err(_lost) => std::future::pending().await,
            }
        }
    }

    /// Waits for a third of the lease from `since`; when it woke. However late that is, it is one
    /// turn: a process that was stopped has missed the others.
    async fn turn(&self, since: Instant) -> Instant {
        sleep_until(since + self.period()).await;
        Instant::now()
    }

    fn period(&self) -> Duration {
        self.delivery.lease() / RENEWALS
    }

    async fn renew(&mut self) -> Result<(), QueueError> {
        self.delivery.keep_alive().await?;
        self.renewed_at = Instant::now();
        Ok(())
    }
}
