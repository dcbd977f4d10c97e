//! The file: what its lines look like, what is refused, what a crash leaves and opening repairs.

use std::fs;
use std::path::Path;

use flotilla_collector::{Error, Lock, Output};
use proptest::prelude::*;
use serde_json::Value;
use shared::{GeneratedToken, JobId, Logprobs, Outcome, Settled, TokenLogprob};

use crate::fixture::{answered, failed, lines, open};

#[tokio::test]
async fn lines_have_the_documented_fields_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let mut collector = open(&path).await.unwrap();
    let written = collector.write(&[&answered("a"), &failed("b")]).await.unwrap();
    assert_eq!(written.new, [0, 1]);
    assert_eq!((collector.num_lines(), collector.num_failed()), (2, 1));
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

#[tokio::test]
async fn logprobs_are_the_last_field_of_the_lines_that_have_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let token = |token: &str, token_id, logprob| TokenLogprob {
        token: token.to_owned(),
        token_id,
        logprob,
    };
    let logprobs = Logprobs {
        content: vec![GeneratedToken {
            token: token(" the", 278, -0.5),
            top_logprobs: vec![token(" the", 278, -0.5), token("\n", 13, -1.25)],
        }],
    };
    let mut settled = answered("a");
    if let Outcome::Completed(completed) = &mut settled.outcome {
        completed.logprobs = Some(logprobs);
    }
    open(&path).await.unwrap().write(&[&settled]).await.unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let expected = r#""documents":[],"logprobs":{"content":[{"token":" the","token_id":278,"logprob":-0.5,"top_logprobs":[{"token":" the","token_id":278,"logprob":-0.5},{"token":"\n","token_id":13,"logprob":-1.25}]}]}}"#;
    assert!(text.trim_end().ends_with(expected), "{text}");
}

#[tokio::test]
async fn foreign_files_are_never_changed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious.txt");
    let context = "{\"id\":\"a\",\"success\":true}\n";
    let ours = {
        let path = dir.path().join("ours.jsonl");
        open(&path).await.unwrap().write(&[&answered("a"), &answered("b")]).await.unwrap();
        fs::read_to_string(path).unwrap()
    };
    let mine_then_ours = format!("my notes\n{ours}");
    let notes_then_torn = format!("my notes\n{ours}{{\"id\":\"c");
    let mine_between = ours.replacen('\n', "\nmy notes\n", 1);
    let twice = format!("{ours}{ours}");
    for text in [
        "my notes\n",
        "my notes",
        "{\"id\": 5}\n",
        "\n",
        "[{\"id\":\"a\"}]",
        context,
        &mine_then_ours,
        &notes_then_torn,
        &mine_between,
        &twice,
    ] {
        fs::write(&path, text).unwrap();
        let error = open(&path).await.unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{text:?}: {error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    let null = Output::open(Path::new("/dev/null"), Lock::Refuse).await;
    assert!(matches!(null, Err(Error::NotAFile { .. })));
}

#[tokio::test]
async fn foreign_line_is_named_by_its_number() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    open(&path).await.unwrap().write(&[&answered("a"), &answered("b")]).await.unwrap();
    let ours = fs::read_to_string(&path).unwrap();
    let foreign = [
        (format!("{ours}my notes\n"), 3),
        (format!("{ours}my notes"), 3),
        (format!("{ours}{ours}"), 3),
        (ours.replacen('\n', "\nmy notes\n", 1), 2),
    ];
    for (text, expected) in foreign {
        fs::write(&path, &text).unwrap();
        let error = open(&path).await.unwrap_err();
        assert!(matches!(error, Error::Foreign { line, .. } if line == expected), "{error}");
    }
}

#[tokio::test]
async fn opening_writes_the_end_again_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let mut collector = open(&path).await.unwrap();
    collector.write(&[&answered("a"), &answered("b")]).await.unwrap();
    drop(collector);
    let before = fs::read(&path).unwrap();
    let long_ago = std::time::SystemTime::UNIX_EPOCH;
    fs::File::options().append(true).open(&path).unwrap().set_modified(long_ago).unwrap();
    let mut collector = open(&path).await.unwrap();
    assert_ne!(fs::metadata(&path).unwrap().modified().unwrap(), long_ago);
    assert_eq!(fs::read(&path).unwrap(), before);
    // What is appended goes to the end as ever.
    collector.write(&[&answered("c")]).await.unwrap();
    assert!(fs::read(&path).unwrap().starts_with(&before));
    assert_eq!(lines(&path).len(), 3);
}

#[tokio::test]
async fn torn_tail_is_cut_and_kept_beside_the_output() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let mut collector = open(&path).await.unwrap();
    collector.write(&[&answered("é"), &answered("b")]).await.unwrap();
    drop(collector);
    let whole = fs::read(&path).unwrap();
    for tail in [
        &b"{\"id\":\"c"[..],
        b"\0\0\0\0",
        b"{",
        b"{\"id\":\"\xc3",
        b"{\"id\":\"c\",\"success\":true}",
        b"\0\0\0\0\"documents\":[]}\n",
        b"\0\0\0\0\"documents\":[]}\n\0\0",
    ] {
        fs::write(&path, [&whole[..], tail].concat()).unwrap();
        let collector = open(&path).await.unwrap();
        assert_eq!(collector.answered().len(), 2);
        assert_eq!(fs::read(&path).unwrap(), whole);
        let kept = dir.path().join(format!("results.jsonl.torn-{}", whole.len()));
        assert_eq!(fs::read(kept).unwrap(), tail);
    }
}

#[tokio::test]
async fn line_longer_than_what_is_read_at_once_is_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let mut long = answered("long");
    long.context.context = "word ".repeat(1_000_000);
    let outcomes = [&answered("a"), &long, &answered("b")];
    open(&path).await.unwrap().write(&outcomes).await.unwrap();
    let collector = open(&path).await.unwrap();
    assert_eq!(collector.num_lines(), 3);
    assert!(collector.answered().contains(&JobId("long".into())));
    assert!(collector.answered().contains(&JobId("b".into())));
}

#[tokio::test]
async fn thousands_of_lines_are_counted_when_the_output_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.jsonl");
    let mut collector = open(&path).await.unwrap();
    let outcomes: Vec<Settled> = (0..5_000)
        .map(|n| if n % 10 == 0 { failed(&n.to_string()) } else { answered(&n.to_string()) })
        .collect();
    for batch in outcomes.chunks(128) {
        collector.write(&batch.iter().collect::<Vec<_>>()).await.unwrap();
    }
    drop(collector);
    let collector = open(&path).await.unwrap();
    assert_eq!((collector.num_lines(), collector.num_failed()), (5_000, 500));
    assert_eq!(lines(&path).len(), 5_000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A file cut at any byte opens with exactly the ids of its whole lines, and can be completed.
    #[test]
    fn output_cut_anywhere_is_completed_with_each_id_once(
        names in proptest::collection::hash_set("[a-zé\u{1F600}]{1,6}", 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("results.jsonl");
            let all: Vec<Settled> = names.iter().map(|n| answered(n)).collect();
            let all: Vec<&Settled> = all.iter().collect();
            open(&path).await.unwrap().write(&all).await.unwrap();
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..cut.index(bytes.len() + 1)]).unwrap();
            let mut collector = open(&path).await.unwrap();
            let before = collector.answered().len();
            let written = collector.write(&all).await.unwrap();
            prop_assert_eq!(written.new.len(), all.len() - before);
            prop_assert_eq!(fs::read(&path).unwrap(), bytes);
            Ok(())
        })?;
    }
}
