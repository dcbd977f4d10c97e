//! The role over a queue: what is acked when, and when it ends.

use std::time::Duration;

use flotilla_collector::dedup::server::{IndexServer, Snapshot};
use flotilla_collector::log::memory::Disk;
use flotilla_collector::{Collector, Control, End, Error, Probe, Step, run};
use shared::status::Known;
use shared::{Delivery, JobId, MemoryQueue, Queue, Settled};
use tokio::sync::{mpsc, oneshot, watch};

use crate::fixture::{Count, answered, failed, ids, open};

const LEASE: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(600);

async fn queue_of(outcomes: impl IntoIterator<Item = Settled>) -> MemoryQueue<Settled> {
    let queue = MemoryQueue::new(10_000, LEASE);
    for outcome in outcomes {
        queue.publish(outcome).await.unwrap();
    }
    queue
}

fn no_controls() -> mpsc::Receiver<Control> {
    mpsc::channel(1).1
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_each_id_once_and_acks_repeats() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    open(&path).await.unwrap().write(&[&answered("old")]).await.unwrap();
    let mut collector = open(&path).await.unwrap();
    assert!(collector.answered().contains(&JobId("old".into())));
    let queue = MemoryQueue::new(1_000, LEASE);
    let (tell, end) = watch::channel(End::Open);
    let publish = async {
        for round in 0..3 {
            for id in ["old", "a", "b", "c"] {
                queue.publish(answered(id)).await.unwrap();
                queue.publish(answered(&format!("{id}-{round}"))).await.unwrap();
            }
        }
        tell.send_replace(End::AtLines(15));
    };
    let mut count = Count::default();
    let running = run(&queue, &mut collector, end, no_controls(), &mut count);
    let (collected, ()) = tokio::join!(running, publish);
    collected.unwrap();
    let mut found = ids(&path);
    assert_eq!(found.len(), 16);
    found.sort_unstable();
    found.dedup();
    assert_eq!(found.len(), 16);
    let overall = count.report.overall();
    assert_eq!((overall.answered, overall.failed), (15, 0));
    assert!(queue.pull(1, Duration::from_millis(1)).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn drained_queue_ends_it_with_everything_acked() {
    let disk = Disk::default();
    let queue = queue_of((0..1_000).map(|n| answered(&n.to_string()))).await;
    let mut collector =
        Collector::open(disk.open(), IndexServer::default().client()).await.unwrap();
    let (_tell, end) = watch::channel(End::WhenDrained);
    let mut count = Count::default();
    run(&queue, &mut collector, end, no_controls(), &mut count).await.unwrap();
    assert_eq!(disk.lines().len(), 1_000);
    assert_eq!(count.report.overall().answered, 1_000);
    assert!(queue.is_empty());
}

#[tokio::test(start_paused = true)]
async fn failed_sync_ends_it_with_nothing_acked() {
    let disk = Disk::default();
    let queue = queue_of([answered("a"), answered("b")]).await;
    let server = IndexServer::default();
    let mut collector = Collector::open(disk.open(), server.client()).await.unwrap();
    disk.fail_syncs(true);
    let (_tell, end) = watch::channel(End::WhenDrained);
    let failed = run(&queue, &mut collector, end, no_controls(), &mut Count::default()).await;
    assert!(matches!(failed, Err(Error::Io { .. })));
    // A sync is never tried again: the same collector writes no more, whatever the disk says.
    disk.fail_syncs(false);
    assert!(matches!(collector.write(&[&answered("c")]).await, Err(Error::Io { .. })));
    disk.crash(|_unsynced| 0);
    let mut collector = Collector::open(disk.open(), server.client()).await.unwrap();
    let (_tell, end) = watch::channel(End::AtLines(2));
    run(&queue, &mut collector, end, no_controls(), &mut Count::default()).await.unwrap();
    assert_eq!(disk.lines().len(), 2);
    assert!(queue.is_empty());
}

#[tokio::test(start_paused = true)]
async fn lines_whose_sync_failed_are_on_disk_before_they_are_acked() {
    let disk = Disk::default();
    let queue = queue_of([answered("a"), answered("b")]).await;
    let server = IndexServer::default();
    let mut collector = Collector::open(disk.open(), server.client()).await.unwrap();
    disk.fail_syncs(true);
    let (_tell, end) = watch::channel(End::WhenDrained);
    let failed = run(&queue, &mut collector, end, no_controls(), &mut Count::default()).await;
    assert!(matches!(failed, Err(Error::Io { .. })));
    disk.fail_syncs(false);
    // Nothing crashes: who opens the log again finds both lines there, on disk or not.
    let mut collector = Collector::open(disk.open(), server.client()).await.unwrap();
    assert_eq!(collector.num_lines(), 2);
    // What was given back comes again, and one more with it.
    tokio::time::advance(Duration::from_secs(2)).await;
    queue.publish(answered("c")).await.unwrap();
    let (_tell, end) = watch::channel(End::AtLines(1));
    let mut count = Count::default();
    run(&queue, &mut collector, end, no_controls(), &mut count).await.unwrap();
    assert_eq!((count.repeated, queue.is_empty()), (2, true));
    disk.crash(|_unsynced| 0);
    assert_eq!(disk.lines().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn index_that_is_down_is_waited_for_with_leases_kept() {
    let disk = Disk::default();
    let queue = queue_of([answered("a"), answered("b")]).await;
    let server = IndexServer::default();
    let mut collector = Collector::open(disk.open(), server.client()).await.unwrap();
    server.set_up(false);
    let (_tell, end) = watch::channel(End::AtLines(2));
    let mut count = Count::default();
    let running = run(&queue, &mut collector, end, no_controls(), &mut count);
    let outage = async {
        // Ten leases pass, and nobody else is given what the collector holds.
        assert!(queue.pull(1, LEASE * 10).await.unwrap().is_empty());
        assert!(disk.lines().is_empty());
        server.set_up(true);
    };
    let (collected, ()) = tokio::join!(running, outage);
    collected.unwrap();
    assert_eq!((disk.lines().len(), count.repeated), (2, 0));
    assert!(queue.is_empty());
}

#[tokio::test(start_paused = true)]
async fn told_to_end_while_the_index_is_down_it_gives_its_batch_back() {
    let disk = Disk::default();
    let queue = queue_of([answered("a")]).await;
    let server = IndexServer::default();
    let mut collector = Collector::open(disk.open(), server.client()).await.unwrap();
    server.set_up(false);
    let (tell, end) = watch::channel(End::Open);
    let mut count = Count::default();
    let running = run(&queue, &mut collector, end, no_controls(), &mut count);
    let (collected, _) = tokio::join!(running, async { tell.send_replace(End::Now) });
    collected.unwrap();
    assert!(disk.lines().is_empty());
    let again = queue.pull(1, LEASE / 2).await.unwrap();
    assert_eq!(again.len(), 1, "its lease still ran");
}

#[tokio::test(start_paused = true)]
async fn told_to_end_now_it_ends_after_the_batch_in_hand() {
    let disk = Disk::default();
    let queue = queue_of([answered("a")]).await;
    let mut collector =
        Collector::open(disk.open(), IndexServer::default().client()).await.unwrap();
    let (tell, end) = watch::channel(End::Open);
    let mut count = Count::default();
    let running = run(&queue, &mut collector, end, no_controls(), &mut count);
    let ending = async {
        tokio::task::yield_now().await;
        tell.send_replace(End::Now);
    };
    let (collected, ()) = tokio::join!(running, ending);
    collected.unwrap();
    assert_eq!(disk.lines().len(), 1);
    assert!(queue.is_empty());
}

#[tokio::test(start_paused = true)]
async fn collector_with_nothing_to_write_notices_that_it_was_taken_over() {
    let disk = Disk::default();
    let queue = queue_of([]).await;
    let server = IndexServer::default();
    let mut first = Collector::open(disk.open(), server.client()).await.unwrap();
    let _second = Collector::open(disk.open(), server.client()).await.unwrap();
    let (_tell, end) = watch::channel(End::Open);
    let over = run(&queue, &mut first, end, no_controls(), &mut Count::default()).await;
    assert!(matches!(over, Err(Error::TakenOver { .. })));
}

#[tokio::test(start_paused = true)]
async fn collector_that_was_taken_over_stops_and_acks_nothing() {
    let disk = Disk::default();
    let queue = queue_of([answered("a")]).await;
    let server = IndexServer::default();
    let mut first = Collector::open(disk.open(), server.client()).await.unwrap();
    let mut second = Collector::open(disk.open(), server.client()).await.unwrap();
    let (_tell, end) = watch::channel(End::Open);
    let over = run(&queue, &mut first, end, no_controls(), &mut Count::default()).await;
    assert!(matches!(over, Err(Error::TakenOver { .. })));
    let (_tell, end) = watch::channel(End::AtLines(1));
    run(&queue, &mut second, end, no_controls(), &mut Count::default()).await.unwrap();
    assert_eq!(disk.lines(), [("a".to_owned(), false)]);
    assert!(queue.is_empty());
}

#[tokio::test(start_paused = true)]
async fn failed_lines_are_removed_on_request_and_answered_again() {
    let disk = Disk::default();
    let queue = queue_of([answered("a"), failed("b"), failed("c")]).await;
    let mut collector =
        Collector::open(disk.open(), IndexServer::default().client()).await.unwrap();
    let (tell, end) = watch::channel(End::Open);
    let (ask, controls) = mpsc::channel(1);
    let mut count = Count::default();
    let running = run(&queue, &mut collector, end, controls, &mut count);
    let retrying = async {
        while disk.lines().len() < 3 {
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        let ids = ["a", "b", "x"].map(|id| JobId(id.into()).digest()).into();
        let (reply, answer) = oneshot::channel();
        ask.send(Control::RemoveFailed { ids, reply }).await.unwrap();
        assert_eq!(answer.await.unwrap(), Ok(1));
        queue.publish(answered("b")).await.unwrap();
        tell.send_replace(End::AtLines(4));
    };
    let (collected, ()) = tokio::time::timeout(LONG, async { tokio::join!(running, retrying) })
        .await
        .expect("ends before the deadline");
    collected.unwrap();
    let expected = [("a", false), ("c", true), ("b", false)].map(|(id, f)| (id.to_owned(), f));
    assert_eq!(disk.lines(), expected);
    assert_eq!((collector.num_lines(), collector.num_failed()), (3, 1));
}

/// Asks a running collector which of these ids have their line.
async fn ask(controls: &mpsc::Sender<Control>, ids: &[&str]) -> Option<Known> {
    let ids = ids.iter().map(|id| JobId((*id).to_owned()).digest()).collect();
    let (reply, answer) = oneshot::channel();
    controls.send(Control::Known { ids, reply }).await.ok()?;
    answer.await.ok()
}

#[tokio::test(start_paused = true)]
async fn known_is_what_is_synced_through_a_rollback_and_an_outage_of_the_index() {
    let disk = Disk::default();
    let queue = queue_of([answered("a"), failed("b")]).await;
    let server = IndexServer::default();
    let mut collector = Collector::open(disk.open(), server.client()).await.unwrap();
    let (tell, end) = watch::channel(End::Open);
    let (controls, received) = mpsc::channel(4);
    let mut count = Count::default();
    let running = run(&queue, &mut collector, end, received, &mut count);
    let asking = async {
        while disk.synced_lines().len() < 2 {
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        let known = Known { num_lines: 2, written: vec![true, false, true] };
        assert_eq!(ask(&controls, &["a", "x", "b"]).await, Some(known.clone()));
        server.restore(Snapshot::default());
        assert_eq!(ask(&controls, &["a", "x", "b"]).await, Some(known.clone()));
        server.set_up(false);
        let (late, ()) = tokio::join!(ask(&controls, &["a", "x", "b"]), async {
            tokio::time::advance(LONG).await;
            server.set_up(true);
        });
        assert_eq!(late, Some(known));
        // Told to end while the index is down, it ends, and answers nobody.
        server.set_up(false);
        let (none, _) = tokio::join!(
            async { tokio::join!(ask(&controls, &["a"]), ask(&controls, &["b"])) },
            async {
                tokio::task::yield_now().await;
                tell.send_replace(End::Now);
            }
        );
        assert_eq!(none, (None, None));
    };
    let both = async { tokio::join!(running, asking) };
    tokio::time::timeout(LONG * 2, both).await.expect("ends before the deadline").0.unwrap();
}

#[tokio::test(start_paused = true)]
async fn collector_that_was_taken_over_tells_nothing() {
    let disk = Disk::default();
    let server = IndexServer::default();
    let mut first = Collector::open(disk.open(), server.client()).await.unwrap();
    first.write(&[&answered("a")]).await.unwrap();
    let _second = Collector::open(disk.open(), server.client()).await.unwrap();
    let (_tell, end) = watch::channel(End::Open);
    let (controls, received) = mpsc::channel(1);
    let queue = queue_of([]).await;
    let mut count = Count::default();
    let running = run(&queue, &mut first, end, received, &mut count);
    let (ended, known) = tokio::join!(running, ask(&controls, &["a"]));
    assert!(matches!(ended, Err(Error::TakenOver { .. })), "{ended:?}");
    assert_eq!(known, None);
}

#[tokio::test(start_paused = true)]
async fn questions_have_their_turn_however_many_outcomes_wait() {
    let disk = Disk::default();
    let queue = queue_of((0..2_000).map(|number| answered(&number.to_string()))).await;
    let mut collector =
        Collector::open(disk.open(), IndexServer::default().client()).await.unwrap();
    // After the second batch.
    let (_tell, end) = watch::channel(End::AtLines(129));
    let (controls, received) = mpsc::channel(4);
    let questions = async { tokio::join!(ask(&controls, &["0"]), ask(&controls, &["0"])) };
    let mut count = Count::default();
    let running = run(&queue, &mut collector, end, received, &mut count);
    let (known, ended) = tokio::join!(questions, running);
    ended.unwrap();
    let known = [known.0, known.1].map(|known| known.expect("an answer before the end"));
    assert!(known.iter().all(|known| known.num_lines <= 128), "{known:?}");
    assert!(disk.lines().len() < 2_000);
}

#[tokio::test(start_paused = true)]
async fn delivery_is_acked_only_after_its_line_is_on_disk() {
    let disk = Disk::default();
    let queue = queue_of([answered("a")]).await;
    let server = IndexServer::default();
    let mut collector = Collector::open(disk.open(), server.client()).await.unwrap();
    let held = queue.pull(1, LEASE).await.unwrap().remove(0);
    collector.write(&[held.message()]).await.unwrap();
    // The process dies before the ack: the outcome comes again and is dropped.
    drop((collector, held));
    let mut collector = Collector::open(disk.open(), server.client()).await.unwrap();
    let (_tell, end) = watch::channel(End::Open);
    let mut count = Count::default();
    let running = run(&queue, &mut collector, end, no_controls(), &mut count);
    let until_empty = async {
        while !queue.is_empty() {
            tokio::time::advance(Duration::from_secs(1)).await;
        }
    };
    tokio::select! { ended = running => ended.unwrap(), () = until_empty => {} }
    assert_eq!(count.report.overall().answered, 0);
    assert_eq!(disk.lines().len(), 1);
}

#[tokio::test]
async fn index_that_is_flushed_between_check_and_mark_is_filled_from_the_log() {
    let disk = Disk::default();
    let server = IndexServer::default();
    let mut collector = Collector::open(disk.open(), server.client()).await.unwrap();
    collector.write(&[&answered("a")]).await.unwrap();
    let flushed = server.clone();
    collector.set_probe(Probe::new(move |step| {
        if step == Step::Synced {
            flushed.restore(Default::default());
        }
        false
    }));
    assert_eq!(collector.write(&[&failed("b")]).await.unwrap().new, [0]);
    assert_eq!((collector.num_lines(), collector.num_failed()), (2, 1));
    let again = [&answered("a"), &failed("b"), &answered("c"), &answered("c")];
    assert_eq!(collector.write(&again).await.unwrap().new, [2]);
    assert_eq!(disk.lines().len(), 3);
}

#[test]
fn steps_are_read_by_their_names() {
    for step in Step::ALL {
        assert_eq!(step.to_string().parse(), Ok(step));
    }
    assert!("elsewhere".parse::<Step>().unwrap_err().contains("synced"));
}
