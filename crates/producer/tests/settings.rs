//! The command line of the settings: the option names of the older scripts, the refusals.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use clap::Parser;
use flotilla_producer::{CorpusType, RetrievalConfig, SourceConfig};

#[derive(Parser, Debug)]
struct CommandLine {
    #[command(flatten)]
    source: SourceConfig,
    #[command(flatten)]
    retrieval: RetrievalConfig,
}

fn parse(arguments: &str) -> Result<CommandLine, String> {
    let arguments = std::iter::once("test").chain(arguments.split_whitespace());
    CommandLine::try_parse_from(arguments).map_err(|error| error.to_string())
}

#[test]
fn the_older_scripts_command_line_is_understood() {
    let line = "--queries-file q.json --corpus-path c --corpus-type srccodes --max-documents 3 \
                --embedding-source local --max-tokens 100 --enable-str-match --start-index 5 \
                --max-samples 7";
    let CommandLine { source, retrieval } = parse(line).unwrap();
    assert_eq!(source.queries_file.unwrap().to_str(), Some("q.json"));
    assert_eq!((source.start_index, source.max_samples), (5, Some(7)));
    assert_eq!(retrieval.corpus_path.unwrap().to_str(), Some("c"));
    assert_eq!(retrieval.corpus_type, CorpusType::Srccodes);
    assert_eq!((retrieval.max_documents, retrieval.max_tokens), (3, 100));
    assert!(retrieval.enable_str_match);
}

#[test]
fn defaults_are_those_of_the_older_scripts() {
    let CommandLine { source, retrieval } = parse("--queries-file q.json").unwrap();
    assert_eq!((source.start_index, source.max_samples), (0, None));
    assert_eq!(retrieval.corpus_type, CorpusType::Docstring);
    assert_eq!((retrieval.max_documents, retrieval.max_tokens), (10, 4000));
    assert!(!retrieval.enable_str_match);
    let default = RetrievalConfig::default();
    assert_eq!(default.max_documents, retrieval.max_documents);
    assert_eq!(default.max_tokens, retrieval.max_tokens);
}

#[test]
fn what_is_not_supported_says_so() {
    let error = parse("--queries-file q --embedding-source togetherai").unwrap_err();
    assert!(error.contains("togetherai are not supported"), "{error}");
    let error = parse("--queries-file q --embedding-source openai").unwrap_err();
    assert!(error.contains("expected `local`, given `openai`"), "{error}");
    let none = parse("").unwrap().source.file().unwrap_err().to_string();
    assert!(none.contains("--queries-file"), "{none}");
    assert!(parse("--queries-file a --contexts-file b").is_err());
    assert!(parse("--queries-file a --max-samples -1").is_err());
}
