//! Taking failed lines out: never an answer, never a line lost, wherever it is killed.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use flotilla_collector::dedup::server::IndexServer;
use flotilla_collector::{Collector, Error, Lock, Output, Probe, Step};
use shared::{IdDigest, JobId, Settled};

use crate::fixture::{answered, failed, ids, open};

fn digests(ids: &[&str]) -> HashSet<IdDigest> {
    ids.iter().map(|id| JobId((*id).to_owned()).digest()).collect()
}

fn outcomes() -> Vec<Settled> {
    vec![answered("a"), failed("b"), answered("c"), failed("d"), failed("e")]
}

#[tokio::test]
async fn only_failed_lines_with_these_ids_are_removed_and_kept_beside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let mut collector = open(&path).await.unwrap();
    let outcomes = outcomes();
    let outcomes: Vec<&Settled> = outcomes.iter().collect();
    collector.write(&outcomes).await.unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let before = fs::read_to_string(&path).unwrap();

    assert_eq!(collector.remove_failed(&digests(&["a", "b", "e", "x"])).await.unwrap(), 2);
    assert_eq!(ids(&path), ["a", "c", "d"]);
    let retried = dir.path().join("results.jsonl.retried.jsonl");
    assert_eq!(ids(&retried), ["b", "e"]);
    assert_eq!((collector.num_lines(), collector.num_failed()), (3, 1));
    assert!(!collector.answered().contains(&JobId("b".into())));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    // Whole lines, as they were.
    let mut all: Vec<String> =
        fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
    all.extend(fs::read_to_string(&retried).unwrap().lines().map(str::to_owned));
    all.sort_unstable();
    let mut expected: Vec<&str> = before.lines().collect();
    expected.sort_unstable();
    assert_eq!(all, expected);

    assert_eq!(collector.remove_failed(&digests(&["b", "e"])).await.unwrap(), 0);
    let written = collector.write(&[&answered("b"), &failed("d")]).await.unwrap();
    assert_eq!(written.new, [0]);
    drop(collector);
    let collector = open(&path).await.unwrap();
    assert_eq!(ids(&path), ["a", "c", "d", "b"]);
    assert_eq!((collector.num_lines(), collector.num_failed()), (4, 1));
}

#[tokio::test]
async fn lines_of_bad_input_are_found_and_taken_out_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let mut collector = open(&path).await.unwrap();
    let bad = |id| Settled { attempts: 0, ..failed(id) };
    let outcomes = [answered("a"), bad("b"), failed("c"), bad("d"), bad("e")];
    collector.write(&outcomes.iter().collect::<Vec<_>>()).await.unwrap();
    let none = HashSet::new();
    assert_eq!(collector.handle_bad_input(&none, false).await.unwrap(), 3);
    assert_eq!(ids(&path), ["a", "b", "c", "d", "e"]);
    assert_eq!(collector.handle_bad_input(&digests(&["a", "c", "d"]), true).await.unwrap(), 1);
    assert_eq!(ids(&path), ["a", "b", "c", "e"]);
    assert_eq!(collector.handle_bad_input(&none, true).await.unwrap(), 2);
    assert_eq!(ids(&path), ["a", "c"]);
    assert_eq!(ids(&dir.path().join("results.jsonl.retried.jsonl")), ["d", "b", "e"]);
    // Corrected, they get another line.
    collector.write(&[&answered("b")]).await.unwrap();
    assert_eq!(ids(&path), ["a", "c", "b"]);
}

#[tokio::test]
async fn killed_anywhere_while_removing_it_can_be_asked_again() {
    for step in [Step::Kept, Step::Rewritten, Step::Replaced, Step::Forgotten] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        let server = IndexServer::default();
        let open = async || {
            let output = Output::open(&path, Lock::Refuse).await.unwrap();
            Collector::open(output, server.client()).await.unwrap()
        };
        let mut collector = open().await;
        let outcomes = outcomes();
        let outcomes: Vec<&Settled> = outcomes.iter().collect();
        collector.write(&outcomes).await.unwrap();
        collector.set_probe(Probe::new(move |reached| reached == step));
        let stopped = collector.remove_failed(&digests(&["b", "e"])).await;
        assert!(matches!(stopped, Err(Error::Stopped(at)) if at == step));
        drop(collector);

        let mut collector = open().await;
        let replaced = matches!(step, Step::Replaced | Step::Forgotten);
        let found = ids(&path);
        let expected: &[&str] =
            if replaced { &["a", "c", "d"] } else { &["a", "b", "c", "d", "e"] };
        assert_eq!(found, expected, "killed after {step}");
        let left = collector.remove_failed(&digests(&["b", "e"])).await.unwrap();
        assert_eq!(left, if replaced { 0 } else { 2 }, "killed after {step}");
        let again = [&answered("b"), &failed("e"), &answered("a")];
        assert_eq!(collector.write(&again).await.unwrap().new, [0, 1], "killed after {step}");
        assert_eq!(ids(&path), ["a", "c", "d", "b", "e"], "killed after {step}");
        assert!(!dir.path().join("results.jsonl.unfinished").exists());
        let kept = ids(&dir.path().join("results.jsonl.retried.jsonl"));
        assert_eq!(kept[..2], ["b", "e"], "killed after {step}");
    }
}

#[tokio::test]
async fn index_of_before_a_removal_is_not_believed_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let server = IndexServer::default();
    let output = Output::open(&path, Lock::Refuse).await.unwrap();
    let mut collector = Collector::open(output, server.client()).await.unwrap();
    collector.write(&[&failed("a"), &failed("b")]).await.unwrap();
    let older = server.snapshot();
    collector.remove_failed(&digests(&["a", "b"])).await.unwrap();
    // The same bytes at the same offsets, in another file.
    collector.write(&[&failed("c"), &failed("b")]).await.unwrap();
    server.restore(older);
    let again = collector.write(&[&failed("a"), &failed("c")]).await.unwrap();
    assert_eq!(again.new, [0]);
    assert_eq!(ids(&path), ["c", "b", "a"]);
}

#[tokio::test]
async fn link_to_an_output_stays_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("real.jsonl");
    let link = dir.path().join("results.jsonl");
    open(&real).await.unwrap().write(&[&failed("a"), &answered("b")]).await.unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let mut collector = open(&link).await.unwrap();
    assert_eq!(collector.remove_failed(&digests(&["a"])).await.unwrap(), 1);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(ids(&real), ["b"]);
}
