//! What every [`Queue`] must do, as tests that run against any implementation.
//!
//! An implementation gives a [`Harness`] that makes empty queues, and calls [`run_all`] from a
//! test. The suite waits for leases to run out, so a harness for a real server makes them short.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::future::Future;
use std::time::Duration;

use super::{Delivery, Queue, Stored};
use crate::Generation;
use crate::message::{Context, Job, JobId, Query, RunId, WIRE_VERSION, job_seed};

/// Makes the queues under test.
pub trait Harness {
    /// The implementation.
    type Queue: Queue<Job>;

    /// A new, empty queue that holds `capacity` messages.
    fn queue(&self, capacity: usize) -> impl Future<Output = Self::Queue>;

    /// The dead letters of `queue`: message, reason and attempts, oldest first.
    fn dead_letters(&self, queue: &Self::Queue) -> impl Future<Output = Vec<(Job, String, u32)>>;
}

/// A job with this id.
pub fn job(id: &str) -> Job {
    let id = JobId(id.to_owned());
    let seed = job_seed(0, &id);
    Job {
        version: WIRE_VERSION,
        run: RunId("run".into()),
        context: Context::empty(Query::new(id, "why?".into())),
        prompt_template: None,
        system_prompt: None,
        generation: Generation {
            max_new_tokens: Some(8),
            temperature: Some(0.0),
            seed: Some(seed),
            ..Generation::default()
        },
    }
}

/// The whole suite.
pub async fn run_all<H: Harness>(harness: &H) {
    delivers_in_order_and_forgets_what_is_acked(harness).await;
    pull_takes_what_is_there_and_no_more_than_asked(harness).await;
    pull_returns_nothing_after_its_wait(harness).await;
    pull_wakes_for_a_message_that_comes_later(harness).await;
    unsettled_delivery_comes_again_when_its_lease_ends(harness).await;
    kept_alive_delivery_does_not_come_again(harness).await;
    settling_after_the_lease_ended_loses_nothing(harness).await;
    retry_comes_again_after_its_delay_with_one_more_attempt(harness).await;
    rejected_message_becomes_a_dead_letter(harness).await;
    publish_waits_while_the_queue_is_full(harness).await;
    repeated_publish_of_a_held_message_adds_nothing(harness).await;
    pullers_share_the_messages(harness).await;
}

const SHORT: Duration = Duration::from_millis(50);
/// Longer than any lease under test, as a deadline.
const LONG: Duration = Duration::from_secs(180);

async fn pull_one<Q: Queue<Job>>(queue: &Q) -> Q::Delivery {
    let mut pulled = queue.pull(1, LONG).await.unwrap();
    assert_eq!(pulled.len(), 1, "expected one message before the deadline");
    pulled.remove(0)
}

async fn assert_drained<Q: Queue<Job>>(queue: &Q) {
    assert!(queue.pull(1, SHORT).await.unwrap().is_empty(), "expected an empty queue");
}

async fn delivers_in_order_and_forgets_what_is_acked<H: Harness>(harness: &H) {
    let queue = harness.queue(10).await;
    for id in ["a", "b.*>", "c d"] {
        queue.publish(job(id)).await.unwrap();
    }
    for id in ["a", "b.*>", "c d"] {
        let delivery = pull_one(&queue).await;
        assert_eq!(delivery.message(), &job(id));
        assert_eq!(delivery.attempt(), 1);
        delivery.ack().await.unwrap();
    }
    assert_drained(&queue).await;
}

async fn pull_takes_what_is_there_and_no_more_than_asked<H: Harness>(harness: &H) {
    let queue = harness.queue(10).await;
    for id in ["a", "b", "c"] {
        queue.publish(job(id)).await.unwrap();
    }
    let two = queue.pull(2, LONG).await.unwrap();
    assert_eq!(two.len(), 2);
    let rest = queue.pull(8, LONG).await.unwrap();
    assert_eq!(rest.len(), 1);
    for delivery in two.into_iter().chain(rest) {
        delivery.ack().await.unwrap();
    }
}

async fn pull_returns_nothing_after_its_wait<H: Harness>(harness: &H) {
    let queue = harness.queue(1).await;
    assert!(queue.pull(1, SHORT).await.unwrap().is_empty());
}

async fn pull_wakes_for_a_message_that_comes_later<H: Harness>(harness: &H) {
    let queue = harness.queue(1).await;
    let (pulled, published) = tokio::join!(queue.pull(1, LONG), async {
        tokio::task::yield_now().await;
        queue.publish(job("late")).await
    });
    published.unwrap();
    pulled.unwrap().remove(0).ack().await.unwrap();
}

async fn unsettled_delivery_comes_again_when_its_lease_ends<H: Harness>(harness: &H) {
    let queue = harness.queue(10).await;
    queue.publish(job("a")).await.unwrap();
    drop(pull_one(&queue).await);
    let again = pull_one(&queue).await;
    assert_eq!(again.message().id().0, "a");
    assert_eq!(again.attempt(), 2);
    again.ack().await.unwrap();
    assert_drained(&queue).await;
}

async fn kept_alive_delivery_does_not_come_again<H: Harness>(harness: &H) {
    let queue = harness.queue(10).await;
    queue.publish(job("a")).await.unwrap();
    let delivery = pull_one(&queue).await;
    let third = delivery.lease() / 3;
    for _ in 0..6 {
        assert!(queue.pull(1, third).await.unwrap().is_empty(), "delivered to two holders");
        delivery.keep_alive().await.unwrap();
    }
    delivery.ack().await.unwrap();
    assert_drained(&queue).await;
}

async fn settling_after_the_lease_ended_loses_nothing<H: Harness>(harness: &H) {
    let queue = harness.queue(10).await;
    queue.publish(job("a")).await.unwrap();
    let first = pull_one(&queue).await;
    let second = pull_one(&queue).await;
    assert_eq!(second.attempt(), 2);
    // Whether a late ack is refused or taken differs between queues; the other holder's must work.
    let _late = first.ack().await;
    second.ack().await.unwrap();
    assert_drained(&queue).await;
}

async fn retry_comes_again_after_its_delay_with_one_more_attempt<H: Harness>(harness: &H) {
    let queue = harness.queue(10).await;
    queue.publish(job("a")).await.unwrap();
    pull_one(&queue).await.retry(SHORT * 4).await.unwrap();
    assert_drained(&queue).await;
    let again = pull_one(&queue).await;
    assert_eq!(again.attempt(), 2);
    again.ack().await.unwrap();
}

async fn rejected_message_becomes_a_dead_letter<H: Harness>(harness: &H) {
    let queue = harness.queue(10).await;
    queue.publish(job("bad")).await.unwrap();
    pull_one(&queue).await.retry(Duration::ZERO).await.unwrap();
    pull_one(&queue).await.reject("no such model".into()).await.unwrap();
    assert_drained(&queue).await;
    let dead = harness.dead_letters(&queue).await;
    assert_eq!(dead, [(job("bad"), "no such model".to_owned(), 2)]);
}

async fn publish_waits_while_the_queue_is_full<H: Harness>(harness: &H) {
    let queue = harness.queue(2).await;
    queue.publish(job("a")).await.unwrap();
    queue.publish(job("b")).await.unwrap();
    let full = tokio::time::timeout(SHORT * 4, queue.publish(job("c"))).await;
    assert!(full.is_err(), "a full queue took another message");
    let first = pull_one(&queue).await;
    let still_full = tokio::time::timeout(SHORT * 4, queue.publish(job("c"))).await;
    assert!(still_full.is_err(), "a delivered message counts until it is settled");
    let (published, acked) = tokio::join!(queue.publish(job("c")), first.ack());
    published.unwrap();
    acked.unwrap();
    for id in ["b", "c"] {
        let delivery = pull_one(&queue).await;
        assert_eq!(delivery.message().id().0, id);
        delivery.ack().await.unwrap();
    }
}

async fn repeated_publish_of_a_held_message_adds_nothing<H: Harness>(harness: &H) {
    let queue = harness.queue(10).await;
    assert_eq!(queue.publish(job("a")).await.unwrap(), Stored::New);
    assert_eq!(queue.publish(job("a")).await.unwrap(), Stored::Repeated);
    let delivery = pull_one(&queue).await;
    assert_eq!(queue.publish(job("a")).await.unwrap(), Stored::Repeated);
    delivery.ack().await.unwrap();
    assert_drained(&queue).await;
}

async fn pullers_share_the_messages<H: Harness>(harness: &H) {
    let queue = harness.queue(100).await;
    let mut pullers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let queue = queue.clone();
        pullers.spawn(async move {
            let mut taken = Vec::new();
            while let Some(delivery) = queue.pull(1, SHORT * 10).await.unwrap().pop() {
                taken.push(delivery.message().id().0.clone());
                delivery.ack().await.unwrap();
                tokio::task::yield_now().await;
            }
            taken
        });
    }
    let mut expected: Vec<String> = (0..40).map(|n| n.to_string()).collect();
    for id in &expected {
        queue.publish(job(id)).await.unwrap();
    }
    let mut taken: Vec<String> = pullers.join_all().await.into_iter().flatten().collect();
    taken.sort_unstable();
    expected.sort_unstable();
    assert_eq!(taken, expected);
}
