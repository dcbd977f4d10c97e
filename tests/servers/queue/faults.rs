//! What goes wrong with the server, the link and the messages costs no job and stalls nobody.

use std::collections::BTreeSet;
use std::time::Instant;

use async_nats::HeaderMap;
use flotilla_tests::Proxy;
use shared::{Publishing, QueueError, Settled, Stored};
use tokio::task::{JoinHandle, JoinSet};

use super::*;

const SHORT: Duration = Duration::from_millis(200);

async fn publish_all(queue: &NatsQueue<Job>, ids: &[String]) {
    let mut publishing = JoinSet::new();
    for id in ids {
        let (queue, id) = (queue.clone(), id.clone());
        publishing.spawn(async move { queue.publish(job(&id)).await.unwrap() });
    }
    publishing.join_all().await;
}

/// Publishes one job, as soon as that is possible.
fn publish_soon(queue: &NatsQueue<Job>, id: &str) -> JoinHandle<Stored> {
    let (queue, job) = (queue.clone(), job(id));
    tokio::spawn(async move { queue.publish(job).await.unwrap() })
}

/// Pulls one job, as soon as there is one.
fn pull_soon(queue: &NatsQueue<Job>) -> JoinHandle<NatsDelivery<Job>> {
    let queue = queue.clone();
    tokio::spawn(async move { pull_one(&queue).await })
}

#[tokio::test(flavor = "multi_thread")]
async fn server_killed_while_publishing_and_pulling_loses_nothing() {
    let mut server = NatsServer::start();
    let fleet = fleet(&server).await;
    let queue = fleet.jobs(MODEL);
    let expected = ids(3000);
    let (publisher, all) = (queue.clone(), expected.clone());
    let publishing = tokio::spawn(async move {
        for window in all.chunks(250) {
            publish_all(&publisher, window).await;
        }
    });
    let mut seen = BTreeSet::new();
    let mut kills = 0;
    while seen.len() < expected.len() {
        let pulled = queue.pull(100, LONG).await.unwrap();
        assert!(!pulled.is_empty(), "stalled after {} jobs and {kills} kills", seen.len());
        for delivery in pulled {
            seen.insert(delivery.message().id().0.clone());
            // What could not be acked comes again.
            drop(delivery.ack().await);
        }
        if kills < 3 && seen.len() > kills * 700 + 300 {
            server.restart();
            kills += 1;
        }
    }
    publishing.await.unwrap();
    assert_eq!(kills, 3);
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_begun_before_a_restart_gets_what_is_published_after_it() {
    let mut server = NatsServer::start();
    let fleet = fleet(&server).await;
    let queue = fleet.jobs(MODEL);
    assert_empty(&queue).await;
    let waiting = pull_soon(&queue);
    server.kill();
    let publishing = publish_soon(&queue, "a");
    server.restart();
    publishing.await.unwrap();
    waiting.await.unwrap().ack().await.unwrap();
    assert_empty(&queue).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wiped_server_gets_its_streams_again() {
    let mut server = NatsServer::start();
    let fleet = fleet(&server).await;
    let queue = fleet.jobs(MODEL);
    queue.publish(job("gone")).await.unwrap();
    let held = pull_one(&queue).await;
    server.wipe();
    server.restart();
    queue.publish(job("new")).await.unwrap();
    let delivery = pull_one(&queue).await;
    assert_eq!(delivery.message().id().0, "new");
    delivery.ack().await.unwrap();
    assert_empty(&queue).await;
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_consumer_is_made_again_under_a_waiting_pull() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let queue = fleet.jobs(MODEL);
    assert_empty(&queue).await;
    let waiting = pull_soon(&queue);
    let outsider = outsider(&server).await;
    while fleet.consumers().await.unwrap()[0].num_waiting == 0 {
        tokio::task::yield_now().await;
    }
    outsider.delete_consumer_from_stream("jobs-model", "FLOTILLA_JOBS").await.unwrap();
    queue.publish(job("a")).await.unwrap();
    waiting.await.unwrap().ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn full_queue_waits_and_drops_nothing() {
    let server = NatsServer::start();
    let fleet = small_fleet(&server, 20).await;
    let queue = fleet.jobs(MODEL);
    let expected = ids(500);
    let (publisher, all) = (queue.clone(), expected.clone());
    let publishing = tokio::spawn(async move { publish_all(&publisher, &all).await });
    let mut expected: BTreeSet<String> = expected.into_iter().collect();
    for number in 0.. {
        let extra = format!("extra{number}");
        if queue.try_publish(job(&extra)).await.unwrap() == Publishing::Full {
            break;
        }
        expected.insert(extra);
    }
    assert!(!publishing.is_finished());
    let taken = drain(&queue, expected.len()).await;
    publishing.await.unwrap();
    assert_eq!(taken, expected.into_iter().collect::<Vec<_>>());
    assert_eq!(queue.try_publish(job("room again")).await.unwrap(), Publishing::Stored);
}

#[tokio::test(flavor = "multi_thread")]
async fn link_cut_without_a_reset_delays_a_publish_only() {
    let server = NatsServer::start();
    let proxy = Proxy::start(server.address());
    let through = config(server.url_at(proxy.address()));
    let fleet = Fleet::connect(&through).await.unwrap();
    let queue = fleet.jobs(MODEL);
    queue.publish(job("before")).await.unwrap();
    proxy.hold();
    let waiting = tokio::time::timeout(SHORT, queue.publish(job("during"))).await;
    assert!(waiting.is_err(), "confirmed over a cut link");
    let publishing = publish_soon(&queue, "during");
    proxy.pass();
    publishing.await.unwrap();
    assert_eq!(drain(&queue, 2).await, ["before", "during"]);
    assert_empty(&queue).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_confirmation_adds_nothing_twice() {
    let server = NatsServer::start();
    let proxy = Proxy::start(server.address());
    let fleet = Fleet::connect(&config(server.url_at(proxy.address()))).await.unwrap();
    let queue = fleet.jobs(MODEL);
    proxy.lose_replies();
    let publishing = publish_soon(&queue, "a");
    let outsider = outsider(&server).await;
    // The job is stored; only the confirmation is missing.
    while outsider.get_stream("FLOTILLA_JOBS").await.unwrap().cached_info().state.messages == 0 {
        tokio::task::yield_now().await;
    }
    assert!(!publishing.is_finished());
    proxy.pass();
    publishing.await.unwrap();
    assert_eq!(drain(&queue, 1).await, ["a"]);
    assert_empty(&queue).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reset_links_strand_no_job() {
    let server = NatsServer::start();
    let proxy = Proxy::start(server.address());
    let fleet = Fleet::connect(&config(server.url_at(proxy.address()))).await.unwrap();
    let queue = fleet.with_lease(LEASE).jobs(MODEL);
    let expected = ids(600);
    let mut seen = BTreeSet::new();
    for part in expected.chunks(100) {
        let publishing = publish_all(&queue, part);
        proxy.reset();
        publishing.await;
        while seen.len() < part.len() {
            for delivery in queue.pull(40, LONG).await.unwrap() {
                seen.insert(delivery.message().id().0.clone());
                drop(delivery.ack().await);
            }
        }
        assert_eq!(seen, part.iter().cloned().collect());
        seen.clear();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_nobody_can_read_become_dead_letters() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await.with_worker("worker-1");
    let queue = fleet.jobs(MODEL);
    let outsider = outsider(&server).await;
    let garbage: [&[u8]; 5] =
        [b"", b"garbage", b"{\"json\": true}", b"\x81\xa7version\x01", b"\x81\xa7version\x00"];
    for bytes in garbage {
        let ack = outsider.publish("flotilla.jobs.model.run", bytes.into()).await.unwrap();
        ack.await.unwrap();
    }
    queue.publish(job("good")).await.unwrap();
    assert_eq!(drain(&queue, 1).await, ["good"]);
    let letters = dead_letters(&fleet, "run").await;
    let bytes: Vec<Vec<u8>> = letters.iter().map(|l| l.job.clone().unwrap_err()).collect();
    assert_eq!(bytes, garbage.map(<[u8]>::to_vec));
    for letter in &letters {
        assert!(letter.reason.contains("version 1"), "{}", letter.reason);
        assert_eq!((letter.model.as_str(), letter.attempts), (MODEL, 1));
        assert_eq!(letter.worker.as_deref(), Some("worker-1"));
    }
    assert!(fleet.num_jobs_queued().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn message_of_a_newer_version_is_left_to_newer_workers() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let queue = fleet.jobs(MODEL);
    queue.publish(Job { version: 2, ..job("newer") }).await.unwrap();
    queue.publish(job("mine")).await.unwrap();
    assert_eq!(drain(&queue, 1).await, ["mine"]);
    assert_empty(&queue).await;
    assert_eq!(fleet.num_jobs_queued().await.unwrap().values().sum::<u64>(), 1);
    assert!(dead_letters(&fleet, "run").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn message_above_the_payload_limit_is_refused_at_once() {
    let server = NatsServer::start();
    let queue = fleet(&server).await.jobs(MODEL);
    let mut large = job("large");
    large.context.context = "x".repeat(9_000_000);
    let refused = queue.publish(large).await.unwrap_err();
    let QueueError::TooLarge { message_id, bytes, limit } = refused else { panic!("{refused}") };
    assert_eq!((message_id.as_str(), limit), ("run/large", 8_000_000.max(limit)));
    assert!(bytes > 9_000_000);
    let mut fits = job("fits");
    fits.context.context = "x".repeat(7_000_000);
    queue.publish(fits.clone()).await.unwrap();
    assert_eq!(pull_one(&queue).await.message(), &fits);
}

#[tokio::test(flavor = "multi_thread")]
async fn message_above_the_size_of_its_stream_is_refused() {
    let server = NatsServer::start();
    let limits = Limits { jobs_bytes: 1 << 20, ..Limits::default() };
    let fleet = Fleet::connect_with(&config(server.url()), limits).await.unwrap();
    let mut large = job("large");
    large.context.context = "x".repeat(2 << 20);
    let refused = fleet.jobs(MODEL).publish(large).await.unwrap_err();
    assert!(matches!(refused, QueueError::TooLarge { limit: 1_048_576, .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_pullers_share_the_jobs_without_a_stall() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let mut pullers = JoinSet::new();
    for _ in 0..64 {
        // Each with a queue of its own, as in processes of their own.
        let queue = fleet.jobs(MODEL);
        pullers.spawn(async move {
            let mut taken = Vec::new();
            loop {
                let delivery = pull_one(&queue).await;
                let id = delivery.message().id().0.clone();
                assert_eq!(delivery.attempt(), 1);
                delivery.ack().await.unwrap();
                if id.starts_with("end") {
                    return taken;
                }
                taken.push(id);
            }
        });
    }
    let queue = fleet.jobs(MODEL);
    let expected = ids(2000);
    publish_all(&queue, &expected).await;
    let ends: Vec<String> = (0..64).map(|number| format!("end{number}")).collect();
    publish_all(&queue, &ends).await;
    let mut taken: Vec<String> = pullers.join_all().await.into_iter().flatten().collect();
    taken.sort_unstable();
    assert_eq!(taken, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_pull_strands_nothing() {
    let server = NatsServer::start();
    // A lease far beyond this test: what is stranded is not seen again.
    let fleet = fleet(&server).await.with_lease(Duration::from_secs(600));
    let queue = fleet.jobs(MODEL);
    assert_empty(&queue).await;
    let expected = ids(400);
    let mut seen = BTreeSet::new();
    for (number, part) in expected.chunks(4).enumerate() {
        let publishing = publish_all(&queue, part);
        // Dropped at another moment each time: before, while and after the jobs arrive.
        let limit = Duration::from_micros(50 * u64::try_from(number).unwrap());
        let (pulled, ()) =
            tokio::join!(tokio::time::timeout(limit, queue.pull(3, LONG)), publishing);
        for delivery in pulled.into_iter().flat_map(Result::unwrap) {
            seen.insert(delivery.message().id().0.clone());
            delivery.ack().await.unwrap();
        }
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while seen.len() < expected.len() {
        assert!(Instant::now() < deadline, "{} jobs are stranded", expected.len() - seen.len());
        // A queue of its own: what was kept for the next pull has to go back for others.
        for delivery in fleet.jobs(MODEL).pull(7, SHORT).await.unwrap() {
            seen.insert(delivery.message().id().0.clone());
            delivery.ack().await.unwrap();
        }
    }
    assert_empty(&queue).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_of_a_job_that_was_put_back_are_both_delivered() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let run = RunId("run".into());
    let settled = Settled {
        version: shared::WIRE_VERSION,
        run: run.clone(),
        context: job("a").context,
        model: None,
        seed: 0,
        worker_rank: 0,
        attempts: 1,
        inference_time: 0.0,
        outcome: shared::Outcome::Failed("twice the same".into()),
    };
    let outcomes = fleet.outcomes(None);
    outcomes.publish(settled.clone()).await.unwrap();
    outcomes.publish(settled).await.unwrap();
    let pulled = fleet.outcomes(Some(&run)).pull(9, LONG).await.unwrap();
    assert_eq!(pulled.len(), 2);
    assert_eq!(fleet.num_outcomes_queued().await.unwrap()[&run], 2);
    for delivery in pulled {
        delivery.ack().await.unwrap();
    }
    let error = outcomes.pull(1, SHORT).await.err().unwrap();
    assert!(matches!(error, QueueError::Server(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn republished_job_passes_the_duplicate_window() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let queue = fleet.jobs(MODEL);
    queue.publish(job("a")).await.unwrap();
    pull_one(&queue).await.reject("bad\nvery \"bad\" · ñ".into()).await.unwrap();
    let letters = dead_letters(&fleet, "run").await;
    assert_eq!(letters[0].reason, "bad\nvery \"bad\" · ñ");
    // Published as ever it is the job that the server remembers.
    queue.publish(job("a")).await.unwrap();
    assert_empty(&queue).await;
    fleet.republish(MODEL, job("a")).await.unwrap();
    assert_eq!(drain(&queue, 1).await, ["a"]);
    for _ in 0..2 {
        fleet.delete_dead_letter(letters[0].sequence).await.unwrap();
        assert!(fleet.num_dead().await.unwrap().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_text_may_be_an_id_a_run_or_a_model() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let texts = ["a.b", "*", ">", "two words", "línea\r\n", "日本", "", "x/y", &"long".repeat(60)];
    for model in ["m", "m.*", "org/model >"] {
        let queue = fleet.jobs(model);
        let mut expected = BTreeSet::new();
        for run in texts {
            for id in texts.into_iter().filter(|id| !id.is_empty()) {
                let mut job = job(id);
                job.run = RunId(run.into());
                expected.insert((run.to_owned(), id.to_owned()));
                queue.publish(job).await.unwrap();
            }
        }
        let counts = fleet.num_jobs_queued().await.unwrap();
        let of_model: Vec<u64> =
            counts.iter().filter(|((m, _), _)| m == model).map(|(_, &count)| count).collect();
        assert_eq!(of_model, [8; 9]);
        let mut seen = BTreeSet::new();
        while seen.len() < expected.len() {
            let pulled = queue.pull(100, LONG).await.unwrap();
            assert!(!pulled.is_empty());
            for delivery in pulled {
                let job = delivery.message();
                seen.insert((job.run.0.clone(), job.id().0.clone()));
                delivery.ack().await.unwrap();
            }
        }
        assert_eq!(seen, expected);
        assert_empty(&queue).await;
    }
    // Slashes in both: two jobs all the same.
    let queue = fleet.jobs("m");
    for (run, id) in [("a/b", "c"), ("a", "b/c")] {
        queue.publish(Job { run: RunId(run.into()), ..job(id) }).await.unwrap();
    }
    assert_eq!(drain(&queue, 2).await, ["b/c", "c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_that_disappears_gives_its_jobs_back() {
    let server = NatsServer::start();
    let proxy = Proxy::start(server.address());
    let lost = Fleet::connect(&config(server.url_at(proxy.address()))).await.unwrap();
    let lost = lost.with_lease(LEASE).jobs(MODEL);
    let fleet = fleet(&server).await;
    let queue = fleet.jobs(MODEL);
    queue.publish(job("a")).await.unwrap();
    let held = pull_one(&lost).await;
    proxy.hold();
    let again = pull_one(&queue).await;
    assert_eq!(again.attempt(), 2);
    again.ack().await.unwrap();
    proxy.pass();
    // Late, and no harm: it is the collector that tells them apart.
    drop(held.ack().await);
    assert_empty(&queue).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn header_of_an_outsider_does_no_harm() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", "model/run/run/a");
    let outsider = outsider(&server).await;
    let ack = outsider.publish_with_headers("flotilla.jobs.model.run", headers, "x".into()).await;
    ack.unwrap().await.unwrap();
    let queue = fleet.jobs(MODEL);
    assert_empty(&queue).await;
    assert_eq!(dead_letters(&fleet, "run").await.len(), 1);
}
