//! What a role says of itself, every few seconds, for `flotilla status`.
//!
//! Only words: nothing depends on their coming through, so a failure is a log line.

use std::collections::VecDeque;
use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// Between two of them.
pub(crate) const INTERVAL: Duration = Duration::from_secs(2);
/// Longest that one may take; the next has newer words.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);
/// Time over which a rate is taken.
const RATE_WINDOW: Duration = Duration::from_secs(30);

/// Says something with `say` now and every [`INTERVAL`], until `stop`, then a last time: once, or
/// `tries` times until it was heard.
pub(crate) async fn beat<E, F>(stop: CancellationToken, tries: u32, mut say: impl FnMut() -> F)
where
    F: Future<Output = Result<(), E>>,
    E: std::fmt::Display,
{
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut tries_left = tries;
    while tries_left > 0 {
        let stopped = tokio::select! {
            // The last words don't wait for their turn, but their repetitions do.
            () = stop.cancelled(), if tries_left == tries => true,
            _ = ticks.tick() => stop.is_cancelled(),
        };
        let was_heard = match tokio::time::timeout(TIMEOUT, say()).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::debug!(%error, "cannot tell the status");
                false
            }
            Err(_elapsed) => {
                tracing::debug!("cannot tell the status in time");
                false
            }
        };
        if stopped {
            tries_left = if was_heard { 0 } else { tries_left - 1 };
        }
    }
}

/// How fast a count grows, lately.
#[derive(Debug, Default)]
pub(crate) struct Rate(VecDeque<(Instant, u64)>);

impl Rate {
    /// The growth per second over the last half minute, `count` being the count of now.
    pub(crate) fn update(&mut self, count: u64) -> f64 {
        let now = Instant::now();
        // One from before the window stays, so that the window is always covered.
        while self.0.get(1).is_some_and(|(at, _)| now - *at > RATE_WINDOW) {
            self.0.pop_front();
        }
        self.0.push_back((now, count));
        let Some((since, before)) = self.0.front() else { return 0.0 };
        let seconds = (now - *since).as_secs_f64();
        if seconds > 0.0 { count.saturating_sub(*before) as f64 / seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn rate_is_that_of_the_last_half_minute() {
        let mut rate = Rate::default();
        assert_eq!(rate.update(0), 0.0);
        for second in 1..=100 {
            tokio::time::advance(Duration::from_secs(1)).await;
            let speed = rate.update(second * 10);
            assert!((speed - 10.0).abs() < 1e-6, "{speed}");
        }
        for _ in 0..40 {
            tokio::time::advance(Duration::from_secs(1)).await;
            rate.update(1_000);
        }
        assert_eq!(rate.update(1_000), 0.0);
    }
}
