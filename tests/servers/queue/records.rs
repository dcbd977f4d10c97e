//! What can be known of a fleet, and asked of a collector.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt;
use shared::queue::nats::{ConsumerStatus, FleetError};
use shared::status::{Reply, Request, Role, RunStatus, WorkerStatus};
use shared::{JobId, Settled};

use super::*;

fn job_of(run: &str, id: &str) -> Job {
    Job { run: RunId(run.into()), ..job(id) }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_counted_by_model_and_run_until_they_are_settled() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let (one, two) = (fleet.jobs("one"), fleet.jobs("two.b"));
    for id in ["a", "b", "c"] {
        one.publish(job_of("x", id)).await.unwrap();
    }
    one.publish(job_of("y", "a")).await.unwrap();
    two.publish(job_of("x", "a")).await.unwrap();
    let count = async |model: &str, run: &str| {
        let counts = fleet.num_jobs_queued().await.unwrap();
        counts.get(&(model.to_owned(), RunId(run.to_owned()))).copied().unwrap_or(0)
    };
    assert_eq!((count("one", "x").await, count("one", "y").await), (3, 1));
    assert_eq!(count("two.b", "x").await, 1);
    let held = pull_one(&one).await;
    assert_eq!(count("one", "x").await, 3, "a job in flight is still in the queue");
    let status = fleet.consumers().await.unwrap();
    let expected = ConsumerStatus {
        model: "one".into(),
        num_pending: 3,
        num_in_flight: 1,
        num_redelivered: 0,
        num_waiting: 0,
    };
    assert_eq!(status, [expected]);
    held.ack().await.unwrap();
    assert_eq!(count("one", "x").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_runs_are_all_counted() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let queue = fleet.jobs(MODEL);
    for number in 0..300 {
        queue.publish(job_of(&format!("run {number}"), "a")).await.unwrap();
    }
    assert_eq!(fleet.num_jobs_queued().await.unwrap().len(), 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_and_runs_tell_about_themselves() {
    let mut server = NatsServer::start();
    let fleet = fleet(&server).await;
    assert!(fleet.workers().await.unwrap().is_empty());
    assert!(fleet.runs().await.unwrap().is_empty());
    let worker =
        |id: &str, answered| WorkerStatus { id: id.into(), answered, ..WorkerStatus::default() };
    fleet.put_worker(&worker("host.a 1", 1)).await.unwrap();
    fleet.put_worker(&worker("host.b", 2)).await.unwrap();
    fleet.put_worker(&worker("host.a 1", 3)).await.unwrap();
    let mut workers = fleet.workers().await.unwrap();
    workers.sort_by(|one, other| one.id.cmp(&other.id));
    assert_eq!(workers, [worker("host.a 1", 3), worker("host.b", 2)]);
    fleet.remove_worker("host.a 1").await.unwrap();
    assert_eq!(fleet.workers().await.unwrap(), [worker("host.b", 2)]);

    let run = |role| RunStatus { run: RunId("r.1".into()), role, done: 7, ..RunStatus::default() };
    fleet.put_run(&run(Role::Producer)).await.unwrap();
    fleet.put_run(&run(Role::Collector)).await.unwrap();
    assert_eq!(fleet.runs().await.unwrap(), [run(Role::Collector), run(Role::Producer)]);

    let other = RunStatus { id: "two".into(), ..run(Role::Producer) };
    fleet.put_run(&other).await.unwrap();
    let elsewhere = RunStatus { run: RunId("r".into()), ..other.clone() };
    fleet.put_run(&elsewhere).await.unwrap();
    assert_eq!(fleet.run(&other.run).await.unwrap().len(), 3);
    fleet.remove_run(&other).await.unwrap();
    assert_eq!(fleet.runs().await.unwrap(), [elsewhere, run(Role::Collector), run(Role::Producer)]);

    server.wipe();
    server.restart();
    // The word that finds no bucket may be lost; a later one is not.
    let mut told = false;
    for _ in 0..20 {
        told = told || fleet.put_worker(&worker("again", 1)).await.is_ok();
    }
    assert!(told);
    assert_eq!(fleet.workers().await.unwrap(), [worker("again", 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_producers_that_are_gone_are_written_anew_and_no_others() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let said = |id: &str, role, seen_at| RunStatus {
        id: id.into(),
        run: RunId("r".into()),
        role,
        seen_at,
        ..RunStatus::default()
    };
    let now = shared::status::unix_now();
    let gone = said("gone", Role::Producer, now - 60.0);
    for status in
        [&gone, &said("here", Role::Producer, now), &said("", Role::Collector, now - 60.0)]
    {
        fleet.put_run(status).await.unwrap();
    }
    let bucket = outsider(&server).await.get_key_value("flotilla-status").await.unwrap();
    let revision = async |key: &str| bucket.entry(key).await.unwrap().unwrap().revision;
    let keys = ["run.r.producer.gone", "run.r.producer.here", "run.r.collector"];
    fleet.keep_producers(&gone.run).await.unwrap();
    let mut revisions = Vec::new();
    for key in keys {
        revisions.push(revision(key).await);
    }
    assert_eq!(revisions, [4, 2, 3]);
    assert!(fleet.run(&gone.run).await.unwrap().contains(&gone));
}

#[tokio::test(flavor = "multi_thread")]
async fn collector_is_asked_and_answers() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let run = RunId("run.1".into());
    let request = Request::RemoveFailed { ids: vec![JobId("a".into())] };
    let nobody = fleet.request_control(&run, &request, LONG).await.unwrap_err();
    assert!(matches!(nobody, FleetError::NoCollector { .. }), "{nobody}");
    let mut requests = Box::pin(fleet.serve_control(&run).await.unwrap());
    let collecting = tokio::spawn(async move {
        let asked = requests.next().await.unwrap();
        let Request::RemoveFailed { ids } = &asked.request else { panic!("another request") };
        let count = ids.len() as u64;
        asked.answer(&Reply::Removed(count)).await.unwrap();
        requests
    });
    let other = Fleet::connect(&config(server.url())).await.unwrap();
    let reply = other.request_control(&run, &request, LONG).await.unwrap();
    assert_eq!(reply, Reply::Removed(1));
    let _requests = collecting.await.unwrap();
    let raw = async_nats::connect(server.url()).await.unwrap();
    let answer = raw.request("flotilla.control.run=2E1", "nonsense".into());
    // Nobody reads the stream of requests now; whoever asks learns that in time.
    assert!(tokio::time::timeout(Duration::from_millis(200), answer).await.is_err());
    let late = other.request_control(&run, &request, Duration::from_millis(200)).await;
    assert!(matches!(late, Err(FleetError::Server { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_of_a_run_reach_its_collector_only() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let settled = |run: &str, id: &str| Settled {
        version: shared::WIRE_VERSION,
        run: RunId(run.into()),
        context: job(id).context,
        model: Some(MODEL.into()),
        seed: 1,
        worker_rank: 0,
        attempts: 1,
        inference_time: 0.5,
        outcome: shared::Outcome::Failed("no".into()),
    };
    let publisher = fleet.outcomes(None);
    for (run, id) in [("x", "a"), ("y", "b"), ("x", "c")] {
        publisher.publish(settled(run, id)).await.unwrap();
    }
    let of_x = fleet.outcomes(Some(&RunId("x".into())));
    let mut pulled = of_x.pull(10, LONG).await.unwrap();
    let ids: Vec<&str> = pulled.iter().map(|d| d.message().context.id.0.as_str()).collect();
    assert_eq!(ids, ["a", "c"]);
    assert_eq!(fleet.num_outcomes_queued().await.unwrap()[&RunId("y".into())], 1);
    // What is rejected here is no job, and is kept all the same.
    pulled.remove(0).reject("cannot write it".into()).await.unwrap();
    pulled.remove(0).ack().await.unwrap();
    let letters = dead_letters(&fleet, "x").await;
    assert!(letters[0].job.is_err());
    assert_eq!(letters[0].reason, "cannot write it");
    assert_eq!(fleet.num_dead().await.unwrap()[&RunId("x".into())], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_that_tells_anew_while_it_is_read_is_told_of_once() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let ids = ["a", "b", "c", "d"];
    let worker = |id: &str| WorkerStatus { id: id.into(), ..WorkerStatus::default() };
    for id in ids {
        fleet.put_worker(&worker(id)).await.unwrap();
    }
    let over = Arc::new(AtomicBool::new(false));
    let telling = tokio::spawn({
        let (fleet, over) = (fleet.clone(), Arc::clone(&over));
        async move {
            while !over.load(Ordering::Relaxed) {
                for id in ids {
                    fleet.put_worker(&worker(id)).await.unwrap();
                }
            }
        }
    });
    for _ in 0..100 {
        let workers = fleet.workers().await.unwrap();
        let mut told: Vec<&str> = workers.iter().map(|worker| worker.id.as_str()).collect();
        told.sort_unstable();
        // One that is told of faster than it is read may be missed, but none comes twice.
        assert!(told.windows(2).all(|pair| pair[0] < pair[1]), "{told:?}");
    }
    over.store(true, Ordering::Relaxed);
    telling.await.unwrap();
    assert_eq!(fleet.workers().await.unwrap().len(), ids.len());
}
