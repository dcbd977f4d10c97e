//! Files of queries and contexts: every shape, every way to be bad.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver};

use flotilla_producer::{BadInput, Known, MAX_ASKED, SourceConfig, contexts};
use shared::{Context, JobId, RetrievalMethod};
use tokio::sync::oneshot;

type Item = Result<Context, BadInput>;

struct Source {
    _dir: tempfile::TempDir,
    config: SourceConfig,
}

impl Source {
    fn queries(bytes: impl AsRef<[u8]>) -> Self {
        Self::new(bytes.as_ref(), |file| SourceConfig {
            queries_file: Some(file),
            ..SourceConfig::default()
        })
    }

    fn contexts(bytes: impl AsRef<[u8]>) -> Self {
        Self::new(bytes.as_ref(), |file| SourceConfig {
            contexts_file: Some(file),
            ..SourceConfig::default()
        })
    }

    fn new(bytes: &[u8], config: impl FnOnce(PathBuf) -> SourceConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("queries.jsonl");
        fs::write(&file, bytes).unwrap();
        Self { _dir: dir, config: config(file) }
    }

    fn read(&self) -> Vec<Item> {
        contexts(&self.config, None).unwrap().collect()
    }

    fn good(&self) -> Vec<Context> {
        self.read().into_iter().map(Result::unwrap).collect()
    }

    /// The ids of good queries; of bad ones, the line and the id.
    fn outline(&self) -> Vec<String> {
        let outline = |item: Item| match item {
            Ok(context) => context.id.0,
            Err(bad) => match bad.id {
                Some(id) => format!("{}! {id}", bad.line),
                None => format!("{}!", bad.line),
            },
        };
        self.read().into_iter().map(outline).collect()
    }

    fn only_error(&self) -> BadInput {
        let mut items = self.read();
        assert_eq!(items.len(), 1, "{items:?}");
        items.remove(0).unwrap_err()
    }
}

fn good_line(id: &str) -> String {
    format!("{{\"id\": \"{id}\", \"query\": \"what?\"}}")
}

#[test]
fn the_documented_query_is_read_field_by_field() {
    let text = r#"{
        "id": "sample_1",
        "query": "How to sort array indices?",
        "target_api": "numpy.argsort",
        "target_dependency": {"numpy": "1.16.6"}
    }"#;
    let context = &Source::queries(format!("[{text}]")).good()[0];
    assert_eq!(context.id.0, "sample_1");
    assert_eq!(context.query, "How to sort array indices?");
    assert_eq!(context.target_api.as_deref(), Some("numpy.argsort"));
    assert_eq!(context.dependencies["numpy"].as_deref(), Some("1.16.6"));
    assert_eq!(context.retrieval_method, RetrievalMethod::None);
    assert!(context.success && context.context.is_empty());
}

#[test]
fn nested_queries_become_one_each_with_the_number_in_the_id() {
    let text = r#"{"id": "n", "description": "d", "target_dependency": {"a": "1"},
        "queries": [{"query": "q0", "target_api": "a.x"}, {"query": "q1"}, {"query": ""}, 7]}"#;
    let items = Source::queries(format!("[{text}]")).read();
    let (first, second) = (items[0].as_ref().unwrap(), items[1].as_ref().unwrap());
    assert_eq!((first.id.0.as_str(), first.query.as_str()), ("n#0", "q0"));
    assert_eq!(first.target_api.as_deref(), Some("a.x"));
    assert_eq!((second.id.0.as_str(), second.query.as_str()), ("n#1", "q1"));
    assert_eq!(second.dependencies["a"].as_deref(), Some("1"));
    let third = items[2].as_ref().unwrap_err();
    assert_eq!(third.id, Some(JobId("n#2".into())));
    assert!(third.reason.contains("entry 2 of `queries`"), "{third}");
    let fourth = items[3].as_ref().unwrap_err();
    assert!(fourth.reason.contains("expected an object, given a number"), "{fourth}");
}

#[test]
fn the_legacy_shape_asks_its_description() {
    let text = r#"{"id": "l", "description": "sort it", "dependency": "numpy==1.16.6"}"#;
    let context = &Source::queries(text).good()[0];
    assert_eq!(context.query, "sort it");
    assert_eq!(context.dependencies["numpy"].as_deref(), Some("1.16.6"));
}

#[test]
fn dependencies_are_read_in_every_way_to_write_them() {
    let cases = [
        (r#"{"a": "1.2", "b": null, "c": "", "d": 1.20}"#, "a=1.2 b c d=1.20"),
        (r#""a==1.2""#, "a=1.2"),
        (r#""a""#, "a"),
        (r#"["a==1.2", "b", "c[x]==3", "d>=2"]"#, "a=1.2 b c=3 d=>=2"),
        (r#"{"a": "==1.2"}"#, "a=1.2"),
        ("null", ""),
        ("{}", ""),
        (r#""""#, ""),
    ];
    for (dependencies, expected) in cases {
        for field in ["target_dependency", "dependencies", "dependency"] {
            let text = format!(r#"{{"id": "x", "query": "q", "{field}": {dependencies}}}"#);
            let context = &Source::queries(text).good()[0];
            let read: Vec<String> = context
                .dependencies
                .iter()
                .map(|(package, version)| match version {
                    Some(version) => format!("{package}={version}"),
                    None => package.clone(),
                })
                .collect();
            assert_eq!(read.join(" "), expected, "{dependencies}");
        }
    }
}

#[test]
fn bad_dependencies_name_the_field_and_keep_the_id() {
    for dependencies in
        ["7", "true", r#"{"a": [1]}"#, "[1]", r#"{"a": "1", "a": "2"}"#, r#"["==1"]"#]
    {
        let text = format!(r#"{{"id": "x", "query": "q", "target_dependency": {dependencies}}}"#);
        let bad = Source::queries(text).only_error();
        assert_eq!(bad.id, Some(JobId("x".into())));
        assert_eq!(bad.query.as_deref(), Some("q"));
        assert!(bad.reason.contains("`target_dependency`"), "{bad}");
    }
}

#[test]
fn marks_blank_lines_line_ends_and_a_missing_last_one_are_no_matter() {
    let text = format!(
        "\u{feff}\n  {}\r\n\r\n{}\n \t\n{}",
        good_line("a"),
        good_line("b"),
        good_line("c")
    );
    assert_eq!(Source::queries(text).outline(), ["a", "b", "c"]);
    let array = format!("\u{feff} \n[\r\n{},\r\n{}]", good_line("a"), good_line("b"));
    assert_eq!(Source::queries(array).outline(), ["a", "b"]);
    assert!(Source::queries("").outline().is_empty());
    assert!(Source::queries("\u{feff}\n \n").outline().is_empty());
}

#[test]
fn each_bad_line_is_reported_where_it_stands_and_stops_nothing() {
    let mut text = Vec::new();
    let bad_lines: [&[u8]; 12] = [
        b"{\"id\": \"m\", \"query\": }",
        b"hello",
        b"[1, 2]",
        b"{\"id\": \"u\", \"query\": \"\xff\"}",
        b"{\"id\": \"s\", \"query\": \"\\ud800\"}",
        b"{\"id\": \"z\", \"query\": \"a\x00b\"}",
        b"{\"id\": \"d\", \"query\": \"a\", \"query\": \"b\"}",
        b"{\"id\": \"\", \"query\": \"q\"}",
        b"{\"query\": \"q\"}",
        b"{\"id\": [1], \"query\": \"q\"}",
        b"{\"id\": \"e\", \"query\": \" \"}",
        b"{\"id\": \"i\", \"id\": \"j\", \"query\": \"q\"}",
    ];
    for (k, line) in bad_lines.iter().enumerate() {
        text.extend_from_slice(good_line(&format!("g{k}")).as_bytes());
        text.push(b'\n');
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    text.extend_from_slice(good_line("last").as_bytes());
    let outline = Source::queries(&text).outline();
    let expected = [
        "g0", "2!", "g1", "4!", "g2", "6!", "g3", "8! u", "g4", "10! s", "g5", "12!", "g6",
        "14! d", "g7", "16!", "g8", "18!", "g9", "20!", "g10", "22! e", "g11", "24!", "last",
    ];
    assert_eq!(outline, expected);
}

#[test]
fn reasons_say_what_was_expected_and_what_was_given() {
    let cases = [
        (r#"{"id": "x"}"#, "expected text in `query`, given none"),
        (r#"{"id": "x", "query": 7}"#, "expected a text in `query`, given a number"),
        (r#"{"id": "x", "query": null}"#, "expected text in `query`, given none"),
        (r#"{"id": "x", "query": ""}"#, "expected text in `query`, given an empty one"),
        (r#"{"id": "x", "query": "q", "target_api": 3}"#, "expected a text in `target_api`"),
        (r#"{"id": "x", "query": "q", "query": "q"}"#, "given `query` twice"),
        (r#"{"id": "x", "queries": {}}"#, "expected a list in `queries`, given an object"),
        (r#"{"id": "x", "queries": []}"#, "expected queries in `queries`, given none"),
        (r#"{"id": "x", "query": "q", "queries": []}"#, "given both"),
        (r#"{"id": true, "query": "q"}"#, "expected a text or a number in `id`"),
        (r#"{"id": null, "query": "q"}"#, "expected a text or a number in `id`, given null"),
        (r#"{"query": "q"}"#, "expected an `id`, given none"),
        (r#"{"id": "x", "query": "\ud800"}"#, "field `query`: malformed JSON"),
        ("7", "expected an object, given a number"),
        ("not json at all", "malformed JSON at column 2"),
        (r#"{"id": "x" "query": "q"}"#, "malformed JSON at column 12"),
    ];
    for (text, reason) in cases {
        let bad = Source::queries(text).only_error();
        assert!(bad.reason.contains(reason), "{text}: {bad}");
        let shown = bad.to_string();
        assert!(shown.contains("queries.jsonl:1: "), "{shown}");
        assert!(!bad.reason.contains(" at line "), "{bad}");
    }
}

#[test]
fn ids_are_any_text_and_numbers_their_own() {
    let text = "{\"id\": 17, \"query\": \"q\"}\n{\"id\": 1.50, \"query\": \"q\"}\n\
                {\"id\": \"a.*>b c\\n\\u0000\", \"query\": \"q\\u0000\"}\n";
    assert_eq!(Source::queries(text).outline(), ["17", "1.50", "a.*>b c\n\0"]);
    let longest = "i".repeat(1024);
    assert_eq!(Source::queries(good_line(&longest)).outline(), [longest]);
    let bad = Source::queries(good_line(&"i".repeat(1025))).only_error();
    assert!(bad.reason.contains("at most 1024 bytes"), "{bad}");
    assert_eq!(bad.id, None);
}

#[test]
fn depth_overflows_no_stack() {
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let lines = [
        format!("{{\"id\": \"ignored\", \"query\": \"q\", \"extra\": {deep}}}"),
        format!("{{\"id\": \"d\", \"query\": {deep}}}"),
        format!("{{\"id\": \"p\", \"query\": \"q\", \"dependencies\": {{\"a\": {deep}}}}}"),
        format!("{{\"id\": \"n\", \"queries\": {deep}}}"),
        deep,
        good_line("g"),
    ];
    let outline = ["ignored", "2! d", "3! p", "4! n#0", "5!", "g"];
    assert_eq!(Source::queries(lines.join("\n")).outline(), outline);
    let array = Source::queries(format!("[{}]", lines.join(",\n")));
    assert_eq!(array.outline(), outline);
}

#[test]
fn a_line_of_a_hundred_megabytes_is_passed_over() {
    let mut text = format!("{}\n{{\"id\": \"long\", \"query\": \"", good_line("a")).into_bytes();
    text.resize(100 << 20, b'x');
    text.extend_from_slice(format!("\"}}\n{}\n", good_line("b")).as_bytes());
    assert_eq!(Source::queries(&text).outline(), ["a", "2!", "b"]);
    let comma = text.iter().position(|&byte| byte == b'\n').unwrap();
    text[comma] = b',';
    let end = text.len() - good_line("b").len() - 2;
    text[end] = b',';
    text.insert(0, b'[');
    text.push(b']');
    assert_eq!(Source::queries(&text).outline(), ["a", "1!", "b"]);
}

#[test]
fn objects_spread_over_lines_without_an_array_are_one_clear_report_each() {
    let text = format!(
        "{{\n  \"id\": \"a\",\n  \"query\": \"q\"\n}}\n{{\n  \"id\": \"b\"\n}}\n{}\noops\n",
        good_line("c")
    );
    let source = Source::queries(text);
    assert_eq!(source.outline(), ["1!", "5!", "c", "9!"]);
    let reason = source.read().remove(0).unwrap_err().reason;
    assert!(reason.contains("spread over several lines"), "{reason}");
}

#[test]
fn a_bad_element_of_an_array_is_reported_and_the_next_ones_come() {
    let text = format!(
        "[\n  {},\n  {{\"id\": \"b\" \"query\": \"q\"}},\n  {{\"id\": \"c\", \"query\": \"q}},\n  {}\n] tail",
        good_line("a"),
        good_line("d")
    );
    assert_eq!(Source::queries(text).outline(), ["a", "3!", "4!", "d", "6!"]);
}

#[test]
fn start_and_number_count_entries_of_the_file() {
    let nested = r#"{"id": "n", "queries": [{"query": "x"}, {"query": "y"}]}"#;
    let text = ["", &good_line("a"), "bad", nested, &good_line("b"), &good_line("c")].join("\n");
    let outline = |start_index, max_samples| {
        let mut source = Source::queries(&text);
        source.config.start_index = start_index;
        source.config.max_samples = max_samples;
        source.outline()
    };
    assert_eq!(outline(0, None), ["a", "3!", "n#0", "n#1", "b", "c"]);
    assert_eq!(outline(1, Some(2)), ["3!", "n#0", "n#1"]);
    assert_eq!(outline(2, Some(1)), ["n#0", "n#1"]);
    assert_eq!(outline(4, Some(9)), ["c"]);
    assert!(outline(0, Some(0)).is_empty());
    assert!(outline(9, None).is_empty());
}

/// Says yes to some ids; all that it was asked are in the other end.
fn knowing(known: &[&'static str]) -> (impl Known + use<>, Receiver<String>) {
    let known: HashSet<&str> = known.iter().copied().collect();
    let (asked, ids) = mpsc::channel();
    let knows = move |id: &JobId| {
        asked.send(id.0.clone()).unwrap();
        known.contains(id.0.as_str())
    };
    (knows, ids)
}

#[test]
fn known_ids_are_asked_about_once_in_order_and_do_not_come() {
    let text = format!(
        "{}\nnameless\n{{\"id\": \"bad\"}}\n{}\n{}\n{}\n",
        good_line("a"),
        good_line("b"),
        good_line("c"),
        good_line("a"),
    );
    let source = Source::queries(text);
    let (known, asked) = knowing(&["a", "bad", "c"]);
    let items: Vec<Item> = contexts(&source.config, None).unwrap().leaving_out(known).collect();
    assert_eq!(items.len(), 2);
    assert_eq!(items[0].as_ref().unwrap_err().line, 2);
    assert_eq!(items[1].as_ref().unwrap().id.0, "b");
    assert_eq!(asked.iter().collect::<Vec<_>>(), ["a", "bad", "b", "c"]);
}

/// Answers when it is told to, or never.
struct Slow {
    asked: mpsc::Sender<(usize, oneshot::Sender<Vec<bool>>)>,
}

impl Known for Slow {
    fn ask(&mut self, ids: &[&JobId]) -> oneshot::Receiver<Vec<bool>> {
        let (reply, answer) = oneshot::channel();
        self.asked.send((ids.len(), reply)).unwrap();
        answer
    }
}

#[test]
fn questions_go_out_before_the_first_is_answered_and_those_without_an_answer_leave_nothing_out() {
    // One record of more queries than fit into a question.
    let nested: Vec<String> = (0..2_500).map(|k| format!("{{\"query\": \"{k}\"}}")).collect();
    let nested = format!("{{\"id\": \"n\", \"queries\": [{}]}}\n", nested.join(","));
    let lines: String = (0..5_000).map(|k| good_line(&k.to_string()) + "\n").collect();
    let source = Source::queries(nested + &lines);
    let (asked, questions) = mpsc::channel();
    let reading = std::thread::spawn(move || {
        let contexts = contexts(&source.config, None).unwrap().leaving_out(Slow { asked });
        contexts.map(|item| item.unwrap().id.0).collect::<Vec<_>>()
    });
    let first: Vec<_> = questions.iter().take(4).collect();
    assert!(questions.try_recv().is_err(), "asked on and on without an answer");
    assert!(first.iter().all(|(count, _)| *count == MAX_ASKED));
    // Known, too short an answer, none at all: in turn.
    let mut num_left_out = 0;
    for (number, (count, reply)) in first.into_iter().chain(questions).enumerate() {
        let num_answers = [count, 24, 0][number % 3];
        num_left_out += num_answers;
        if num_answers > 0 {
            reply.send(vec![true; num_answers]).unwrap();
        }
    }
    let ids = reading.join().unwrap();
    assert_eq!(ids.len(), 7_500 - num_left_out);
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len());
}

#[test]
fn reading_stays_some_questions_ahead_of_what_is_taken() {
    let text: String = (0..10_000).map(|k| good_line(&k.to_string()) + "\n").collect();
    let source = Source::queries(text);
    let (known, asked) = knowing(&[]);
    let mut items = contexts(&source.config, None).unwrap().leaving_out(known);
    assert!(items.next().is_some());
    drop(items);
    assert!(asked.iter().count() <= 4 * MAX_ASKED);
}

#[test]
fn context_lines_come_back_as_they_were_written() {
    let query = Source::queries(
        r#"{"id": "a", "query": "q", "target_api": "t", "dependencies": {"p": null}}"#,
    );
    let mut written = query.good().remove(0);
    written.retrieval_method = RetrievalMethod::RagFallback;
    written.context = "é\n\nlong".to_owned();
    written.context_length = 7;
    written.retrieval_time = 0.25;
    written.documents = vec![shared::DocumentRef { path: "p.x".to_owned(), score: 1.5 }];
    let failed = Context::failed(JobId("f".into()), String::new(), "no luck".into());
    let lines = [&written, &failed].map(|context| serde_json::to_string(context).unwrap());
    assert_eq!(Source::contexts(lines.join("\n")).good(), [written, failed]);
}

#[test]
fn lines_of_the_older_scripts_are_contexts() {
    let line = r#"{"id": "sample_1", "query": "How to sort array indices?",
        "target_api": "numpy.argsort", "dependencies": {"numpy": "1.16.6"},
        "retrieval_method": "exact_api_match", "context": "numpy.argsort documentation...",
        "context_length": 1534, "retrieval_time": 0.15, "success": true}"#
        .replace('\n', " ");
    let context = &Source::contexts(line).good()[0];
    assert_eq!(context.retrieval_method, RetrievalMethod::ExactApiMatch);
    assert_eq!(context.context_length, "numpy.argsort documentation...".len());
    assert!(context.documents.is_empty());
}

#[test]
fn bad_context_lines_are_reported() {
    let cases = [
        (r#"{"id": "x", "query": "q", "context": "c", "retrieval_method": "magic"}"#, "`magic`"),
        (r#"{"id": "x", "query": "q"}"#, "expected text in `context`"),
        (
            r#"{"id": "x", "query": "q", "context": "c", "success": "yes"}"#,
            "expected true or false in `success`",
        ),
        (r#"{"id": "x", "query": "q", "context": "c", "documents": [1]}"#, "field `documents`"),
        (r#"{"id": "x", "context": "c"}"#, "expected text in `query`"),
    ];
    for (text, reason) in cases {
        let bad = Source::contexts(text).only_error();
        assert!(bad.reason.contains(reason), "{text}: {bad}");
        assert_eq!(bad.id, Some(JobId("x".into())));
    }
}

#[test]
fn exactly_one_file_is_expected() {
    let error = |config: &SourceConfig| match contexts(config, None) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    let mut config = SourceConfig::default();
    assert!(error(&config).contains("given neither"));
    config.queries_file = Some("missing.jsonl".into());
    assert_eq!(error(&config), "cannot read the input missing.jsonl");
    config.contexts_file = config.queries_file.clone();
    assert!(error(&config).contains("given both"));
}

#[test]
fn an_id_that_comes_twice_is_left_out_if_the_query_is_the_same_and_reported_if_not() {
    let text = format!(
        "{}\n{}\n{{\"id\": \"a\", \"query\": \"another\"}}\n{}\n",
        good_line("a"),
        good_line("a"),
        good_line("b")
    );
    assert_eq!(Source::queries(text).outline(), ["a", "3!", "b"]);
}

#[test]
fn queries_are_counted_without_looking_anything_up() {
    let nested = r#"{"id": "n", "queries": [{"query": "x"}, {"query": "y"}]}"#;
    let text = [&good_line("a"), nested, "bad", &good_line("b")].join("\n");
    let mut source = Source::queries(&text);
    assert_eq!(flotilla_producer::count(&source.config).unwrap(), 5);
    source.config.start_index = 1;
    source.config.max_samples = Some(2);
    assert_eq!(flotilla_producer::count(&source.config).unwrap(), 3);
}
