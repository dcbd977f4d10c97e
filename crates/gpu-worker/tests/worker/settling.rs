//! What becomes of a job: its outcome is stored first, whatever happens then.

use std::sync::atomic::Ordering;
use std::time::Duration;

use flotilla_gpu_worker::{Error, FailureKind};
use shared::{Delivery, Job, MemoryQueue, Outcome, Queue, QueueError, RunId};

use crate::faulty::{FaultyQueue, LIMIT};
use crate::script::{LEASE, QUICK, Queues, Script, Worker, config, job, query, until};

async fn ids_and_attempts(jobs: &MemoryQueue<Job>, count: usize) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    while found.len() < count {
        let pulled = jobs.pull(count, LEASE * 2).await.unwrap();
        assert!(!pulled.is_empty(), "{} of {count} came back", found.len());
        found.extend(pulled.into_iter().map(|d| (d.message().id().0.clone(), d.attempt())));
    }
    found.sort();
    found
}

#[tokio::test(start_paused = true)]
async fn a_job_is_not_done_before_its_outcome_is_stored() {
    let (script, queues) = (Script::new(3), Queues::new());
    let full = MemoryQueue::new(1, LEASE);
    queues.publish([("a", query::QUICK), ("b", query::QUICK)]).await;
    let worker = Worker::start(config(5, Duration::MAX), &script, (&queues.jobs, &full));
    until("both are answered", || worker.stats.snapshot().num_answered() == 2).await;
    tokio::time::sleep(LEASE).await;
    assert_eq!(queues.jobs.len(), 1, "one outcome is stored, so one job is done");
    // The worker dies: the other job comes again.
    worker.task.abort();
    assert_eq!(ids_and_attempts(&queues.jobs, 1).await[0].1, 2);
}

#[tokio::test(start_paused = true)]
async fn a_failed_job_has_its_outcome_and_becomes_a_dead_letter() {
    let (script, queues) = (Script::new(3), Queues::new());
    queues.publish([("bad", query::REFUSE), ("good", query::QUICK)]).await;
    let worker = Worker::start(config(5, Duration::MAX), &script, (&queues.jobs, &queues.outcomes));
    let settled = queues.collect(2).await;
    assert_eq!(settled[0].outcome, Outcome::Failed("refused".into()));
    assert!(matches!(settled[1].outcome, Outcome::Completed(_)));
    let stats = std::sync::Arc::clone(&worker.stats);
    worker.stop().await.unwrap();
    let dead = queues.jobs.dead_letters();
    assert_eq!((dead.len(), dead[0].reason.as_str()), (1, "refused"));
    assert_eq!(stats.snapshot().failed[&FailureKind::Refused], 1);
    assert_eq!(stats.snapshot().num_answered(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_failed_job_is_not_rejected_before_its_outcome_is_stored() {
    let (script, queues) = (Script::new(3), Queues::new());
    let full = MemoryQueue::new(1, LEASE);
    full.publish(other_outcome()).await.unwrap();
    queues.publish([("bad", query::REFUSE)]).await;
    let worker = Worker::start(config(5, Duration::MAX), &script, (&queues.jobs, &full));
    until("it is held", || worker.stats.snapshot().num_held() == 1).await;
    tokio::time::sleep(LEASE * 3).await;
    assert!(queues.jobs.dead_letters().is_empty());
    full.pull(1, LEASE).await.unwrap().remove(0).ack().await.unwrap();
    until("it is a dead letter", || queues.jobs.dead_letters().len() == 1).await;
    worker.stop().await.unwrap();
}

fn other_outcome() -> shared::Settled {
    let job = job("other", query::QUICK);
    shared::Settled {
        version: job.version,
        run: job.run,
        context: job.context,
        model: None,
        seed: 0,
        worker_rank: 0,
        attempts: 1,
        inference_time: 0.0,
        outcome: Outcome::Failed("other".into()),
    }
}

#[tokio::test(start_paused = true)]
async fn an_outcome_too_large_for_the_queue_becomes_a_small_failure() {
    let (script, queues) = (Script::new(3), Queues::new());
    let mut large = job("large", query::QUICK);
    large.context.context = "x".repeat(LIMIT);
    queues.jobs.publish(large).await.unwrap();
    let outcomes = FaultyQueue::new(&queues.outcomes);
    let worker = Worker::start(config(5, Duration::MAX), &script, (&queues.jobs, &outcomes));
    let settled = queues.collect(1).await;
    let Outcome::Failed(reason) = &settled[0].outcome else { panic!("expected a failure") };
    assert!(reason.contains("the queue takes 1000 at most"), "{reason}");
    assert_eq!(settled[0].context.context, "");
    until("it is settled", || queues.jobs.is_empty()).await;
    assert_eq!(queues.jobs.dead_letters().len(), 1);
    assert_eq!(worker.stats.snapshot().failed[&FailureKind::TooLarge], 1);
    worker.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_broken_outcome_queue_stops_the_worker_and_its_jobs_go_back() {
    let (script, queues) = (Script::new(3), Queues::new());
    let outcomes = FaultyQueue::new(&queues.outcomes);
    outcomes.break_down();
    queues.publish([("a", query::QUICK), ("b", query::LONG)]).await;
    let worker = Worker::start(config(5, Duration::MAX), &script, (&queues.jobs, &outcomes));
    let ended = worker.task.await.unwrap();
    assert!(matches!(ended, Err(Error::Queue(QueueError::Server(_)))), "{ended:?}");
    let back = ids_and_attempts(&queues.jobs, 2).await;
    assert_eq!(back, [("a".to_owned(), 2), ("b".to_owned(), 2)]);
}

#[tokio::test(start_paused = true)]
async fn a_broken_job_queue_stops_the_worker_and_its_jobs_go_back() {
    let (script, queues) = (Script::new(3), Queues::new());
    let jobs = FaultyQueue::new(&queues.jobs);
    queues.publish([("a", query::LONG)]).await;
    let worker = Worker::start(config(5, Duration::MAX), &script, (&jobs, &queues.outcomes));
    until("it runs", || script.shared.num_answering.load(Ordering::Relaxed) == 1).await;
    jobs.break_down();
    let ended = worker.task.await.unwrap();
    assert!(matches!(ended, Err(Error::Queue(QueueError::Server(_)))), "{ended:?}");
    let again = queues.jobs.pull(1, LEASE / 10).await.unwrap();
    assert_eq!(again[0].attempt(), 2);
}

#[tokio::test(start_paused = true)]
async fn jobs_held_are_counted_by_run_until_they_are_settled() {
    let (script, queues) = (Script::new(8), Queues::new());
    for (id, run) in [("a", "one"), ("b", "one"), ("c", "two")] {
        let run = RunId(run.into());
        queues.jobs.publish(Job { run, ..job(id, query::QUICK) }).await.unwrap();
    }
    let worker = Worker::start(config(5, Duration::MAX), &script, (&queues.jobs, &queues.outcomes));
    until("all run", || script.shared.num_answering.load(Ordering::Relaxed) == 3).await;
    let snapshot = worker.stats.snapshot();
    let held: Vec<(&str, u64)> =
        snapshot.held.iter().map(|(run, count)| (run.0.as_str(), *count)).collect();
    assert_eq!(held, [("one", 2), ("two", 1)]);
    assert_eq!((snapshot.engine.num_running, snapshot.num_waiting()), (3, 0));
    queues.collect(3).await;
    until("none is held", || worker.stats.snapshot().held.is_empty()).await;
    let snapshot = worker.stats.snapshot();
    assert_eq!((snapshot.redeliveries, snapshot.num_answered()), (0, 3));
    assert!(snapshot.e2e_request_latency.sum > 2.9 * QUICK.as_secs_f64());
    worker.stop().await.unwrap();
}
