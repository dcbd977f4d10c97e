//! The settings of sources and retrieval, as the command line spells them.
//!
//! Every doc comment here is the option's `--help`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::error::Error;

/// Where the documents of a context come from, and how many of them it takes.
#[derive(Args, Clone, Debug)]
pub struct RetrievalConfig {
    /// Directory of the corpus: `<package>/<version>.jsonl` inside it. Without it, contexts are
    /// empty
    #[arg(long, value_name = "DIR")]
    pub corpus_path: Option<PathBuf>,

    /// What the corpus holds: documentation or source code
    #[arg(long, value_enum, default_value_t)]
    pub corpus_type: CorpusType,

    /// Where documents are ranked; `local` is BM25 on this machine
    #[arg(
        long,
        value_name = "SOURCE",
        value_parser = parse_embedding_source,
        default_value = "local"
    )]
    pub embedding_source: EmbeddingSource,

    /// Most documents in one context
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub max_documents: usize,

    /// Most tokens in one context, counted with the model's tokenizer
    #[arg(long, value_name = "N", default_value_t = 4000)]
    pub max_tokens: usize,

    /// Where `target_api` is no document's exact name, take documents whose names contain it
    /// before falling back to BM25
    #[arg(long)]
    pub enable_str_match: bool,

    /// Directory that keeps the index of the corpus between runs; safe to delete [default:
    /// $XDG_CACHE_HOME/flotilla or ~/.cache/flotilla]
    #[arg(long, value_name = "DIR", env = "FLOTILLA_CACHE_DIR")]
    pub cache_dir: Option<PathBuf>,
}

impl Default for RetrievalConfig {
    fn default() -> Self {
        Self {
            corpus_path: None,
            corpus_type: CorpusType::default(),
            embedding_source: EmbeddingSource::Local,
            max_documents: 10,
            max_tokens: 4000,
            enable_str_match: false,
            cache_dir: None,
        }
    }
}

impl RetrievalConfig {
    /// Checks what clap can't; all problems at once.
    pub fn validate(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        if self.max_documents == 0 {
            problems.push("expected --max-documents of at least 1, given 0");
        }
        if self.max_tokens == 0 {
            problems.push("expected --max-tokens of at least 1, given 0");
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Config(problems.join("; "))) }
    }

    /// The directory of indexes: `cache_dir`, or the user's cache directory.
    ///
    /// `None` where the system names none.
    pub fn resolved_cache_dir(&self) -> Option<PathBuf> {
        let user_cache = || {
            std::env::var_os("XDG_CACHE_HOME")
                .filter(|dir| !dir.is_empty())
                .map(PathBuf::from)
                .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
                .map(|dir| dir.join("flotilla"))
        };
        self.cache_dir.clone().or_else(user_cache)
    }
}

/// What a corpus holds.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CorpusType {
    /// Documentation: the text is in `doc`.
    #[default]
    Docstring,
    /// Source code: the text is in `source`, `code` or `doc`.
    Srccodes,
}

impl CorpusType {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Docstring => "docstring",
            Self::Srccodes => "srccodes",
        }
    }
}

/// Where documents are ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbeddingSource {
    /// BM25 on this machine.
    Local,
}

fn parse_embedding_source(text: &str) -> Result<EmbeddingSource, String> {
    match text {
        "local" => Ok(EmbeddingSource::Local),
        "togetherai" => Err(
            "embeddings of togetherai are not supported: expected `local`, which ranks by BM25 \
             on this machine"
                .to_owned(),
        ),
        other => Err(format!("expected `local`, given `{other}`")),
    }
}

/// Which queries to answer.
#[derive(Args, Clone, Debug, Default)]
pub struct SourceConfig {
    /// File of queries, a JSON array or one JSON object per line; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "contexts_file")]
    pub queries_file: Option<PathBuf>,

    /// File of finished contexts, as `flotilla contexts` writes it; nothing is retrieved; `-` is
    /// standard input
    #[arg(long, value_name = "FILE")]
    pub contexts_file: Option<PathBuf>,

    /// Number of entries of the file to pass over first; an entry with nested queries counts once
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub start_index: u64,

    /// Most entries of the file to take; an entry with nested queries counts once
    #[arg(long, value_name = "N")]
    pub max_samples: Option<u64>,
}

impl SourceConfig {
    /// The file to read, and whether it holds finished contexts.
    pub fn file(&self) -> Result<(&PathBuf, bool), Error> {
        match (&self.queries_file, &self.contexts_file) {
            (Some(file), None) => Ok((file, false)),
            (None, Some(file)) => Ok((file, true)),
            (None, None) => {
                let text = "expected --queries-file or --contexts-file, given neither";
                Err(Error::Config(text.to_owned()))
            }
            (Some(_), Some(_)) => {
                let text = "expected either --queries-file or --contexts-file, given both";
                Err(Error::Config(text.to_owned()))
            }
        }
    }

    /// Whether the input is standard input.
    pub fn is_stdin(&self) -> Result<bool, Error> {
        Ok(self.file()?.0.as_os_str() == "-")
    }
}

/// Whether to go on reading at the end of the file.
#[derive(Args, Clone, Debug, Default)]
pub struct FollowConfig {
    /// Go on reading the file as it grows, and the one that takes its name when it is rotated;
    /// one JSON object per line
    #[arg(long)]
    pub follow: bool,

    /// With --follow: end when nothing was added for this many seconds
    #[arg(long, value_name = "SECONDS", requires = "follow")]
    pub idle_timeout: Option<f64>,
}

impl FollowConfig {
    /// How long nothing may come, checked.
    pub fn idle_timeout(&self) -> Result<Option<Duration>, Error> {
        let checked = |seconds: f64| {
            Duration::try_from_secs_f64(seconds).map_err(|_| {
                let text = format!("expected --idle-timeout of 0 seconds or more, given {seconds}");
                Error::Config(text)
            })
        };
        self.idle_timeout.map(checked).transpose()
    }
}
