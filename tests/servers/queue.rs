//! The queue on JetStream against real servers: the suite of every queue, and what only it promises.

use std::sync::Mutex;
use std::time::Duration;

use async_nats::jetstream;
use flotilla_tests::NatsServer;
use futures_util::TryStreamExt;
use shared::queue::conformance::{self, Harness, job};
use shared::queue::nats::{DeadLetter, Fleet, Limits, NatsConfig, NatsDelivery, NatsQueue};
use shared::{Delivery, Job, Queue, RunId};

mod access;
mod faults;
mod forgotten;
mod known;
mod nkeys;
mod records;

/// Short, so that waiting for it to run out is quick; long enough for a busy machine.
const LEASE: Duration = Duration::from_millis(1500);
/// Longer than anything under test takes.
const LONG: Duration = Duration::from_secs(60);
const MODEL: &str = "model";

fn config(url: String) -> NatsConfig {
    NatsConfig { url, ..NatsConfig::default() }
}

async fn fleet(server: &NatsServer) -> Fleet {
    Fleet::connect(&config(server.url())).await.unwrap().with_lease(LEASE)
}

/// A server for at most so many jobs.
async fn small_fleet(server: &NatsServer, max_jobs: i64) -> Fleet {
    let limits = Limits { max_jobs: Some(max_jobs), ..Limits::default() };
    Fleet::connect_with(&config(server.url()), limits).await.unwrap().with_lease(LEASE)
}

/// A client of its own, as anybody might have.
async fn outsider(server: &NatsServer) -> jetstream::Context {
    jetstream::new(async_nats::connect(server.url()).await.unwrap())
}

async fn pull_one<Q: Queue<Job>>(queue: &Q) -> Q::Delivery {
    let mut pulled = queue.pull(1, LONG).await.unwrap();
    assert_eq!(pulled.len(), 1, "expected a job before the deadline");
    pulled.remove(0)
}

/// Pulls and acks `count` jobs; their ids, sorted.
async fn drain<Q: Queue<Job>>(queue: &Q, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    while ids.len() < count {
        let pulled = queue.pull(count - ids.len(), LONG).await.unwrap();
        assert!(!pulled.is_empty(), "only {} of {count} jobs came", ids.len());
        for delivery in pulled {
            ids.push(delivery.message().id().0.clone());
            delivery.ack().await.unwrap();
        }
    }
    ids.sort_unstable();
    ids
}

async fn assert_empty<Q: Queue<Job>>(queue: &Q) {
    let more = queue.pull(1, Duration::from_millis(100)).await.unwrap();
    assert!(more.is_empty(), "expected an empty queue");
}

fn ids(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("q{number:05}")).collect()
}

async fn dead_letters(fleet: &Fleet, run: &str) -> Vec<DeadLetter> {
    fleet.dead_letters(&RunId(run.into())).try_collect().await.unwrap()
}

/// A server for each queue, kept until the end.
#[derive(Default)]
struct Servers {
    running: Mutex<Vec<NatsServer>>,
    fleets: Mutex<Vec<Fleet>>,
}

impl Harness for Servers {
    type Queue = NatsQueue<Job>;

    async fn queue(&self, capacity: usize) -> Self::Queue {
        let server = NatsServer::start();
        let fleet = small_fleet(&server, i64::try_from(capacity).unwrap()).await;
        self.running.lock().unwrap().push(server);
        self.fleets.lock().unwrap().push(fleet.clone());
        fleet.jobs(MODEL)
    }

    async fn dead_letters(&self, _: &Self::Queue) -> Vec<(Job, String, u32)> {
        let fleet = self.fleets.lock().unwrap().last().unwrap().clone();
        let letters = dead_letters(&fleet, "run").await;
        letters.into_iter().map(|l| (l.job.unwrap(), l.reason, l.attempts)).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jetstream_queue_passes_the_conformance_suite() {
    conformance::run_all(&Servers::default()).await;
}
