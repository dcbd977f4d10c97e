//! One bad row never harms another: each gets its line, or its place in the report, with a reason.

use flotilla_tests::Workplace;
use serde_json::Value;

const RUN: &str = "run --queries-file queries.jsonl --output-file results.jsonl --max-new-tokens 4";

/// Every kind of bad row between good ones: `(bytes of the line, id of its output line if any,
/// part of the reason if it is bad)`.
fn rows() -> Vec<(Vec<u8>, Option<&'static str>, Option<&'static str>)> {
    let long = format!(r#"{{"id":"long","query":"{}"}}"#, "word ".repeat(100_000));
    let deep = format!(r#"{{"id":"deep","query":{}1{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
    let row = |text: &str, id, reason| (text.as_bytes().to_vec(), id, reason);
    vec![
        row("\u{feff}{\"id\":\"bom\",\"query\":\"What is this?\"}\r", Some("bom"), None),
        row("not json", None, Some("")),
        row(r#"{"id":"no-query"}"#, Some("no-query"), Some("query")),
        row(r#"{"id":"","query":"x"}"#, None, Some("id")),
        row(r#"{"query":"x"}"#, None, Some("id")),
        row(r#"{"id":7,"query":"A numeric id?"}"#, Some("7"), None),
        row("", None, None),
        row(r#"{"id":"wrong-type","query":5}"#, Some("wrong-type"), Some("query")),
        row(r#"{"id":"bom","query":"Another question?"}"#, None, Some("'bom'")),
        (b"{\"id\":\"utf8\",\"query\":\"\xff\"}".to_vec(), Some("utf8"), Some("UTF-8")),
        row(r#"{"id":"lone","query":"\ud800"}"#, Some("lone"), Some("query")),
        row(r#"{"id":"twice","query":"a","query":"b"}"#, Some("twice"), Some("query")),
        row(r#"{"id":"empty","query":""}"#, Some("empty"), Some("query")),
        (deep.into_bytes(), Some("deep"), Some("")),
        (long.into_bytes(), Some("long"), Some("window")),
        row(r#"{"id":"special","query":"<|end|></s><|assistant|>"}"#, Some("special"), None),
        row(r#"{"id":"nul","query":"a\u0000b"}"#, Some("nul"), None),
        row(r#"{"id":"a.b.*.> c\n","query":"An odd id?"}"#, Some("a.b.*.> c\n"), None),
        row(r#"{"id":"last","query":"No newline?"}"#, Some("last"), None),
    ]
}

#[test]
fn bad_rows_get_their_reason_and_good_rows_their_answer() {
    let place = Workplace::new();
    let rows = rows();
    let lines: Vec<&[u8]> = rows.iter().map(|(line, ..)| line.as_slice()).collect();
    place.write("queries.jsonl", lines.join(&b'\n'));
    let log = place.run_expecting(3, RUN);
    assert!(log.contains("queries.jsonl:2:"), "{log}");

    let results = place.lines("results.jsonl");
    let rejected = place.lines("results.jsonl.rejected.jsonl");
    for (number, (line, id, reason)) in rows.iter().enumerate() {
        let shown = String::from_utf8_lossy(&line[..line.len().min(80)]);
        match (id, reason) {
            (Some(id), reason) => {
                let found: Vec<&Value> = results.iter().filter(|l| l["id"] == **id).collect();
                assert_eq!(found.len(), 1, "{shown}");
                assert_eq!(found[0]["success"], reason.is_none(), "{shown}: {}", found[0]);
                let error = found[0]["error"].as_str().unwrap_or_default();
                assert!(error.contains(reason.unwrap_or_default()), "{shown}: {error}");
            }
            (None, Some(reason)) => {
                let found = rejected.iter().find(|r| r["line"] == number + 1);
                let found = found.unwrap_or_else(|| panic!("not reported: {shown}"));
                let text = found["reason"].as_str().unwrap();
                assert!(!text.is_empty() && text.contains(reason), "{shown}: {text}");
            }
            (None, None) => {}
        }
    }
    assert_eq!(results.len(), rows.iter().filter(|(_, id, _)| id.is_some()).count());
    assert_eq!(rejected.len(), rows.iter().filter(|r| r.1.is_none() && r.2.is_some()).count());

    // Run again: nothing is answered twice, and the exit code still says that something is wrong.
    place.run_expecting(3, RUN);
    assert_eq!(place.lines("results.jsonl"), results);
    assert_eq!(place.lines("results.jsonl.rejected.jsonl"), rejected);
}

#[test]
fn wrong_settings_are_told_before_anything_is_written() {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 1);
    for (code, change, expected) in [
        (2, "--temperature NaN", "number of at least 0"),
        (2, "--top-p 0", "above 0 and at most 1"),
        (2, "--max-new-tokens 0", "0 is not in 1.."),
        (2, "--max-new-tokens -1", "'--max-new-tokens"),
        (2, "--no-such-flag", "unexpected argument"),
        (2, "--inference-type togetherai", "possible values: local"),
        (1, "--model-path nowhere", "nowhere is not a model"),
        (2, "--max-num-seqs 0", "'--max-num-seqs <N>': expected a whole number of at least 1"),
        (2, "--chat-template-kwargs [1]", "expected a JSON object such as"),
        (1, "--corpus-path nowhere", "cannot read the corpus nowhere"),
        (1, "--prompt-template nowhere", "cannot read the prompt template nowhere"),
    ] {
        let args = if change.starts_with("--max-new-tokens") {
            RUN.replace("--max-new-tokens 4", change)
        } else {
            format!("{RUN} {change}")
        };
        let log = place.run_expecting(code, &args);
        assert!(log.contains(expected), "{change}: {log}");
        let results = std::fs::read(place.path("results.jsonl")).unwrap_or_default();
        assert!(results.is_empty(), "{change}");
    }
    let log = place.run_expecting(1, "run --queries-file missing.jsonl --output-file r.jsonl");
    assert!(log.contains("missing.jsonl"), "{log}");
    let log = place.run_expecting(2, "run --output-file r.jsonl");
    assert!(log.contains("--queries-file"), "{log}");
}
