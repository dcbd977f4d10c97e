//! Small corpora, queries, and a look at what came back.

use std::fs;
use std::path::PathBuf;

use flotilla_producer::{RetrievalConfig, Retriever};
use serde_json::json;
use shared::{Context, JobId, Query};

pub(crate) struct Corpus {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) config: RetrievalConfig,
}

impl Corpus {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("corpus")).unwrap();
        let config = RetrievalConfig {
            corpus_path: Some(dir.path().join("corpus")),
            cache_dir: Some(dir.path().join("cache")),
            ..RetrievalConfig::default()
        };
        Self { dir, config }
    }

    pub(crate) fn file(&self, release: &str) -> PathBuf {
        self.dir.path().join("corpus").join(format!("{release}.jsonl"))
    }

    /// Adds `<package>/<version>` with documents of the given paths and texts.
    pub(crate) fn release(self, release: &str, documents: &[(&str, &[&str], &str)]) -> Self {
        let lines: Vec<String> = documents
            .iter()
            .map(|(path, aliases, doc)| {
                json!({"path": path, "aliases": aliases, "doc": doc}).to_string()
            })
            .collect();
        fs::create_dir_all(self.file(release).parent().unwrap()).unwrap();
        fs::write(self.file(release), lines.join("\n")).unwrap();
        self
    }

    pub(crate) fn open(&self) -> Retriever {
        Retriever::open(&self.config, None).unwrap()
    }

    pub(crate) fn indexes(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.path().join("cache")).unwrap();
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect()
    }
}

/// Two releases of one package, one of another.
pub(crate) fn numpy_and_pandas() -> Corpus {
    Corpus::new()
        .release(
            "numpy/1.9.0",
            &[
                ("numpy.argsort", &["np.argsort"], "Old indices that sort an array."),
                ("numpy.rank", &["np.rank"], "Number of dimensions."),
            ],
        )
        .release(
            "numpy/1.16.6",
            &[
                ("numpy.argsort", &["np.argsort"], "Indices that would sort an array."),
                ("numpy.sort", &["np.sort"], "Sorted copy of an array."),
                ("numpy.ma.argsort", &[], "Masked indices."),
            ],
        )
        .release(
            "pandas/2.0",
            &[
                ("pandas.argsort_like", &["np.sort", "pandas.Order"], "Nothing much."),
                ("pandas.merge", &[], "Join two tables on an array of columns."),
            ],
        )
}

pub(crate) fn query(
    text: &str,
    target_api: Option<&str>,
    dependencies: &[(&str, Option<&str>)],
) -> Query {
    Query {
        target_api: target_api.map(Into::into),
        dependencies: dependencies
            .iter()
            .map(|(package, version)| ((*package).to_owned(), version.map(Into::into)))
            .collect(),
        ..Query::new(JobId("id".into()), text.into())
    }
}

pub(crate) fn paths(context: &Context) -> Vec<&str> {
    let paths = context.documents.iter().map(|document| document.path.as_str());
    paths.collect()
}

pub(crate) const NUMPY: &[(&str, Option<&str>)] = &[("numpy", Some("1.16.6"))];

/// A tokenizer just big enough to tell its counts from the estimate's.
pub(crate) fn tokenizer_json() -> String {
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    });
    tokenizer.to_string()
}
