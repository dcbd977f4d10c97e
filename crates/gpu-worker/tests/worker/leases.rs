//! Whose job it is: leases that are kept, and leases that must be let go.

use std::sync::atomic::Ordering;
use std::time::Duration;

use flotilla_gpu_worker::Error;
use shared::{Delivery, Job, MemoryQueue, Outcome, Queue};

use crate::script::{LEASE, QUICK, Queues, Script, Worker, collect, config, query, until};

fn start(script: &Script, queues: &Queues) -> Worker {
    Worker::start(config(5, Duration::MAX), script, (&queues.jobs, &queues.outcomes))
}

/// The jobs that another worker gets within `wait`: those whose lease ran out.
async fn stolen(jobs: &MemoryQueue<Job>, wait: Duration) -> Vec<String> {
    let pulled = jobs.pull(100, wait).await.unwrap();
    pulled.iter().map(|delivery| delivery.message().id().0.clone()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_job_that_makes_progress_is_kept_for_many_leases() {
    let (script, queues) = (Script::new(4), Queues::new());
    queues.publish([("a", query::LONG)]).await;
    let worker = start(&script, &queues);
    let settled = queues.collect(1).await;
    assert_eq!(settled[0].attempts, 1);
    assert!(queues.jobs.is_empty());
    worker.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_job_that_waits_while_the_engine_has_nothing_to_do_is_kept() {
    let (script, queues) = (Script::new(4), Queues::new());
    queues.publish([("a", query::IDLE)]).await;
    let worker = start(&script, &queues);
    assert_eq!(queues.collect(1).await[0].attempts, 1);
    worker.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_job_that_waits_to_be_alone_is_kept_while_the_others_make_progress() {
    let (script, queues) = (Script::new(4), Queues::new());
    queues.publish([("suspect", query::QUICK)]).await;
    let retried = queues.jobs.pull(1, LEASE).await.unwrap().remove(0);
    retried.retry(QUICK).await.unwrap();
    queues.publish([("long", query::LONG)]).await;
    let config = config(2, Duration::MAX);
    let worker = Worker::start(config, &script, (&queues.jobs, &queues.outcomes));
    let settled = queues.collect(2).await;
    let attempts: Vec<u32> = settled.iter().map(|settled| settled.attempts).collect();
    assert_eq!(attempts, [1, 2]);
    assert!(settled[1].inference_time > 9.0 * LEASE.as_secs_f64(), "it waited for the long one");
    worker.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_hangs_lets_its_jobs_go_and_gets_no_others_until_it_goes_on() {
    let (script, queues) = (Script::new(4), Queues::new());
    queues.publish([("a", query::HANG), ("b", query::HANG)]).await;
    let worker = start(&script, &queues);
    until("both run", || script.shared.num_answering.load(Ordering::Relaxed) == 2).await;
    let mut others = stolen(&queues.jobs, LEASE * 2).await;
    if others.len() < 2 {
        others.extend(stolen(&queues.jobs, LEASE).await);
    }
    assert_eq!(others, ["a", "b"]);
    until("both are aborted", || script.shared.num_aborted.load(Ordering::Relaxed) == 2).await;
    assert_eq!(worker.stats.snapshot().leases_lost, 2);
    assert_eq!(worker.stats.snapshot().num_held(), 0);
    worker.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_hanging_engine_is_left_alone_and_then_given_up() {
    let (script, queues) = (Script::new(4), Queues::new());
    script.shared.stuck.store(true, Ordering::Relaxed);
    queues.publish([("a", query::HANG)]).await;
    let worker = start(&script, &queues);
    until("the lease is lost", || worker.stats.snapshot().leases_lost > 0).await;
    queues.publish([("b", query::QUICK), ("c", query::QUICK)]).await;
    // What was asked for before may still come, once.
    let ended = tokio::time::timeout(LEASE * 50, worker.task).await.unwrap().unwrap();
    assert!(matches!(ended, Err(Error::Hung)), "{ended:?}");
    let attempts = queues.jobs.pull(10, LEASE * 2).await.unwrap();
    assert_eq!(attempts.len(), 3);
    assert!(attempts.iter().all(|delivery| delivery.attempt() <= 3));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_goes_on_gets_jobs_again() {
    let (script, queues) = (Script::new(4), Queues::new());
    script.shared.stuck.store(true, Ordering::Relaxed);
    queues.publish([("a", query::HANG)]).await;
    let worker = start(&script, &queues);
    until("the lease is lost", || worker.stats.snapshot().leases_lost > 0).await;
    script.shared.released.store(true, Ordering::Relaxed);
    script.shared.stuck.store(false, Ordering::Relaxed);
    queues.publish([("b", query::QUICK)]).await;
    let settled = queues.collect(2).await;
    assert_eq!((settled[0].attempts, settled[1].attempts), (2, 1));
    worker.stop().await.unwrap();
}

/// As after SIGSTOP and SIGCONT.
#[tokio::test(start_paused = true)]
async fn a_job_lost_while_the_process_was_stopped_is_aborted() {
    let (script, queues) = (Script::new(4), Queues::new());
    queues.publish([("a", query::LONG)]).await;
    let worker = start(&script, &queues);
    until("it runs", || script.shared.num_answering.load(Ordering::Relaxed) == 1).await;
    // Time passes for all, but nobody gets to do anything in it.
    tokio::time::advance(LEASE * 3).await;
    let elsewhere = queues.jobs.pull(1, QUICK).await.unwrap().remove(0);
    assert_eq!(elsewhere.attempt(), 2);
    until("it is aborted", || script.shared.num_aborted.load(Ordering::Relaxed) == 1).await;
    elsewhere.ack().await.unwrap();
    assert_eq!(worker.stats.snapshot().leases_lost, 1);
    queues.publish([("b", query::QUICK)]).await;
    assert_eq!(queues.collect(1).await[0].context.id.0, "b");
    worker.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn while_outcomes_find_no_room_their_jobs_are_kept_and_no_others_taken() {
    let (script, queues) = (Script::new(3), Queues::new());
    let full = MemoryQueue::new(1, LEASE * 10_000);
    let ids: Vec<String> = (0..8).map(|number| number.to_string()).collect();
    queues.publish(ids.iter().map(|id| (id.as_str(), query::QUICK))).await;
    let config = config(5, Duration::MAX);
    let worker = Worker::start(config, &script, (&queues.jobs, &full));
    until("one is stored", || queues.jobs.len() == 7).await;
    let held_elsewhere = full.pull(1, LEASE).await.unwrap().remove(0);
    // Another worker takes what this one does not hold, and gets nothing of it, however long it takes.
    let elsewhere = queues.jobs.pull(100, QUICK).await.unwrap();
    assert_eq!(elsewhere.len(), 4);
    for _ in 0..20 {
        let again = queues.jobs.pull(8, LEASE / 2).await.unwrap();
        assert!(again.is_empty(), "{} leases ran out", again.len());
        assert_eq!(worker.stats.snapshot().num_held(), 3);
        for delivery in &elsewhere {
            delivery.keep_alive().await.unwrap();
        }
    }
    for delivery in elsewhere {
        delivery.retry(QUICK).await.unwrap();
    }
    held_elsewhere.ack().await.unwrap();
    let settled = collect(&full, 7).await;
    assert!(settled.iter().all(|settled| matches!(settled.outcome, Outcome::Completed(_))));
    let kept = settled.iter().filter(|settled| settled.attempts == 1).count();
    assert_eq!(kept, 3);
    worker.stop().await.unwrap();
}
