//! Messages that come back from the dead: the server's consumer is done with them, its stream is not.

use std::path::Path;

use super::*;

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forgotten_messages_are_delivered_again_and_no_others() {
    let mut server = NatsServer::start();
    let fleet = fleet(&server).await;
    let queue = fleet.jobs(MODEL);
    let expected = ids(20);
    for id in &expected {
        queue.publish(job(id)).await.unwrap();
    }
    server.shut_down();
    let messages = server.data().join("jetstream/$G/streams/FLOTILLA_JOBS/msgs");
    let older = tempfile::tempdir().unwrap();
    copy(&messages, older.path());
    server.restart();
    assert_eq!(drain(&queue, 20).await, expected);
    assert_empty(&queue).await;
    assert_eq!(fleet.redeliver_forgotten().await.unwrap(), 0);
    // The removals are lost, the acks are not.
    server.shut_down();
    std::fs::remove_dir_all(&messages).unwrap();
    copy(older.path(), &messages);
    server.restart();
    assert_empty(&queue).await;
    assert_eq!(fleet.num_jobs_queued().await.unwrap().into_values().sum::<u64>(), 20);
    assert_eq!(fleet.redeliver_forgotten().await.unwrap(), 20);
    assert_eq!(drain(&queue, 20).await, expected);
    assert_empty(&queue).await;
    assert!(fleet.num_jobs_queued().await.unwrap().is_empty());
    // What is only waiting, or with somebody, is not forgotten.
    queue.publish(job("waiting")).await.unwrap();
    assert_eq!(fleet.redeliver_forgotten().await.unwrap(), 0);
    let held = pull_one(&queue).await;
    assert_eq!(fleet.redeliver_forgotten().await.unwrap(), 0);
    held.ack().await.unwrap();
}
