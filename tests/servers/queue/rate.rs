//! How fast the queue is on this machine: figures for people, run by hand with `--ignored`.

use std::time::Instant;

use futures_util::{StreamExt, stream};

use super::*;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn rates_of_publishing_and_of_pulling_and_acking() {
    const COUNT: usize = 20_000;
    for sync in ["", "sync_interval: always"] {
        let options =
            flotilla_tests::NatsOptions { jetstream: sync.to_owned(), ..Default::default() };
        let server = NatsServer::start_with(options);
        let queue = fleet(&server).await.jobs(MODEL);
        let jobs: Vec<Job> = (0..COUNT)
            .map(|number| {
                let mut job = job(&format!("q{number}"));
                job.context.context = "x".repeat(700);
                job
            })
            .collect();
        let begun = Instant::now();
        stream::iter(jobs)
            .map(|job| {
                let queue = queue.clone();
                async move { queue.publish(job).await.unwrap() }
            })
            .buffer_unordered(256)
            .collect::<Vec<()>>()
            .await;
        let published = begun.elapsed();
        let begun = Instant::now();
        let mut acked = 0;
        while acked < COUNT {
            let pulled = queue.pull(128, LONG).await.unwrap();
            acked += pulled.len();
            stream::iter(pulled)
                .map(|delivery| async move { delivery.ack().await.unwrap() })
                .buffer_unordered(128)
                .collect::<Vec<()>>()
                .await;
        }
        let pulled = begun.elapsed();
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let rate = |time: Duration| COUNT as f64 / time.as_secs_f64();
        println!(
            "{sync:?}: {:.0} published/s, {:.0} pulled and acked/s",
            rate(published),
            rate(pulled)
        );
    }
}
