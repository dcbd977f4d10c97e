//! The queries and the corpus in `examples/`: what a new user runs first.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;

use flotilla_producer::{RetrievalConfig, Retriever, SourceConfig, contexts};
use shared::Context;

fn example_contexts() -> Vec<Context> {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let cache = tempfile::tempdir().unwrap();
    let config = RetrievalConfig {
        corpus_path: Some(examples.join("corpus")),
        cache_dir: Some(cache.path().to_owned()),
        ..RetrievalConfig::default()
    };
    let source = SourceConfig {
        queries_file: Some(examples.join("queries.jsonl")),
        ..SourceConfig::default()
    };
    let retriever = Arc::new(Retriever::open(&config, None).unwrap());
    let contexts = contexts(&source, Some(retriever)).unwrap();
    contexts.map(Result::unwrap).collect()
}

#[test]
fn every_example_finds_the_documents_it_is_about() {
    let expected = [
        ("sample_1", "numpy.argsort"),
        ("numpy-where", "numpy.where"),
        ("numpy-mean", "numpy.mean"),
        ("numpy-rng", "numpy.random.default_rng"),
        ("numpy-asscalar", "numpy.asscalar"),
        ("numpy-unique", "numpy.unique"),
        ("numpy-norm", "numpy.linalg.norm"),
        ("pandas-csv", "pandas.read_csv"),
        ("pandas-big-csv", "pandas.read_csv"),
        ("pandas-merge", "pandas.DataFrame.merge"),
        ("12", "pandas.DataFrame.dropna"),
        ("requests-get", "requests.get"),
        ("requests-timeout", "requests.request"),
        ("requests-nested#0", "requests.post"),
        ("requests-nested#1", "requests.Response.json"),
        ("requests-nested#2", "requests.Session"),
        ("legacy-1", "numpy.concatenate"),
    ];
    let found: Vec<(String, String)> = example_contexts()
        .into_iter()
        .map(|context| {
            let first = context.documents.first().map(|first| first.path.clone());
            (context.id.0, first.unwrap_or_default())
        })
        .collect();
    let found: Vec<(&str, &str)> =
        found.iter().map(|(id, path)| (id.as_str(), path.as_str())).collect();
    assert_eq!(found, expected);
}
