//! Durations counted in fixed buckets, as Prometheus wants them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets, in seconds: from a decoding step to an answer of an hour.
const BOUNDS: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0,
    100.0, 250.0, 500.0, 1000.0, 3600.0,
];

/// How often durations of which length were seen.
#[derive(Default)]
pub(crate) struct Histogram {
    /// Of each bucket, without those below it.
    counts: [AtomicU64; BOUNDS.len()],
    /// Above all buckets.
    num_above: AtomicU64,
    sum_nanos: AtomicU64,
}

/// A histogram at a moment.
#[derive(Clone, Debug, PartialEq)]
pub struct HistogramSnapshot {
    /// Upper bound in seconds, and how many were at most that.
    pub buckets: Vec<(f64, u64)>,
    /// How many there were.
    pub count: u64,
    /// Seconds of all together.
    pub sum: f64,
}

impl Histogram {
    /// Counts a duration that occurred `times` times.
    pub(crate) fn observe(&self, duration: Duration, times: u64) {
        let seconds = duration.as_secs_f64();
        let bucket = BOUNDS.partition_point(|bound| *bound < seconds);
        let count = self.counts.get(bucket).unwrap_or(&self.num_above);
        count.fetch_add(times, Ordering::Relaxed);
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).saturating_mul(times);
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> HistogramSnapshot {
        let mut count = 0;
        let cumulative = BOUNDS.iter().zip(&self.counts).map(|(bound, counter)| {
            count += counter.load(Ordering::Relaxed);
            (*bound, count)
        });
        let buckets = cumulative.collect();
        HistogramSnapshot {
            buckets,
            count: count + self.num_above.load(Ordering::Relaxed),
            sum: self.sum_nanos.load(Ordering::Relaxed) as f64 / 1e9,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_count_what_is_at_most_their_bound() {
        let histogram = Histogram::default();
        histogram.observe(Duration::from_millis(1), 1);
        histogram.observe(Duration::from_millis(2), 3);
        histogram.observe(Duration::from_secs(10_000), 1);
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.buckets[..3], [(0.001, 1), (0.0025, 4), (0.005, 4)]);
        assert_eq!(snapshot.buckets.last(), Some(&(3600.0, 4)));
        assert_eq!(snapshot.count, 5);
        assert!((snapshot.sum - 10_000.007).abs() < 1e-9);
    }
}
