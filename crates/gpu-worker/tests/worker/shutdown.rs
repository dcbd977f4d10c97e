//! The end of a worker: what it holds is finished, or goes back.

use std::sync::atomic::Ordering;
use std::time::Duration;

use shared::{Delivery, MemoryQueue, Queue};
use tokio::time::Instant;

use crate::script::{LEASE, QUICK, Queues, Script, Worker, config, query, until};

const GRACE: Duration = Duration::from_secs(30);

#[tokio::test(start_paused = true)]
async fn a_shutdown_finishes_what_it_can_and_gives_the_rest_back_at_once() {
    let (script, queues) = (Script::new(3), Queues::new());
    let ids = ["a", "b", "c", "d", "e"];
    queues.publish([("a", query::LONG), ("b", query::QUICK), ("c", query::HANG)]).await;
    queues.publish([("d", query::QUICK), ("e", query::QUICK)]).await;
    let worker = Worker::start(config(5, GRACE), &script, (&queues.jobs, &queues.outcomes));
    until("three run", || script.shared.num_answering.load(Ordering::Relaxed) == 3).await;
    let stopping = Instant::now();
    let stats = std::sync::Arc::clone(&worker.stats);
    worker.stop().await.unwrap();
    assert!((GRACE..GRACE + QUICK).contains(&stopping.elapsed()));
    let settled = queues.collect(1).await;
    assert_eq!((settled[0].context.id.0.as_str(), queues.outcomes.len()), ("b", 0));
    assert_eq!((stats.snapshot().given_back, stats.snapshot().num_held()), (2, 0));
    // What was not begun can be had now, what was given back after a short rest, long before its lease ends.
    let mut left = Vec::new();
    while left.len() < 4 {
        let pulled = queues.jobs.pull(10, LEASE / 10).await.unwrap();
        assert!(!pulled.is_empty(), "{} of 4 came back", left.len());
        left.extend(pulled.into_iter().map(|d| (d.message().id().0.clone(), d.attempt())));
    }
    left.sort();
    let left: Vec<(&str, u32)> = left.iter().map(|(id, n)| (id.as_str(), *n)).collect();
    assert_eq!(left, [(ids[0], 2), (ids[2], 2), (ids[3], 1), (ids[4], 1)]);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_without_a_limit_finishes_everything() {
    let (script, queues) = (Script::new(3), Queues::new());
    queues.publish([("a", query::LONG), ("b", query::QUICK)]).await;
    let worker = Worker::start(config(5, Duration::MAX), &script, (&queues.jobs, &queues.outcomes));
    until("both run", || script.shared.num_answering.load(Ordering::Relaxed) == 2).await;
    worker.stop().await.unwrap();
    assert_eq!(queues.collect(2).await.len(), 2);
    assert!(queues.jobs.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_does_not_wait_for_ever_for_room_for_outcomes() {
    let (script, queues) = (Script::new(3), Queues::new());
    let full = MemoryQueue::new(1, LEASE);
    queues.publish([("a", query::QUICK), ("b", query::QUICK)]).await;
    let worker = Worker::start(config(5, GRACE), &script, (&queues.jobs, &full));
    until("one is stored", || queues.jobs.len() == 1).await;
    worker.stop().await.unwrap();
    let again = queues.jobs.pull(1, LEASE / 10).await.unwrap().remove(0);
    assert_eq!((queues.jobs.len(), again.attempt()), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn an_idle_worker_stops_at_once() {
    let (script, queues) = (Script::new(3), Queues::new());
    let worker = Worker::start(config(5, GRACE), &script, (&queues.jobs, &queues.outcomes));
    until("it has started", || script.shared.num_starts.load(Ordering::Relaxed) == 1).await;
    let stopping = Instant::now();
    worker.stop().await.unwrap();
    assert!(stopping.elapsed() < QUICK);
}
