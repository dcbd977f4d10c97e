//! What a worker says of itself to the fleet, and that it is gone at its end.

use std::sync::Arc;

use gpu_worker::Stats;
use shared::queue::nats::Fleet;
use shared::status::{WorkerStatus, unix_now};
use tokio_util::sync::CancellationToken;

use crate::fleet;
use crate::heartbeat::{self, Rate};

/// Who a worker is.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    /// Its name in the fleet.
    pub(super) name: String,
    host: String,
    device: String,
    started_at: f64,
}

impl Identity {
    /// The worker of this rank in this process.
    pub(super) fn new(rank: u32, device: String) -> Self {
        let name = format!("{}-{rank}", fleet::process_name());
        Self { name, host: fleet::host(), device, started_at: unix_now() }
    }
}

/// Heartbeats until `over`, then the worker's entry is removed.
pub(super) async fn say(
    identity: Identity,
    fleet: Fleet,
    stats: Arc<Stats>,
    over: CancellationToken,
) {
    let (mut answers, mut tokens) = (Rate::default(), Rate::default());
    let beating = heartbeat::beat(over, 1, || {
        let lease = fleet.lease().as_secs_f64();
        let status =
            WorkerStatus { lease, ..status(&identity, &stats, (&mut answers, &mut tokens)) };
        let fleet = fleet.clone();
        async move { fleet.put_worker(&status).await }
    });
    beating.await;
    let removing = fleet.remove_worker(&identity.name);
    match tokio::time::timeout(heartbeat::TIMEOUT, removing).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "cannot tell that the worker is gone"),
        Err(_elapsed) => tracing::debug!("cannot tell in time that the worker is gone"),
    }
}

fn status(
    identity: &Identity,
    stats: &Stats,
    (answers, tokens): (&mut Rate, &mut Rate),
) -> WorkerStatus {
    let now = stats.snapshot();
    WorkerStatus {
        id: identity.name.clone(),
        host: identity.host.clone(),
        device: identity.device.clone(),
        slots: u32::try_from(now.num_slots).unwrap_or(u32::MAX),
        running: u32::try_from(now.engine.num_running).unwrap_or(u32::MAX),
        answered: now.num_answered(),
        failed: now.num_failed(),
        generated_tokens: now.engine.generation_tokens,
        tokens_per_second: tokens.update(now.engine.generation_tokens),
        answers_per_second: answers.update(now.num_answered()),
        held: now.held,
        model: now.model,
        started_at: identity.started_at,
        seen_at: unix_now(),
        stats_interval: heartbeat::INTERVAL.as_secs_f64(),
        lease: 0.0,
    }
}
