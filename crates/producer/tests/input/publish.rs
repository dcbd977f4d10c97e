//! Publishing in a window: nothing lost, nothing counted that isn't confirmed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use flotilla_producer::{BadInput, PublishError, Published, Publisher, Snapshot, publish};
use shared::{Context, Job, JobId, MemoryQueue, Outcome, QueueError, Settled};
use tokio_util::sync::CancellationToken;

use crate::gate::Gate;
use crate::{context, soon, template};

type Item = Result<Context, BadInput>;

fn bad(id: Option<&str>) -> Item {
    Err(BadInput {
        file: "queries.jsonl".into(),
        line: 3,
        index: 2,
        id: id.map(|id| JobId(id.to_owned())),
        query: None,
        reason: "expected text in `query`, given none".to_owned(),
    })
}

fn numbered(number: usize) -> Vec<Item> {
    (0..number).map(|k| Ok(context(&k.to_string()))).collect()
}

fn publisher(jobs: &Gate<Job>, outcomes: &Gate<Settled>) -> Publisher<Gate<Job>, Gate<Settled>> {
    Publisher::new(template(), (jobs.clone(), outcomes.clone()))
}

async fn publish_all(
    items: Vec<Item>,
    publisher: &Publisher<Gate<Job>, Gate<Settled>>,
) -> Result<Published, PublishError> {
    let shutdown = CancellationToken::new();
    soon(publish(items.into_iter(), publisher, &shutdown, &mut |_| ())).await
}

#[tokio::test]
async fn a_window_of_publishes_waits_at_a_time_and_all_arrive() {
    let (jobs, outcomes) = (Gate::closed(), Gate::open());
    let publisher = publisher(&jobs, &outcomes).with_window(8);
    let opened = async {
        jobs.until_waiting(8).await;
        assert_eq!(publisher.stats().snapshot().waiting, 8);
        jobs.confirm(1000);
    };
    let (published, ()) = tokio::join!(publish_all(numbered(300), &publisher), opened);
    assert_eq!(
        published.unwrap(),
        Published { jobs: 300, failed: 0, rejected: 0, ..Published::default() }
    );
    assert_eq!(jobs.peak(), 8);
    let expected: Vec<String> = (0..300).map(|k| k.to_string()).collect();
    let mut ids = jobs.ids().await;
    ids.sort_by_key(|id| id.parse::<u32>().unwrap());
    assert_eq!(ids, expected);
    let snapshot = publisher.stats().snapshot();
    assert_eq!(snapshot, Snapshot { published: 300, ..Snapshot::default() });
}

#[tokio::test]
async fn a_window_of_one_keeps_the_order_though_the_queue_is_full_again_and_again() {
    let jobs = MemoryQueue::<Job>::new(3, Duration::from_secs(600));
    let outcomes = MemoryQueue::<Settled>::new(3, Duration::from_secs(600));
    let publisher = Publisher::new(template(), (jobs.clone(), outcomes)).with_window(1);
    let taken = tokio::spawn(async move {
        use shared::{Delivery, Queue};
        let mut ids = Vec::new();
        while ids.len() < 200 {
            for delivery in jobs.pull(2, Duration::from_secs(1)).await.unwrap() {
                ids.push(delivery.message().id().0.parse::<usize>().unwrap());
                delivery.ack().await.unwrap();
            }
        }
        ids
    });
    let shutdown = CancellationToken::new();
    let all = numbered(200).into_iter();
    soon(publish(all, &publisher, &shutdown, &mut |_| ())).await.unwrap();
    assert!(soon(taken).await.unwrap().into_iter().eq(0..200));
}

#[tokio::test]
async fn bad_input_with_an_id_fails_and_without_one_is_reported() {
    let (jobs, outcomes) = (Gate::open(), Gate::open());
    let publisher = publisher(&jobs, &outcomes);
    let items = vec![Ok(context("a")), bad(None), bad(Some("b")), Ok(context("c"))];
    let mut reported = Vec::new();
    let mut report = |bad: &BadInput| reported.push(bad.to_string());
    let shutdown = CancellationToken::new();
    let published = soon(publish(items.into_iter(), &publisher, &shutdown, &mut report)).await;
    assert_eq!(
        published.unwrap(),
        Published { jobs: 2, failed: 1, rejected: 1, ..Published::default() }
    );
    assert_eq!(reported, ["queries.jsonl:3: expected text in `query`, given none"]);
    assert_eq!(jobs.ids().await, ["a", "c"]);
    let failed = outcomes.take().await;
    assert_eq!(failed[0].context.id.0, "b");
    let snapshot = publisher.stats().snapshot();
    assert_eq!((snapshot.published, snapshot.failed, snapshot.rejected), (2, 1, 1));
}

#[tokio::test]
async fn a_shutdown_waits_for_what_has_begun_and_begins_nothing_more() {
    let (jobs, outcomes) = (Gate::closed(), Gate::open());
    let publisher = publisher(&jobs, &outcomes).with_window(4);
    let shutdown = CancellationToken::new();
    let publishing = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { publish(numbered(100).into_iter(), &publisher, &shutdown, &mut |_| ()).await }
    });
    jobs.until_waiting(4).await;
    shutdown.cancel();
    jobs.confirm(100);
    let published = soon(publishing).await.unwrap().unwrap();
    assert_eq!(published.jobs, 4);
    assert_eq!(jobs.ids().await, ["0", "1", "2", "3"]);
}

#[tokio::test]
async fn a_shutdown_gives_up_what_a_full_queue_never_confirms_and_counts_none_of_it() {
    let (jobs, outcomes) = (Gate::closed(), Gate::open());
    let publisher = publisher(&jobs, &outcomes).with_drain_timeout(Duration::from_millis(50));
    let stats = Arc::clone(publisher.stats());
    let shutdown = CancellationToken::new();
    let publishing = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { publish(numbered(100).into_iter(), &publisher, &shutdown, &mut |_| ()).await }
    });
    jobs.until_waiting(100).await;
    shutdown.cancel();
    assert_eq!(soon(publishing).await.unwrap().unwrap(), Published::default());
    assert_eq!(stats.snapshot(), Snapshot::default());
}

#[tokio::test]
async fn a_job_too_large_for_the_queue_fails_with_its_question_and_the_others_go_on() {
    let (mut jobs, mut outcomes) = (Gate::open(), Gate::open());
    (jobs.max_bytes, outcomes.max_bytes) = (5000, 5000);
    let large = Context { context: "x".repeat(6000), context_length: 6000, ..context("large") };
    let long = Context { query: "é".repeat(6000), ..context("long") };
    let items = vec![Ok(context("a")), Ok(large), Ok(long), Ok(context("b"))];
    let published = publish_all(items, &publisher(&jobs, &outcomes)).await.unwrap();
    assert_eq!(published, Published { jobs: 2, failed: 2, rejected: 0, ..Published::default() });
    assert_eq!(jobs.ids().await, ["a", "b"]);
    let failed = outcomes.take().await;
    for settled in &failed {
        let Outcome::Failed(reason) = &settled.outcome else { panic!("answered") };
        assert!(reason.contains("expected at most 5000 bytes, given"), "{reason}");
        assert!(!settled.context.success && settled.context.context.is_empty());
    }
    assert_eq!(failed[0].context.query, "why?");
    assert_eq!(failed[1].context.query, "é".repeat(1000));
}

#[tokio::test]
async fn a_queue_that_takes_not_even_a_small_failure_ends_the_publishing() {
    let (mut jobs, mut outcomes) = (Gate::open(), Gate::open());
    (jobs.max_bytes, outcomes.max_bytes) = (1, 1);
    let error = publish_all(numbered(2), &publisher(&jobs, &outcomes)).await.unwrap_err();
    assert!(matches!(error, PublishError::Queue(QueueError::TooLarge { .. })), "{error}");
}

#[tokio::test]
async fn a_server_that_cannot_serve_ends_the_publishing() {
    let (mut jobs, outcomes) = (Gate::open(), Gate::open());
    jobs.is_broken = true;
    let publisher = publisher(&jobs, &outcomes);
    let error = publish_all(numbered(1000), &publisher).await.unwrap_err();
    assert!(matches!(error, PublishError::Queue(QueueError::Server(_))), "{error}");
    assert_eq!(publisher.stats().snapshot(), Snapshot::default());
}

/// 64 MiB of contexts, whatever the window would allow.
#[tokio::test]
async fn large_contexts_are_read_ahead_by_bytes() {
    let (jobs, outcomes) = (Gate::closed(), Gate::open());
    let publisher = publisher(&jobs, &outcomes);
    let made = Arc::new(AtomicUsize::new(0));
    let contexts = (0..200).map({
        let made = Arc::clone(&made);
        move |k: usize| {
            made.fetch_add(1, Ordering::SeqCst);
            Ok(Context { context: "x".repeat(1 << 20), ..context(&k.to_string()) })
        }
    });
    let shutdown = CancellationToken::new();
    let looking = async {
        jobs.until_waiting(63).await;
        assert!(made.load(Ordering::SeqCst) <= 64);
        jobs.confirm(1);
        jobs.until_waiting(63).await;
        shutdown.cancel();
        jobs.confirm(63);
    };
    let mut report = |_: &BadInput| ();
    let publishing = soon(publish(contexts, &publisher, &shutdown, &mut report));
    let (published, ()) = tokio::join!(publishing, looking);
    assert!((63..=64).contains(&published.unwrap().jobs));
    assert!(jobs.peak() <= 63);
    assert!(made.load(Ordering::SeqCst) <= 66);
}
