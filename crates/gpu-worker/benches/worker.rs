//! Jobs per second of one worker with the no-op engine, over queues in memory: what a job costs
//! beside its inference.
#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use flotilla_gpu_worker::{Config, Noop, Stats};
use shared::queue::conformance::job;
use shared::{Delivery, Job, MemoryQueue, Queue, QueueError, Settled};
use tokio_util::sync::CancellationToken;

const NUM_JOBS: usize = 300_000;
const CONTEXT_BYTES: usize = 1_000;
const LEASE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    for slots in [16, 64, 256] {
        let elapsed = measure(slots).await?;
        let rate = NUM_JOBS as f64 / elapsed.as_secs_f64();
        println!("{slots} slots: {rate:.0} jobs/s, {:.2} us a job", 1e6 / rate);
    }
    Ok(())
}

async fn measure(slots: usize) -> Result<Duration, Box<dyn std::error::Error>> {
    let jobs: MemoryQueue<Job> = MemoryQueue::new(1_024, LEASE);
    let outcomes: MemoryQueue<Settled> = MemoryQueue::new(1_024, LEASE);
    let shutdown = CancellationToken::new();
    let config = Config {
        rank: 0,
        name: "bench".into(),
        max_attempts: 5,
        drain_timeout: Duration::from_secs(30),
    };
    let noop = Noop { latency: Duration::ZERO, slots, model: "noop".into() };
    let queues = (jobs.clone(), outcomes.clone());
    let control = (Arc::new(Stats::default()), shutdown.clone());
    let began = Instant::now();
    let worker = tokio::spawn(flotilla_gpu_worker::run(config, noop, queues, control, |_model| ()));
    let producer = tokio::spawn(produce(jobs));
    let mut num_settled = 0;
    while num_settled < NUM_JOBS {
        for delivery in outcomes.pull(128, LEASE).await? {
            delivery.ack().await?;
            num_settled += 1;
        }
    }
    let elapsed = began.elapsed();
    shutdown.cancel();
    producer.await??;
    worker.await??;
    Ok(elapsed)
}

async fn produce(jobs: MemoryQueue<Job>) -> Result<(), QueueError> {
    for number in 0..NUM_JOBS {
        let mut job = job(&number.to_string());
        job.context.context = "x".repeat(CONTEXT_BYTES);
        jobs.publish(job).await?;
    }
    Ok(())
}
