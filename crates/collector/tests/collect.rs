//! The collector against a real file: every id once, whatever comes twice, tears or is foreign.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use flotilla_collector::{End, Error, Observer, Output, Report};
use proptest::prelude::*;
use serde_json::Value;
use shared::{
    Completed, Context, FinishReason, JobId, MemoryQueue, Outcome, Query, Queue, RunId, Settled,
    WIRE_VERSION,
};
use tokio::sync::watch;

const LEASE: Duration = Duration::from_secs(60);

fn settled(id: &str, outcome: Outcome) -> Settled {
    let query = Query {
        id: JobId(id.to_owned()),
        query: "naïve \u{2028} \"query\"\n".to_owned(),
        target_api: None,
        dependencies: [("numpy".to_owned(), None)].into(),
    };
    Settled {
        version: WIRE_VERSION,
        run: RunId("run".into()),
        context: Context { retrieval_time: 0.25, ..Context::empty(query) },
        model: Some("tiny".into()),
        seed: 7,
        worker_rank: 1,
        attempts: 2,
        inference_time: 1.5,
        outcome,
    }
}

fn answered(id: &str) -> Settled {
    let completed = Completed {
        answer: format!("answer to {id}"),
        finish_reason: FinishReason::Stop,
        prompt_tokens: 10,
        completion_tokens: 4,
        prompt_sha256: "ab".into(),
        context_truncated: false,
    };
    settled(id, Outcome::Completed(completed))
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn ids(path: &Path) -> Vec<String> {
    lines(path).iter().map(|l| l["id"].as_str().unwrap().to_owned()).collect()
}

struct Count(Report);

impl Observer for Count {
    fn written(&mut self, outcomes: &[Settled]) {
        outcomes.iter().for_each(|settled| self.0.add(settled));
    }
}

#[test]
fn lines_have_the_documented_fields_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let mut output = Output::open(&path).unwrap();
    output.append(&[answered("a"), settled("b", Outcome::Failed("too long".into()))]).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let (a, b) = text.split_once('\n').unwrap();
    assert_eq!(
        a,
        r#"{"id":"a","query":"naïve   \"query\"\n","target_api":null,"dependencies":{"numpy":null},"retrieval_method":"none","context":"","context_length":0,"answer":"answer to a","retrieval_time":0.25,"inference_time":1.5,"total_time":1.75,"worker_rank":1,"success":true,"finish_reason":"stop","prompt_tokens":10,"completion_tokens":4,"model":"tiny","attempts":2,"seed":7,"prompt_sha256":"ab","context_truncated":false,"documents":[]}"#
            .replace("naïve   ", "naïve \u{2028} ")
    );
    let b: Value = serde_json::from_str(b).unwrap();
    assert_eq!(b["success"], false);
    assert_eq!(b["error"], "too long");
    assert_eq!(b["answer"], Value::Null);
    assert_eq!(b["finish_reason"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_each_id_once_and_acks_repeats() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    Output::open(&path).unwrap().append(&[answered("old")]).unwrap();
    let mut output = Output::open(&path).unwrap();
    assert!(output.answered().contains(&JobId("old".into())));
    let queue = MemoryQueue::new(1_000, LEASE);
    let (tell, end) = watch::channel(End::Open);
    let publish = async {
        for round in 0..3 {
            for id in ["old", "a", "b", "c"] {
                queue.publish(answered(id)).await.unwrap();
                queue.publish(answered(&format!("{id}-{round}"))).await.unwrap();
            }
        }
        tell.send_replace(End::AtLines(15));
    };
    let mut count = Count(Report::default());
    let (collected, ()) =
        tokio::join!(flotilla_collector::run(&queue, &mut output, end, &mut count), publish);
    collected.unwrap();
    let mut found = ids(&path);
    assert_eq!(found.len(), 16);
    found.sort_unstable();
    found.dedup();
    assert_eq!(found.len(), 16);
    let overall = count.0.overall();
    assert_eq!((overall.answered, overall.failed), (15, 0));
    assert!(queue.pull(1, Duration::from_millis(1)).await.unwrap().is_empty());
}

#[test]
fn second_writer_of_an_output_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let first = Output::open(&path).unwrap();
    assert!(matches!(Output::open(&path), Err(Error::Locked { .. })));
    drop(first);
    Output::open(&path).unwrap();
}

#[test]
fn foreign_files_are_never_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious.txt");
    let context = "{\"id\":\"a\",\"success\":true}\n";
    for text in ["my notes\n", "my notes", "{\"id\": 5}\n", "\n", "[{\"id\":\"a\"}]", context] {
        fs::write(&path, text).unwrap();
        let error = Output::open(&path).unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{text:?}: {error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    assert!(matches!(Output::open(Path::new("/dev/null")), Err(Error::NotAFile { .. })));
}

#[test]
fn torn_tail_is_cut_and_kept_beside_the_output() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let mut output = Output::open(&path).unwrap();
    output.append(&[answered("é"), answered("b")]).unwrap();
    drop(output);
    let whole = fs::read(&path).unwrap();
    for tail in [
        &b"{\"id\":\"c"[..],
        b"\0\0\0\0",
        b"{",
        b"{\"id\":\"\xc3",
        b"{\"id\":\"c\",\"success\":true}",
    ] {
        fs::write(&path, [&whole[..], tail].concat()).unwrap();
        let output = Output::open(&path).unwrap();
        assert_eq!(output.answered().len(), 2);
        assert_eq!(fs::read(&path).unwrap(), whole);
        let kept = dir.path().join(format!("results.jsonl.torn-{}", whole.len()));
        assert_eq!(fs::read(kept).unwrap(), tail);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A file cut at any byte opens with exactly the ids of its whole lines, and can be completed.
    #[test]
    fn output_cut_anywhere_is_completed_with_each_id_once(
        names in proptest::collection::hash_set("[a-zé\u{1F600}]{1,6}", 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        let all: Vec<Settled> = names.iter().map(|n| answered(n)).collect();
        Output::open(&path).unwrap().append(&all).unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..cut.index(bytes.len() + 1)]).unwrap();
        let mut output = Output::open(&path).unwrap();
        let rest: Vec<Settled> =
            all.into_iter().filter(|s| !output.answered().contains(&s.context.id)).collect();
        output.append(&rest).unwrap();
        prop_assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}
