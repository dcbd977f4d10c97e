//! One process writes an output; others are refused or wait.

use std::fs;
use std::path::Path;
use std::time::Duration;

use flotilla_collector::{Error, Lock, Log, Output, Probe};
use shared::JobId;
use tokio_util::sync::CancellationToken;

use crate::fixture::{failed, open};

const DEADLINE: Duration = Duration::from_secs(20);

/// A standby, polled often enough to be waiting in the kernel or about to.
async fn standby(
    path: &Path,
    shutdown: &CancellationToken,
) -> tokio::task::JoinHandle<Result<Output, Error>> {
    let (path, lock) = (path.to_owned(), Lock::Wait(shutdown.clone()));
    let waiting = tokio::spawn(async move { Output::open(&path, lock).await });
    tokio::task::yield_now().await;
    waiting
}

#[tokio::test(flavor = "multi_thread")]
async fn second_writer_of_an_output_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let first = open(&path).await.unwrap();
    assert!(matches!(open(&path).await, Err(Error::Locked { .. })));
    drop(first);
    open(&path).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn standby_waits_and_takes_over_what_the_first_has_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let mut first = open(&path).await.unwrap();
    let waiting = standby(&path, &CancellationToken::new()).await;
    first.write(&[&failed("a")]).await.unwrap();
    assert!(!waiting.is_finished());
    drop(first);
    let output = tokio::time::timeout(DEADLINE, waiting).await.unwrap().unwrap().unwrap();
    assert_eq!(output.end(), fs::metadata(&path).unwrap().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn standby_can_be_called_off() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let first = open(&path).await.unwrap();
    let shutdown = CancellationToken::new();
    let waiting = standby(&path, &shutdown).await;
    shutdown.cancel();
    let ended = tokio::time::timeout(DEADLINE, waiting).await.unwrap().unwrap();
    assert!(matches!(ended, Err(Error::Interrupted { .. })));
    // The thread that waits in the kernel must not keep the lock once it gets it.
    drop(first);
    let again = Output::open(&path, Lock::Wait(CancellationToken::new()));
    tokio::time::timeout(DEADLINE, again).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn lock_follows_the_output_when_lines_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    open(&path).await.unwrap().write(&[&failed("a"), &failed("b")]).await.unwrap();
    let mut first = Output::open(&path, Lock::Refuse).await.unwrap();
    // One that waits for the file that had the name before.
    let waiting = standby(&path, &CancellationToken::new()).await;
    let ids = [JobId("a".into()).digest()].into();
    let removed = first.remove_failed(&ids, &mut Probe::default()).await.unwrap();
    assert_eq!(removed.len(), 1);
    assert!(matches!(open(&path).await, Err(Error::Locked { .. })));
    assert!(!waiting.is_finished());
    drop(first);
    let output = tokio::time::timeout(DEADLINE, waiting).await.unwrap().unwrap().unwrap();
    assert_eq!(output.end(), fs::metadata(&path).unwrap().len());
    assert!(matches!(open(&path).await, Err(Error::Locked { .. })));
}
