//! How much of what was found goes into a context.

use flotilla_producer::{Retriever, TokenCounter};
use shared::RetrievalMethod;

use super::fixture::{Corpus, paths, query, tokenizer_json};

#[test]
fn documents_are_taken_whole_while_they_fit_and_the_last_is_cut_at_a_line() {
    let lines = "aaa bbb ccc\n".repeat(5);
    let mut corpus = Corpus::new().release(
        "p/1",
        &[
            ("p.f", &["name"], &lines),
            ("p.g", &["name"], &lines),
            ("p.h", &["name"], "one line that is the only one here and so can't be cut"),
        ],
    );
    let context = |corpus: &Corpus, max_tokens| {
        let mut config = corpus.config.clone();
        config.max_tokens = max_tokens;
        let retriever = Retriever::open(&config, None).unwrap();
        retriever.retrieve(query("zzz", Some("name"), &[]))
    };
    let whole = |path: &str| format!("## {path}\n{}", lines.trim_end());
    // 6 characters of heading, 5 lines of 11, 5 line ends: 66 characters, 17 tokens.
    assert_eq!(context(&corpus, 17).context, whole("p.f"));
    assert_eq!(
        context(&corpus, 16).context,
        "## p.f\naaa bbb ccc\naaa bbb ccc\naaa bbb ccc\naaa bbb ccc"
    );
    // A separator of one token, and 16 tokens of the second document.
    let cut = context(&corpus, 34);
    assert!(cut.context.starts_with(&format!("{}\n\n## p.g\n", whole("p.f"))));
    assert_eq!(cut.context.matches("aaa").count(), 9);
    assert_eq!(paths(&cut), ["p.f", "p.g"]);
    let both = context(&corpus, 35);
    assert_eq!(both.context, format!("{}\n\n{}", whole("p.f"), whole("p.g")));
    // A heading alone is not worth its tokens; nor is the end of the third document.
    assert_eq!(context(&corpus, 19).context, whole("p.f"));
    assert_eq!(paths(&context(&corpus, 40)), ["p.f", "p.g"]);
    assert_eq!(context(&corpus, 1).retrieval_method, RetrievalMethod::None);
    // The only document is cut between words rather than lost.
    corpus = corpus.release("q/1", &[("q.x", &["alone"], "some words in one long line")]);
    let mut config = corpus.config.clone();
    config.max_tokens = 5;
    let retriever = Retriever::open(&config, None).unwrap();
    let context = retriever.retrieve(query("zzz", Some("alone"), &[]));
    assert_eq!(context.context, "## q.x\nsome words");
}

#[test]
fn the_budget_is_counted_with_the_models_tokenizer_and_never_exceeded() {
    let text = "one, two three-four\nfive six\n\nseven (eight) nine\nten\n".repeat(3);
    let documents: Vec<String> = (0..8).map(|k| format!("p.f{k}")).collect();
    let documents: Vec<(&str, &[&str], &str)> =
        documents.iter().map(|path| (path.as_str(), &["name"][..], text.as_str())).collect();
    let corpus = Corpus::new().release("p/1", &documents);
    let tokenizer = tokenizer_json();
    let counter = TokenCounter::from_json(&tokenizer).unwrap();
    let mut lengths = Vec::new();
    for max_tokens in 1..200 {
        let mut config = corpus.config.clone();
        config.max_tokens = max_tokens;
        let retriever = Retriever::open(&config, Some(&tokenizer)).unwrap();
        let context = retriever.retrieve(query("zzz", Some("name"), &[]));
        assert!(counter.count(&context.context) <= max_tokens);
        assert!(!context.context.ends_with(char::is_whitespace));
        lengths.push(context.context.len());
    }
    assert!(lengths.is_sorted());
    // The longest line has seven tokens: never is more than that left unused.
    let mut config = corpus.config.clone();
    config.max_tokens = 150;
    let retriever = Retriever::open(&config, Some(&tokenizer)).unwrap();
    let context = retriever.retrieve(query("zzz", Some("name"), &[]));
    assert!(counter.count(&context.context) > 150 - 8);
}
