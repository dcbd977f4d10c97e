//! Looks now and then for messages that the queue holds and nobody is given any more.

use std::time::Duration;

use shared::queue::nats::Fleet;
use tokio::time::MissedTickBehavior;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(15);

/// Looks for ever.
pub(super) async fn recall(fleet: &Fleet) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match fleet.redeliver_forgotten().await {
            Ok(0) => {}
            Ok(count) => tracing::warn!(
                count,
                "the NATS server held messages that it had forgotten; they are delivered again"
            ),
            Err(error) => tracing::debug!(%error, "cannot look for forgotten messages"),
        }
    }
}
