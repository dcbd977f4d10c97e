//! How much is taken from the queue, and when.

use std::sync::atomic::Ordering;
use std::time::Duration;

use flotilla_gpu_worker::Noop;
use shared::queue::conformance;
use shared::{Outcome, Queue};

use crate::script::{LEASE, QUICK, Queues, Script, Worker, config, query, until};

#[tokio::test(start_paused = true)]
async fn a_free_slot_is_filled_while_the_others_are_taken() {
    let (script, queues) = (Script::new(2), Queues::new());
    queues.publish([("long", query::LONG)]).await;
    let ids: Vec<String> = (0..20).map(|number| number.to_string()).collect();
    queues.publish(ids.iter().map(|id| (id.as_str(), query::QUICK))).await;
    let worker = Worker::start(config(5, Duration::MAX), &script, (&queues.jobs, &queues.outcomes));
    let quick = tokio::time::timeout(QUICK * 25, queues.collect(20)).await.unwrap();
    assert!(quick.iter().all(|settled| settled.context.id.0 != "long"));
    assert_eq!(queues.collect(1).await[0].context.id.0, "long");
    worker.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn no_more_jobs_are_held_than_there_are_slots() {
    let (script, queues) = (Script::new(3), Queues::new());
    let ids: Vec<String> = (0..9).map(|number| number.to_string()).collect();
    queues.publish(ids.iter().map(|id| (id.as_str(), query::IDLE))).await;
    let worker = Worker::start(config(5, Duration::MAX), &script, (&queues.jobs, &queues.outcomes));
    until("all slots are taken", || script.shared.num_answering.load(Ordering::Relaxed) == 3).await;
    let snapshot = worker.stats.snapshot();
    assert_eq!((snapshot.num_held(), snapshot.num_slots), (3, 3));
    assert_eq!(queues.jobs.pull(100, QUICK).await.unwrap().len(), 6);
    worker.task.abort();
}

#[tokio::test(start_paused = true)]
async fn jobs_that_come_again_are_taken_one_by_one() {
    let (script, queues) = (Script::new(8), Queues::new());
    queues.publish([("a", query::IDLE), ("b", query::IDLE), ("c", query::IDLE)]).await;
    drop(queues.jobs.pull(3, LEASE).await.unwrap());
    tokio::time::advance(LEASE).await;
    let worker = Worker::start(config(2, Duration::MAX), &script, (&queues.jobs, &queues.outcomes));
    until("one runs", || script.shared.num_answering.load(Ordering::Relaxed) == 1).await;
    // The first is alone; the others are still in the queue for other workers.
    assert_eq!(queues.jobs.pull(8, QUICK).await.unwrap().len(), 2);
    worker.task.abort();
}

#[tokio::test(start_paused = true)]
async fn a_job_of_a_newer_version_is_passed_on_ever_more_slowly() {
    let (script, queues) = (Script::new(8), Queues::new());
    let mut newer = crate::script::job("newer", query::QUICK);
    newer.version += 1;
    queues.jobs.publish(newer).await.unwrap();
    let worker = Worker::start(config(5, Duration::MAX), &script, (&queues.jobs, &queues.outcomes));
    tokio::time::sleep(Duration::from_secs(30 + 60 + 120 + 240 - 1)).await;
    assert_eq!(worker.stats.snapshot().given_back, 4);
    queues.publish([("now", query::QUICK)]).await;
    assert_eq!(queues.collect(1).await[0].context.id.0, "now");
    tokio::time::sleep(Duration::from_secs(24 * 3600)).await;
    // However often it was passed on, it is never failed by a worker that does not know it.
    assert!(worker.stats.snapshot().given_back > 20);
    assert_eq!((queues.jobs.len(), queues.outcomes.len()), (1, 0));
    worker.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_noop_engine_answers_with_the_id_after_its_latency() {
    let queues = Queues::new();
    for id in ["a", "b"] {
        queues.jobs.publish(conformance::job(id)).await.unwrap();
    }
    let noop = Noop { latency: QUICK, slots: 1, model: "noop".into() };
    let stats = std::sync::Arc::default();
    let shutdown = tokio_util::sync::CancellationToken::new();
    let started = tokio::time::Instant::now();
    let working = flotilla_gpu_worker::run(
        config(5, Duration::MAX),
        noop,
        (queues.jobs.clone(), queues.outcomes.clone()),
        (std::sync::Arc::clone(&stats), shutdown.clone()),
        |model| assert_eq!(model, "noop"),
    );
    let collecting = async {
        let settled = queues.collect(2).await;
        shutdown.cancel();
        settled
    };
    let (worked, settled) = tokio::join!(working, collecting);
    worked.unwrap();
    assert!((QUICK * 2..QUICK * 4).contains(&started.elapsed()));
    for settled in settled {
        let Outcome::Completed(completed) = settled.outcome else { panic!("expected an answer") };
        assert_eq!(completed.answer, Noop::answer_to(&settled.context.id));
    }
    let snapshot = stats.snapshot();
    assert_eq!((snapshot.answered["stop"], snapshot.engine.generation_tokens), (2, 2));
    assert_eq!(snapshot.e2e_request_latency.count, 2);
}
