//! The documents of a corpus: `<corpus>/<package>/<version>.jsonl`, a document on each line.
//!
//! Finds the files and reads their lines into texts as a context shows them. Keeping and searching
//! them is [`crate::index`]'s.

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::CorpusType;
use crate::error::Error;
use crate::lines::{Lines, MAX_RECORD_BYTES, too_long};

mod version;

pub use version::Version;

/// What stands between two documents of a context.
pub const SEPARATOR: &str = "\n\n";

/// Bad lines of one file that are named one by one; further ones are only counted.
const MAX_WARNINGS: u64 = 10;

/// One version of one package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// The package's directory name.
    pub package: String,
    /// The version: the file's name without `.jsonl`.
    pub version: Version,
    /// The file of its documents.
    pub file: PathBuf,
}

/// How package names are compared: without case, `-` and `_` alike.
pub fn normalised_package(name: &str) -> String {
    name.trim().to_lowercase().replace('_', "-")
}

/// The releases of a corpus, by package and the newest version first.
pub fn releases(corpus: &Path) -> Result<Vec<Release>, Error> {
    let mut releases = Vec::new();
    for package in entries(corpus)? {
        if !package.is_dir() {
            tracing::warn!(path = %package.display(), "not a package's directory, passed over");
            continue;
        }
        for file in entries(&package)? {
            let (Some(package), Some(version)) = (name(&package), version_of(&file)) else {
                tracing::warn!(path = %file.display(), "not named <version>.jsonl, passed over");
                continue;
            };
            releases.push(Release { package, version, file });
        }
    }
    if releases.is_empty() {
        return Err(Error::EmptyCorpus(corpus.to_owned()));
    }
    releases.sort_by_cached_key(|release| {
        let version = std::cmp::Reverse(release.version.clone());
        (normalised_package(&release.package), version, release.file.clone())
    });
    Ok(releases)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let visible = |path: &PathBuf| name(path).is_none_or(|name| !name.starts_with('.'));
    fs::read_dir(dir)
        .and_then(|entries| {
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()
        })
        .map(|paths| paths.into_iter().filter(visible).collect())
        .map_err(Error::corpus(dir))
}

fn name(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}

fn version_of(file: &Path) -> Option<Version> {
    let name = name(file)?;
    let version = name.strip_suffix(".jsonl")?;
    (!version.is_empty() && file.is_file()).then(|| Version::new(version))
}

/// One document, as a context shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its path, such as `numpy.argsort`.
    pub path: String,
    /// Other names of the same thing.
    pub aliases: Vec<String>,
    /// The text: a heading line with the path, the signature if there is one, the documentation
    /// or the code.
    pub text: String,
}

impl Document {
    /// Reads a line of a corpus file.
    pub fn parse(line: &[u8], corpus_type: CorpusType) -> Result<Self, String> {
        let raw: RawDocument = serde_json::from_slice(line).map_err(|error| error.to_string())?;
        if raw.path.trim().is_empty() {
            return Err("expected a `path`, given an empty one".to_owned());
        }
        let (body, expected) = match corpus_type {
            CorpusType::Docstring => (raw.doc, "`doc`"),
            CorpusType::Srccodes => {
                (raw.source.or(raw.code).or(raw.doc), "`source`, `code` or `doc`")
            }
        };
        let Some(body) = body else {
            return Err(format!("expected text in {expected}, given none"));
        };
        Ok(Self {
            text: render(&raw.path, raw.signature.as_deref(), &body),
            path: raw.path,
            aliases: raw
                .aliases
                .unwrap_or_default()
                .into_iter()
                .filter(|alias| !alias.trim().is_empty())
                .collect(),
        })
    }

    /// The text below the heading.
    pub fn body(&self) -> &str {
        self.text.split_once('\n').map_or("", |(_heading, body)| body)
    }

    /// The path, then the aliases.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.path.as_str()).chain(self.aliases.iter().map(String::as_str))
    }
}

#[derive(Deserialize)]
struct RawDocument {
    path: String,
    doc: Option<String>,
    source: Option<String>,
    code: Option<String>,
    aliases: Option<Vec<String>>,
    signature: Option<String>,
}

fn render(path: &str, signature: Option<&str>, body: &str) -> String {
    let mut text = format!("## {path}\n");
    if let Some(signature) = signature.map(str::trim_end).filter(|text| !text.is_empty()) {
        if signature.starts_with('(') {
            text.push_str(path);
        }
        text.push_str(signature);
        text.push('\n');
    }
    text.push_str(body);
    text.truncate(text.trim_end().len());
    text
}

/// Reads the documents of one release. Bad lines are named in warnings, counted and passed over.
pub(crate) struct Documents<'r> {
    release: &'r Release,
    corpus_type: CorpusType,
    lines: Lines<BufReader<fs::File>>,
    num_bad: u64,
}

impl<'r> Documents<'r> {
    pub(crate) fn open(release: &'r Release, corpus_type: CorpusType) -> Result<Self, Error> {
        let file = fs::File::open(&release.file).map_err(Error::corpus(&release.file))?;
        Ok(Self {
            release,
            corpus_type,
            lines: Lines::new(BufReader::new(file), 1, MAX_RECORD_BYTES),
            num_bad: 0,
        })
    }

    /// The next document; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Document>, Error> {
        loop {
            let line = self.lines.next().map_err(Error::corpus(&self.release.file))?;
            let Some(line) = line else {
                if self.num_bad > MAX_WARNINGS {
                    tracing::warn!(
                        file = %self.release.file.display(),
                        num_bad = self.num_bad,
                        "bad lines in all, passed over"
                    );
                }
                return Ok(None);
            };
            let number = line.number;
            let parsed = match line.content {
                Ok(text) => {
                    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
                    if text.trim_ascii().is_empty() {
                        continue;
                    }
                    Document::parse(text, self.corpus_type)
                }
                Err(_) => Err(too_long(MAX_RECORD_BYTES)),
            };
            match parsed {
                Ok(document) => return Ok(Some(document)),
                Err(reason) => self.warn(number, &reason),
            }
        }
    }

    /// Number of lines that were passed over.
    pub(crate) fn num_bad(&self) -> u64 {
        self.num_bad
    }

    fn warn(&mut self, line: u64, reason: &str) {
        self.num_bad += 1;
        if self.num_bad <= MAX_WARNINGS {
            let file = self.release.file.display();
            tracing::warn!("{file}:{line}: {reason}; line passed over");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str, corpus_type: CorpusType) -> Result<String, String> {
        Document::parse(line.as_bytes(), corpus_type).map(|document| document.text)
    }

    #[test]
    fn documents_are_rendered_as_the_model_was_trained() {
        let cases = [
            (r#"{"path": "a.b", "doc": "One.\n\nTwo.\n \n"}"#, "## a.b\nOne.\n\nTwo."),
            (r#"{"path": "a.b", "doc": "One.", "signature": "(x, y)"}"#, "## a.b\na.b(x, y)\nOne."),
            (
                r#"{"path": "a.b", "doc": "One.", "signature": "b(x) -> int\n"}"#,
                "## a.b\nb(x) -> int\nOne.",
            ),
            (r#"{"path": "a.b", "doc": "", "signature": ""}"#, "## a.b"),
        ];
        for (line, text) in cases {
            assert_eq!(parse(line, CorpusType::Docstring).unwrap(), text);
        }
    }

    #[test]
    fn source_code_stands_where_the_documentation_would() {
        for field in ["source", "code", "doc"] {
            let line = format!(r#"{{"path": "a", "{field}": "def a(): pass"}}"#);
            assert_eq!(parse(&line, CorpusType::Srccodes).unwrap(), "## a\ndef a(): pass");
        }
    }

    #[test]
    fn bad_lines_say_what_was_expected() {
        let cases = [
            (r#"{"path": "", "doc": "x"}"#, "given an empty one"),
            (r#"{"path": "a"}"#, "expected text in `doc`"),
            (r#"{"doc": "x"}"#, "missing field `path`"),
            (r#"{"path": "a", "doc": 1}"#, "expected a string"),
            ("{", "EOF"),
        ];
        for (line, reason) in cases {
            let error = parse(line, CorpusType::Docstring).unwrap_err();
            assert!(error.contains(reason), "{line}: {error}");
        }
    }

    #[test]
    fn package_names_are_compared_without_case_and_dashes() {
        assert_eq!(normalised_package("Scikit_Learn"), normalised_package("scikit-learn"));
    }

    #[test]
    fn releases_come_by_package_and_the_newest_first() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["b/1.9.jsonl", "b/1.10.jsonl", "a/2.jsonl", "a/x.txt"] {
            let file = dir.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        let found: Vec<_> = releases(dir.path())
            .unwrap()
            .into_iter()
            .map(|release| format!("{} {}", release.package, release.version))
            .collect();
        assert_eq!(found, ["a 2", "b 1.10", "b 1.9"]);
    }
}
