//! What goes wrong when, made from a seed alone: the same seed is the same plan. Not what it hits:
//! a plan names its targets by numbers, and the fleet knows who is there at the time.

use std::fmt;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// kill -9 of a worker; another one joins.
    WorkerKilled,
    /// SIGSTOP of a worker, mostly beyond its lease, then SIGCONT.
    WorkerStopped,
    /// SIGTERM of a worker, which has to end in good order; another one joins.
    WorkerLeft,
    /// One more worker, for the rest of the round.
    WorkerJoined,
    /// kill -9 of one of the two collectors; another one starts.
    CollectorKilled,
    /// SIGSTOP of one of the two collectors, then SIGCONT.
    CollectorStopped,
    /// kill -9 of the producer that follows a file; it is run again.
    ProducerKilled,
    /// kill -9 of the producer that listens; it is run again.
    ListenerKilled,
    /// The file that the producer follows is renamed, and another one takes its name.
    FileRotated,
    /// A job that aborts every worker's process that begins it: once in a round.
    JobPoisonous,
    /// kill -9 of nats-server; it comes back with its store.
    NatsKilled,
    /// SIGSTOP of nats-server, then SIGCONT.
    NatsStopped,
    /// nats-server can write nothing more, as on a full disk, for a while.
    NatsFull,
    /// kill -9 of redis-server; it comes back with its data.
    RedisKilled,
    /// FLUSHALL.
    RedisFlushed,
    /// redis-server goes back to an older copy of its data.
    RedisRestored,
    /// SIGSTOP of redis-server, then SIGCONT.
    RedisStopped,
    /// redis-server can write nothing more, as on a full disk, for a while.
    RedisFull,
    /// A link is cut without a reset; what was sent arrives once it is mended.
    LinkHeld,
    /// What a server answers is lost; then the connections are reset.
    RepliesLost,
    /// The connections of a link are reset.
    LinkReset,
    /// The connections of a link are reset, and new ones too for a while.
    LinkRefused,
    /// A link is slow.
    LinkSlow,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 23] = [
        Self::WorkerKilled,
        Self::WorkerStopped,
        Self::WorkerLeft,
        Self::WorkerJoined,
        Self::CollectorKilled,
        Self::CollectorStopped,
        Self::ProducerKilled,
        Self::ListenerKilled,
        Self::FileRotated,
        Self::JobPoisonous,
        Self::NatsKilled,
        Self::NatsStopped,
        Self::NatsFull,
        Self::RedisKilled,
        Self::RedisFlushed,
        Self::RedisRestored,
        Self::RedisStopped,
        Self::RedisFull,
        Self::LinkHeld,
        Self::RepliesLost,
        Self::LinkReset,
        Self::LinkRefused,
        Self::LinkSlow,
    ];

    /// How often it is dealt where the others are dealt once.
    fn weight(self) -> usize {
        match self {
            Self::WorkerKilled | Self::CollectorKilled | Self::NatsKilled => 2,
            _ => 1,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WorkerKilled => "worker killed",
            Self::WorkerStopped => "worker stopped for a while",
            Self::WorkerLeft => "worker told to end",
            Self::WorkerJoined => "worker joined",
            Self::CollectorKilled => "collector killed",
            Self::CollectorStopped => "collector stopped for a while",
            Self::ProducerKilled => "producer killed and run again",
            Self::ListenerKilled => "listening producer killed and run again",
            Self::FileRotated => "followed file rotated",
            Self::JobPoisonous => "job that aborts its worker",
            Self::NatsKilled => "nats-server killed",
            Self::NatsStopped => "nats-server stopped for a while",
            Self::NatsFull => "nats-server's disk full",
            Self::RedisKilled => "redis-server killed",
            Self::RedisFlushed => "redis-server flushed",
            Self::RedisRestored => "redis-server restored from an older copy",
            Self::RedisStopped => "redis-server stopped for a while",
            Self::RedisFull => "redis-server's disk full",
            Self::LinkHeld => "link cut without a reset",
            Self::RepliesLost => "replies of a server lost",
            Self::LinkReset => "link reset",
            Self::LinkRefused => "link refused",
            Self::LinkSlow => "link slow",
        })
    }
}

/// One fault of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// When it begins, from the start of the round.
    pub at: Duration,
    /// What it is.
    pub kind: Kind,
    /// How long it lasts, if it lasts.
    pub time: Duration,
    /// Whom it hits, counted round those that are there.
    pub target: usize,
}

/// The faults of a round of `time`, one every `interval` on the average.
///
/// The kinds are dealt like cards from a shuffled deck, so that a short round has most of them.
pub fn plan(seed: u64, time: Duration, interval: Duration) -> Vec<Fault> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut deck: Vec<Kind> = Vec::new();
    let mut faults = Vec::new();
    let mut at = interval;
    while at < time {
        if deck.is_empty() {
            let cards = Kind::ALL.iter().flat_map(|kind| std::iter::repeat_n(*kind, kind.weight()));
            deck.extend(cards);
            deck.shuffle(&mut random);
        }
        let Some(kind) = deck.pop() else { break };
        // Mostly short, now and then far beyond a lease.
        let seconds = if random.random_bool(0.25) {
            random.random_range(2.0..5.0)
        } else {
            random.random_range(0.05..1.5)
        };
        let target = random.random_range(0..1_000_000);
        faults.push(Fault { at, kind, time: Duration::from_secs_f64(seconds), target });
        at += interval.mul_f64(random.random_range(0.1..1.9));
    }
    faults
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn seed_makes_the_plan() {
        let (time, interval) = (Duration::from_secs(30), Duration::from_secs(1));
        assert_eq!(plan(7, time, interval), plan(7, time, interval));
        assert_ne!(plan(7, time, interval), plan(8, time, interval));
    }

    #[test]
    fn every_kind_comes_in_a_round_of_one_deck() {
        let faults = plan(1, Duration::from_secs(100), Duration::from_secs(1));
        let kinds: BTreeSet<Kind> = faults.iter().map(|fault| fault.kind).collect();
        assert_eq!(kinds.len(), Kind::ALL.len());
        assert!(faults.iter().all(|fault| fault.at < Duration::from_secs(100)));
    }
}
