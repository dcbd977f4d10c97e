//! Retrieval on small corpora whose right answers are known.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::sync::Arc;

use flotilla_producer::{CorpusType, RetrievalConfig, Retriever, SourceConfig, contexts};
use serde_json::json;
use shared::{Context, JobId, RetrievalMethod};

mod budget;
mod cache;
mod fixture;

use fixture::{Corpus, NUMPY, numpy_and_pandas, paths, query};

#[test]
fn an_exact_name_or_alias_gives_that_document_alone() {
    let corpus = numpy_and_pandas();
    let retriever = corpus.open();
    for name in ["numpy.argsort", "np.argsort", " `np.argsort()` "] {
        let context = retriever.retrieve(query("How?", Some(name), NUMPY));
        assert_eq!(context.retrieval_method, RetrievalMethod::ExactApiMatch);
        assert_eq!(paths(&context), ["numpy.argsort"]);
        assert_eq!(context.context, "## numpy.argsort\nIndices that would sort an array.");
        assert_eq!(context.context_length, context.context.chars().count());
        assert_eq!(context.documents[0].score, 1.0);
        assert_eq!(context.target_api.as_deref(), Some(name));
        assert!(context.success);
    }
}

#[test]
fn the_named_version_is_searched_and_no_other() {
    let corpus = numpy_and_pandas();
    let retriever = corpus.open();
    let text = |version, name| {
        let named = query("zzz", Some(name), &[("NumPy", version)]);
        retriever.retrieve(named).context
    };
    assert!(text(Some("1.9"), "numpy.argsort").contains("Old"));
    assert!(text(Some("1.16.6"), "numpy.argsort").contains("would"));
    // No version, or one that isn't there: the newest that has it.
    assert!(text(None, "numpy.argsort").contains("would"));
    assert!(text(Some("7.0"), "numpy.argsort").contains("would"));
    assert!(text(None, "numpy.rank").contains("dimensions"));
    let absent = retriever.retrieve(query("zzz", Some("numpy.rank"), NUMPY));
    assert_ne!(absent.retrieval_method, RetrievalMethod::ExactApiMatch);
}

#[test]
fn without_dependencies_the_whole_corpus_is_searched_and_a_path_beats_an_alias() {
    let corpus = numpy_and_pandas();
    let retriever = corpus.open();
    let context = retriever.retrieve(query("zzz", Some("numpy.argsort"), &[]));
    assert!(context.context.contains("would"), "{}", context.context);
    assert_eq!(paths(&context), ["numpy.argsort"]);
    // An alias of a document in each of two packages.
    let context = retriever.retrieve(query("zzz", Some("np.sort"), &[]));
    assert_eq!(paths(&context), ["numpy.sort", "pandas.argsort_like"]);
    let context = retriever.retrieve(query("zzz", Some("np.sort"), &[("pandas", None)]));
    assert_eq!(paths(&context), ["pandas.argsort_like"]);
}

#[test]
fn packages_that_are_not_in_the_corpus_leave_exact_names_alone() {
    let corpus = numpy_and_pandas();
    let retriever = corpus.open();
    let unknown = &[("torch", Some("2.0"))];
    let context = retriever.retrieve(query("sort an array", None, unknown));
    assert_eq!(context.retrieval_method, RetrievalMethod::None);
    assert!(context.success && context.context.is_empty());
    let context = retriever.retrieve(query("zzz", Some("numpy.sort"), unknown));
    assert_eq!(context.retrieval_method, RetrievalMethod::ExactApiMatch);
}

#[test]
fn string_match_takes_names_that_contain_the_target_the_shortest_first() {
    let mut corpus = numpy_and_pandas();
    let names = |corpus: &Corpus, target, dependencies| {
        let context = corpus.open().retrieve(query("zzz", Some(target), dependencies));
        let paths = paths(&context).join(" ");
        (context.retrieval_method, paths)
    };
    let none = (RetrievalMethod::None, String::new());
    assert_eq!(names(&corpus, "gsor", NUMPY), none);
    corpus.config.enable_str_match = true;
    let found = |paths: &str| (RetrievalMethod::RagStringMatch, paths.to_owned());
    assert_eq!(names(&corpus, "gsor", NUMPY), found("numpy.argsort numpy.ma.argsort"));
    assert_eq!(names(&corpus, "ARGSORT", &[("numpy", Some("1.9"))]), found("numpy.argsort"));
    // By its last part, where the whole finds nothing; one document of each path.
    assert_eq!(
        names(&corpus, "x.argsort", &[]),
        found("numpy.argsort numpy.ma.argsort pandas.argsort_like")
    );
    // An alias; a name that would run over from one into the next; too short a part.
    assert_eq!(names(&corpus, "das.ord", &[]), found("pandas.argsort_like"));
    assert_eq!(names(&corpus, "argsortnp", &[]), none);
    assert_eq!(names(&corpus, "so", &[]), none);
    corpus.config.max_documents = 1;
    assert_eq!(names(&corpus, "argsort", NUMPY), found("numpy.argsort"));
}

#[test]
fn questions_find_documents_by_their_words_in_what_they_name() {
    let corpus = numpy_and_pandas();
    let retriever = corpus.open();
    let found = |text, dependencies| {
        let context = retriever.retrieve(query(text, None, dependencies));
        assert_eq!(context.retrieval_method, RetrievalMethod::RagFallback);
        let scores: Vec<f32> = context.documents.iter().map(|d| d.score).collect();
        assert!(scores.is_sorted_by(|a, b| a >= b) && scores.iter().all(|&s| s > 0.0));
        paths(&context).join(" ")
    };
    assert_eq!(
        found("What does numpy.argsort do?", NUMPY).split(' ').next(),
        Some("numpy.argsort")
    );
    assert_eq!(found("Joining of two tables?", &[]), "pandas.merge");
    assert_eq!(found("sorted copies", NUMPY), "numpy.sort");
    assert_eq!(found("dimensions", &[("numpy", Some("1.9"))]), "numpy.rank");
    // Two versions of a package, none named: one document of each path, the newest.
    assert_eq!(found("argsort", &[]).matches("numpy.argsort").count(), 1);
    let context = retriever.retrieve(query("masked dimensions", None, &[("numpy", None)]));
    assert_eq!(paths(&context).len(), 2);
    let context = retriever.retrieve(query("old", None, &[("numpy", None)]));
    assert_eq!(context.retrieval_method, RetrievalMethod::None);
}

#[test]
fn target_that_is_nowhere_joins_the_question() {
    let corpus = numpy_and_pandas();
    let context = corpus.open().retrieve(query("zzz", Some("old.merge"), &[]));
    assert_eq!(context.retrieval_method, RetrievalMethod::RagFallback);
    assert_eq!(paths(&context), ["pandas.merge"]);
}

#[test]
fn questions_are_never_query_syntax() {
    let corpus = numpy_and_pandas();
    let retriever = corpus.open();
    for text in
        ["names:merge", "+merge -merge", "\"merge", "merge~2 AND (", "[merge TO", "merge^9*"]
    {
        let context = retriever.retrieve(query(text, None, &[]));
        assert!(context.success, "{:?}", context.error);
        assert_eq!(paths(&context), ["pandas.merge"], "{text}");
    }
    for text in ["*", "?!", "\0", "zzz"] {
        let context = retriever.retrieve(query(text, None, &[]));
        assert_eq!(context.retrieval_method, RetrievalMethod::None, "{text}");
        assert!(context.success);
    }
    let long = "merge sort ".repeat(200_000);
    assert!(retriever.retrieve(query(&long, None, &[])).success);
}

#[test]
fn equal_scores_are_put_in_the_order_of_paths() {
    let documents: Vec<String> = (0..30).map(|k| format!("z.f{:02}", (k * 7) % 30)).collect();
    let documents: Vec<(&str, &[&str], &str)> =
        documents.iter().map(|path| (path.as_str(), &[][..], "The same words.")).collect();
    let corpus = Corpus::new().release("z/1", &documents);
    let context = corpus.open().retrieve(query("same words", None, &[]));
    let expected: Vec<String> = (0..10).map(|k| format!("z.f{k:02}")).collect();
    assert_eq!(paths(&context), expected);
}

#[test]
fn bad_lines_of_a_corpus_are_passed_over() {
    let corpus = Corpus::new().release("a/1", &[("a.x", &[], "Good.")]);
    let good = fs::read(corpus.file("a/1")).unwrap();
    let mut text = b"\xef\xbb\xbf".to_vec();
    for line in [
        &good[..],
        b"{",
        b"",
        b"\xff",
        b"{\"path\": 1}",
        b"{\"path\": \"a.y\", \"doc\": \"Also.\"}",
    ] {
        text.extend_from_slice(line);
        text.extend_from_slice(b"\r\n");
    }
    fs::write(corpus.file("a/1"), text).unwrap();
    assert_eq!(corpus.open().num_documents(), 2);
}

#[test]
fn resumed_runs_look_up_only_what_is_left() {
    let corpus = numpy_and_pandas();
    let file = corpus.dir.path().join("queries.jsonl");
    let lines: Vec<String> = (0..300)
        .map(|k| json!({"id": k, "query": "sort", "target_api": "numpy.sort"}).to_string())
        .collect();
    fs::write(&file, lines.join("\n")).unwrap();
    let source = SourceConfig { queries_file: Some(file), ..SourceConfig::default() };
    let retriever = Arc::new(corpus.open());
    let read = |known: fn(&JobId) -> bool| -> Vec<Context> {
        let contexts = contexts(&source, Some(Arc::clone(&retriever))).unwrap();
        contexts.leaving_out(known).map(Result::unwrap).collect()
    };
    let all = read(|_| false);
    let ids: Vec<String> = all.iter().map(|context| context.id.0.clone()).collect();
    assert_eq!(ids, (0..300).map(|k| k.to_string()).collect::<Vec<_>>());
    assert!(all.iter().all(|context| paths(context) == ["numpy.sort"]));
    let left = read(|id| id.0 != "7" && id.0 != "299");
    let left: Vec<&str> = left.iter().map(|context| context.id.0.as_str()).collect();
    assert_eq!(left, ["7", "299"]);
}

#[test]
fn source_code_is_found_like_documentation() {
    let mut corpus = Corpus::new().release("a/1", &[]);
    let line = json!({"path": "a.f", "source": "def f():\n    return compute_total()"});
    fs::write(corpus.file("a/1"), line.to_string()).unwrap();
    corpus.config.corpus_type = CorpusType::Srccodes;
    let context = corpus.open().retrieve(query("computeTotal", None, &[]));
    assert_eq!(context.context, "## a.f\ndef f():\n    return compute_total()");
}

#[test]
fn an_empty_release_is_no_failure_and_an_empty_corpus_is_one() {
    let corpus = Corpus::new().release("a/1", &[]);
    let context = corpus.open().retrieve(query("a", Some("a.b"), &[("a", Some("1"))]));
    assert_eq!(context.retrieval_method, RetrievalMethod::None);
    let empty = Corpus::new();
    let error = |config: &RetrievalConfig| match Retriever::open(config, None) {
        Ok(_) => panic!("opened"),
        Err(error) => error.to_string(),
    };
    assert!(error(&empty.config).starts_with("expected <package>/<version>.jsonl"));
    let missing = RetrievalConfig::default();
    assert!(error(&missing).contains("given none"));
    let nothing = RetrievalConfig { max_documents: 0, max_tokens: 0, ..RetrievalConfig::default() };
    let text = error(&nothing);
    assert!(text.contains("--max-documents") && text.contains("--max-tokens"), "{text}");
}

#[test]
fn the_measurement_runs() {
    let dir = tempfile::tempdir().unwrap();
    let report = flotilla_producer::bench::retrieval(500, 40, dir.path()).unwrap();
    assert_eq!((report.num_exact, report.num_bm25), (10, 30));
}
