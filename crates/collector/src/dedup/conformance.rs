//! What every [`Dedup`] must do, as tests that run against any implementation.
//!
//! [`run_all`] holds for all; [`run_shared`] for those whose index outlives the process, so that
//! several collectors may claim it.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::future::Future;

use shared::{IdDigest, JobId};

use super::{Dedup, DedupError, Position, Span};

/// Makes the indexes under test.
pub trait Harness {
    /// The implementation.
    type Dedup: Dedup;

    /// A client of the index of `run`; the first client of a run finds it empty.
    fn client(&self, run: &str) -> impl Future<Output = Self::Dedup>;
}

fn id(name: &str) -> IdDigest {
    JobId(name.to_owned()).digest()
}

fn at(offset: u64, lines: u64) -> Position {
    Position { offset, lines, failed: lines / 2, seal: u64::MAX - offset }
}

/// What every index must do.
pub async fn run_all<H: Harness>(harness: &H) {
    knows_what_was_marked_and_nothing_else(harness).await;
    refuses_a_position_that_it_does_not_stand_at(harness).await;
    forgets_the_ids_it_is_told_to(harness).await;
    tells_which_ids_it_had_already(harness).await;
    takes_a_whole_chunk_of_a_file_at_once(harness).await;
    runs_are_kept_apart(harness).await;
}

/// What an index must do that outlives its clients.
pub async fn run_shared<H: Harness>(harness: &H) {
    later_claim_finds_what_was_marked(harness).await;
    earlier_claim_is_over_and_changes_nothing(harness).await;
}

async fn claimed<H: Harness>(harness: &H, run: &str) -> H::Dedup {
    let mut dedup = harness.client(run).await;
    assert_eq!(dedup.claim().await.unwrap(), None);
    dedup.clear(&at(0, 0)).await.unwrap();
    dedup
}

async fn knows_what_was_marked_and_nothing_else<H: Harness>(harness: &H) {
    let mut dedup = claimed(harness, "knows").await;
    let ids = [id("a"), id("b")];
    assert_eq!(dedup.known(&ids, &at(0, 0)).await.unwrap(), [false, false]);
    let span = Span { from: &at(0, 0), to: &at(10, 1) };
    assert!(dedup.mark(&ids[1..], span).await.unwrap().is_empty());
    assert_eq!(dedup.known(&ids, &at(10, 1)).await.unwrap(), [false, true]);
    assert_eq!(dedup.known(&[], &at(10, 1)).await.unwrap(), [false; 0]);
    assert_eq!(dedup.resume().await.unwrap(), Some(at(10, 1)));
    dedup.clear(&at(0, 0)).await.unwrap();
    assert_eq!(dedup.known(&ids, &at(0, 0)).await.unwrap(), [false, false]);
}

async fn refuses_a_position_that_it_does_not_stand_at<H: Harness>(harness: &H) {
    let mut dedup = claimed(harness, "stands").await;
    let ids = [id("a")];
    dedup.mark(&ids, Span { from: &at(0, 0), to: &at(10, 1) }).await.unwrap();
    let elsewhere = [at(0, 0), at(20, 1), Position { seal: 3, ..at(10, 1) }];
    for wrong in &elsewhere {
        let span = Span { from: wrong, to: &at(30, 2) };
        assert!(matches!(dedup.known(&ids, wrong).await, Err(DedupError::RolledBack)));
        assert!(matches!(dedup.mark(&[id("b")], span).await, Err(DedupError::RolledBack)));
        assert!(matches!(dedup.forget(&ids, span).await, Err(DedupError::RolledBack)));
    }
    let known = dedup.known(&[id("a"), id("b")], &at(10, 1)).await.unwrap();
    assert_eq!(known, [true, false]);
}

async fn forgets_the_ids_it_is_told_to<H: Harness>(harness: &H) {
    let mut dedup = claimed(harness, "forgets").await;
    let ids = [id("a"), id("b"), id("c")];
    dedup.mark(&ids, Span { from: &at(0, 0), to: &at(30, 3) }).await.unwrap();
    dedup.forget(&ids[..2], Span { from: &at(30, 3), to: &at(10, 1) }).await.unwrap();
    assert_eq!(dedup.known(&ids, &at(10, 1)).await.unwrap(), [false, false, true]);
}

async fn tells_which_ids_it_had_already<H: Harness>(harness: &H) {
    let mut dedup = claimed(harness, "had").await;
    dedup.mark(&[id("b")], Span { from: &at(0, 0), to: &at(10, 1) }).await.unwrap();
    let ids = [id("a"), id("b"), id("c"), id("a")];
    let had = dedup.mark(&ids, Span { from: &at(10, 1), to: &at(50, 5) }).await.unwrap();
    assert_eq!(had, [1, 3]);
}

async fn takes_a_whole_chunk_of_a_file_at_once<H: Harness>(harness: &H) {
    let mut dedup = claimed(harness, "chunk").await;
    let ids: Vec<IdDigest> = (0..10_000).map(|n| id(&n.to_string())).collect();
    let full = at(1 << 40, 10_000);
    assert!(dedup.mark(&ids, Span { from: &at(0, 0), to: &full }).await.unwrap().is_empty());
    let known = dedup.known(&ids[9_900..], &full).await.unwrap();
    assert_eq!(known, [true; 100]);
}

async fn runs_are_kept_apart<H: Harness>(harness: &H) {
    let mut first = claimed(harness, "run }:{ one").await;
    let mut second = claimed(harness, "run }:{ two").await;
    let span = Span { from: &at(0, 0), to: &at(10, 1) };
    first.mark(&[id("a")], span).await.unwrap();
    assert_eq!(second.known(&[id("a")], &at(0, 0)).await.unwrap(), [false]);
}

async fn later_claim_finds_what_was_marked<H: Harness>(harness: &H) {
    let mut first = claimed(harness, "later").await;
    first.mark(&[id("a")], Span { from: &at(0, 0), to: &at(10, 1) }).await.unwrap();
    let mut second = harness.client("later").await;
    assert_eq!(second.claim().await.unwrap(), Some(at(10, 1)));
    assert_eq!(second.known(&[id("a")], &at(10, 1)).await.unwrap(), [true]);
}

async fn earlier_claim_is_over_and_changes_nothing<H: Harness>(harness: &H) {
    let mut first = claimed(harness, "earlier").await;
    let mut second = harness.client("earlier").await;
    second.claim().await.unwrap();
    let ids = [id("a")];
    let span = Span { from: &at(0, 0), to: &at(10, 1) };
    assert!(matches!(first.known(&ids, &at(0, 0)).await, Err(DedupError::TakenOver { .. })));
    assert!(matches!(first.mark(&ids, span).await, Err(DedupError::TakenOver { .. })));
    assert!(matches!(first.forget(&ids, span).await, Err(DedupError::TakenOver { .. })));
    assert!(matches!(first.clear(&at(0, 0)).await, Err(DedupError::TakenOver { .. })));
    assert!(matches!(first.resume().await, Err(DedupError::TakenOver { .. })));
    assert_eq!(second.known(&ids, &at(0, 0)).await.unwrap(), [false]);
}
