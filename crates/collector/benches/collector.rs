//! Outcomes a second through the role: queue in memory, real file, fdatasync on; the index in
//! memory and, where a redis-server is found, in Redis with its append-only file.
//!
//! Not a test of anything: prints two lines. `cargo bench --bench collector [-- OUTCOMES]`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench ends at the first problem")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flotilla_collector::{
    Collector, Dedup, End, Lock, MemoryDedup, Observer, Output, RedisConfig, RedisDedup, run,
};
use shared::{
    Completed, Context, FinishReason, JobId, MemoryQueue, Outcome, Query, Queue, RunId, Settled,
    WIRE_VERSION,
};
use tokio::sync::{mpsc, watch};

/// Outcomes of about a kilobyte each, as lines.
fn settled(number: usize) -> Settled {
    let id = JobId(format!("id {number}"));
    let query = Query::new(id, "why? ".repeat(20));
    let completed = Completed {
        answer: "because ".repeat(40),
        finish_reason: FinishReason::Stop,
        prompt_tokens: 100,
        completion_tokens: 40,
        prompt_sha256: "0".repeat(64),
        context_truncated: false,
        logprobs: None,
    };
    Settled {
        version: WIRE_VERSION,
        run: RunId("bench".into()),
        context: Context::empty(query),
        model: Some("noop".into()),
        seed: 0,
        worker_rank: 0,
        attempts: 1,
        inference_time: 0.0,
        outcome: Outcome::Completed(completed),
    }
}

/// Sums up how long syncing took.
struct Syncs(Duration);

impl Observer for Syncs {
    fn written(&mut self, _outcomes: &[Settled]) {}

    fn synced(&mut self, elapsed: Duration) {
        self.0 += elapsed;
    }
}

async fn measure<D: Dedup>(name: &str, dedup: D, count: usize) {
    // Beside the build, since the system's folder for temporary files may be in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let output = Output::open(&dir.path().join("results.jsonl"), Lock::Refuse).await.unwrap();
    let mut collector = Collector::open(output, dedup).await.unwrap();
    let queue = MemoryQueue::new(1_024, Duration::from_secs(60));
    let (_tell, end) = watch::channel(End::AtLines(count as u64));
    let (_ask, controls) = mpsc::channel(1);
    let mut syncs = Syncs(Duration::ZERO);
    let started = Instant::now();
    let publishing = tokio::spawn({
        let queue = queue.clone();
        async move {
            for number in 0..count {
                queue.publish(settled(number)).await.unwrap();
            }
        }
    });
    run(&queue, &mut collector, end, controls, &mut syncs).await.unwrap();
    publishing.await.unwrap();
    let elapsed = started.elapsed().as_secs_f64();
    println!(
        "{name}: {:.0} outcomes/s, {:.0} % of the time in fdatasync",
        count as f64 / elapsed,
        100.0 * syncs.0.as_secs_f64() / elapsed
    );
}

/// A redis-server that ends with it.
struct Redis(Child);

impl Redis {
    fn start(dir: &Path) -> Option<Self> {
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--appendonly", "yes", "--save", "", "--dir"]).arg(dir);
        command.arg("--unixsocket").arg(dir.join("socket"));
        command.stdout(Stdio::null()).spawn().ok().map(Self)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _gone = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[tokio::main]
async fn main() {
    let count = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(50_000);
    measure("index in memory", MemoryDedup::default(), count).await;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some(_server) = Redis::start(dir.path()) else {
        println!("no redis-server is installed");
        return;
    };
    let url = format!("redis+unix://{}", dir.path().join("socket").display());
    let dedup = RedisDedup::connect(&RedisConfig::new(url), &RunId("bench".into())).await.unwrap();
    measure("index in Redis", dedup, count).await;
}
