//! The collector's index in a real Redis: the suite of every index, and a Redis that is killed,
//! flushed, rolled back, evicted or guarded while a collector runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use collector::dedup::conformance::{self, Harness};
use collector::{
    Collector, Control, Dedup, DedupError, End, Error, Lock, Observer, Output, RedisConfig,
    RedisDedup,
};
use flotilla_tests::RedisServer;
use flotilla_tests::process::DEADLINE;
use serde_json::Value;
use shared::{Context, JobId, MemoryQueue, Outcome, Query, Queue, RunId, Settled, WIRE_VERSION};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

mod access;

const LEASE: Duration = Duration::from_secs(30);

fn run_id(name: &str) -> RunId {
    RunId(name.to_owned())
}

fn settled(number: usize) -> Settled {
    let id = JobId(format!("id {number}"));
    let query = Query::new(id, "why?".into());
    Settled {
        version: WIRE_VERSION,
        run: run_id("run"),
        context: Context::empty(query),
        model: None,
        seed: 0,
        worker_rank: 0,
        attempts: 1,
        inference_time: 0.0,
        outcome: Outcome::Failed("no reason".into()),
    }
}

async fn connect(server: &RedisServer) -> RedisDedup {
    RedisDedup::connect(&RedisConfig::new(server.url()), &run_id("run")).await.unwrap()
}

struct Redis {
    url: String,
}

impl Harness for Redis {
    type Dedup = RedisDedup;

    async fn client(&self, run: &str) -> RedisDedup {
        RedisDedup::connect(&RedisConfig::new(&self.url), &run_id(run)).await.unwrap()
    }
}

#[tokio::test]
async fn redis_index_passes_the_conformance_suite() {
    let server = RedisServer::start();
    let redis = Redis { url: server.url() };
    conformance::run_all(&redis).await;
    conformance::run_shared(&redis).await;
    server.flush_all();
    let redis = Redis { url: server.unix_url() };
    conformance::run_all(&redis).await;
}

/// Tells how many lines are written.
struct Tell(watch::Sender<usize>);

impl Observer for Tell {
    fn written(&mut self, outcomes: &[Settled]) {
        self.0.send_modify(|written| *written += outcomes.len());
    }
}

/// A run with a collector on a Redis.
struct Fleet {
    dir: TempDir,
    server: RedisServer,
    queue: MemoryQueue<Settled>,
}

/// A collector that runs.
struct Running {
    task: JoinHandle<Result<(), Error>>,
    end: watch::Sender<End>,
    written: watch::Receiver<usize>,
    _controls: mpsc::Sender<Control>,
}

impl Fleet {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir, server: RedisServer::start(), queue: MemoryQueue::new(100_000, LEASE) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("results.jsonl")
    }

    async fn open(&self) -> Collector<RedisDedup> {
        let output = Output::open(&self.path(), Lock::Refuse).await.unwrap();
        Collector::open(output, connect(&self.server).await).await.unwrap()
    }

    async fn start(&self) -> Running {
        let mut collector = self.open().await;
        let (tell, written) = watch::channel(0);
        let (end, ends) = watch::channel(End::Open);
        let (ask, controls) = mpsc::channel(1);
        let queue = self.queue.clone();
        let task = tokio::spawn(async move {
            collector::run(&queue, &mut collector, ends, controls, &mut Tell(tell)).await
        });
        Running { task, end, written, _controls: ask }
    }

    async fn publish(&self, numbers: std::ops::Range<usize>) {
        for number in numbers {
            self.queue.publish(settled(number)).await.unwrap();
        }
    }

    fn assert_complete(&self, count: usize) {
        let mut found = ids(&self.path());
        found.sort_unstable();
        let mut expected: Vec<String> = (0..count).map(|number| format!("id {number}")).collect();
        expected.sort_unstable();
        assert_eq!(found, expected);
        assert!(self.queue.is_empty());
    }
}

impl Running {
    async fn until_written(&mut self, count: usize) {
        let reached = self.written.wait_for(|written| *written >= count);
        tokio::time::timeout(DEADLINE, reached).await.expect("before the deadline").unwrap();
    }

    async fn end(self, end: End) {
        self.end.send_replace(end);
        tokio::time::timeout(DEADLINE, self.task).await.expect("ends").unwrap().unwrap();
    }
}

fn ids(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let line = |line| serde_json::from_str::<Value>(line).unwrap();
    text.lines().map(|text| line(text)["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_killed_and_restarted_in_the_middle_of_a_run_doubles_nothing() {
    let mut fleet = Fleet::new();
    let mut running = fleet.start().await;
    fleet.publish(0..500).await;
    running.until_written(500).await;
    fleet.server.kill();
    // New ones, and all of the old ones once more.
    fleet.publish(0..1_000).await;
    assert!(!running.task.is_finished());
    fleet.server.restart();
    running.until_written(1_000).await;
    running.end(End::WhenDrained).await;
    fleet.assert_complete(1_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_or_acked_while_redis_is_down() {
    let mut fleet = Fleet::new();
    let running = fleet.start().await;
    fleet.server.kill();
    fleet.publish(0..10).await;
    let mut collected = running.written.clone();
    assert!(
        tokio::time::timeout(Duration::from_millis(500), collected.wait_for(|n| *n > 0))
            .await
            .is_err()
    );
    assert!(!fleet.queue.is_empty());
    assert!(ids(&fleet.path()).is_empty());
    fleet.server.restart();
    running.end(End::AtLines(10)).await;
    fleet.assert_complete(10);
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_flushed_in_the_middle_of_a_run_is_filled_from_the_output() {
    let fleet = Fleet::new();
    let mut running = fleet.start().await;
    fleet.publish(0..300).await;
    running.until_written(300).await;
    fleet.server.flush_all();
    fleet.publish(100..600).await;
    running.until_written(600).await;
    running.end(End::WhenDrained).await;
    fleet.assert_complete(600);
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_restored_from_an_older_copy_catches_up_with_the_output() {
    let mut fleet = Fleet::new();
    let mut running = fleet.start().await;
    fleet.publish(0..200).await;
    running.until_written(200).await;
    let copy = fleet.server.copy();
    fleet.publish(200..400).await;
    running.until_written(400).await;
    fleet.server.restore(&copy);
    fleet.publish(0..500).await;
    running.until_written(500).await;
    // Once more while nobody runs.
    running.end(End::WhenDrained).await;
    fleet.server.restore(&copy);
    let mut running = fleet.start().await;
    fleet.publish(0..600).await;
    running.until_written(100).await;
    running.end(End::WhenDrained).await;
    fleet.assert_complete(600);
}

#[tokio::test(flavor = "multi_thread")]
async fn set_of_ids_that_was_evicted_is_noticed() {
    let fleet = Fleet::new();
    let mut running = fleet.start().await;
    fleet.publish(0..100).await;
    running.until_written(100).await;
    fleet.server.command(&["DEL", "{flotilla:run}:ids"]);
    fleet.publish(0..200).await;
    running.until_written(200).await;
    running.end(End::WhenDrained).await;
    fleet.assert_complete(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_not_read_again_where_redis_knows_it() {
    let fleet = Fleet::new();
    let running = fleet.start().await;
    fleet.publish(0..1_000).await;
    running.end(End::AtLines(1_000)).await;
    // Whoever reads this line now finds it foreign.
    let mut bytes = fs::read(fleet.path()).unwrap();
    bytes[0] = b'#';
    fs::write(fleet.path(), &bytes).unwrap();
    let collector = fleet.open().await;
    assert_eq!((collector.num_lines(), collector.num_failed()), (1_000, 1_000));
    drop(collector);
    fleet.server.flush_all();
    let output = Output::open(&fleet.path(), Lock::Refuse).await.unwrap();
    let read = Collector::open(output, connect(&fleet.server).await).await;
    assert!(matches!(read, Err(Error::Foreign { line: 1, .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn output_that_was_replaced_is_read_anew() {
    let fleet = Fleet::new();
    let running = fleet.start().await;
    fleet.publish(0..50).await;
    running.end(End::AtLines(50)).await;
    let first = fs::read(fleet.path()).unwrap();
    fs::remove_file(fleet.path()).unwrap();
    let running = fleet.start().await;
    fleet.publish(25..75).await;
    running.end(End::AtLines(50)).await;
    // As long as the other one, and with the same number of lines.
    fs::write(fleet.path(), first).unwrap();
    let running = fleet.start().await;
    fleet.publish(0..75).await;
    running.end(End::AtLines(25)).await;
    fleet.assert_complete_after_drain(75).await;
}

impl Fleet {
    /// Repeats may be left in the queue where a run ended at its last line.
    async fn assert_complete_after_drain(&self, count: usize) {
        self.start().await.end(End::WhenDrained).await;
        self.assert_complete(count);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn collector_with_an_older_claim_stops() {
    let fleet = Fleet::new();
    let running = fleet.start().await;
    // One that can't see the lock, as on another machine.
    let elsewhere = fleet.dir.path().join("elsewhere.jsonl");
    let output = Output::open(&elsewhere, Lock::Refuse).await.unwrap();
    let _second = Collector::open(output, connect(&fleet.server).await).await.unwrap();
    fleet.publish(0..1).await;
    let ended = tokio::time::timeout(DEADLINE, running.task).await.expect("ends").unwrap();
    assert!(matches!(ended, Err(Error::TakenOver { .. })));
    assert!(ids(&fleet.path()).is_empty());
    assert!(!fleet.queue.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_grow_even_when_redis_forgets_them() {
    let server = RedisServer::start();
    let mut first = connect(&server).await;
    first.claim().await.unwrap();
    first.clear(&collector::Position::default()).await.unwrap();
    server.flush_all();
    let mut second = connect(&server).await;
    second.claim().await.unwrap();
    assert!(matches!(first.resume().await, Err(DedupError::TakenOver { .. })));
}
