//! The index on disk: kept, renewed, damaged, contended for.

use std::fs;
use std::path::{Path, PathBuf};

use flotilla_producer::{CorpusType, Retriever};

use super::fixture::{numpy_and_pandas, paths, query, tokenizer_json};

#[test]
fn an_index_is_built_once_and_again_when_something_changes() {
    let mut corpus = numpy_and_pandas();
    corpus.open();
    assert_eq!(corpus.indexes().len(), 1);
    corpus.open();
    assert_eq!(corpus.indexes().len(), 1);
    // Same length, other content.
    let text = fs::read_to_string(corpus.file("pandas/2.0")).unwrap();
    fs::write(corpus.file("pandas/2.0"), text.replace("Join", "Bind")).unwrap();
    let context = corpus.open().retrieve(query("bind", None, &[]));
    assert_eq!(paths(&context), ["pandas.merge"]);
    assert_eq!(corpus.indexes().len(), 2);
    corpus.config.corpus_type = CorpusType::Srccodes;
    corpus.open();
    assert_eq!(corpus.indexes().len(), 3);
    Retriever::open(&corpus.config, Some(&tokenizer_json())).unwrap();
    assert_eq!(corpus.indexes().len(), 4);
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else if path.extension().is_none_or(|extension| extension != "lock") {
            files.push(path);
        }
    }
    files
}

#[test]
fn a_damaged_index_is_built_again_whichever_file_it_is() {
    let corpus = numpy_and_pandas();
    let answer = || {
        let context = corpus.open().retrieve(query("join tables", None, &[]));
        paths(&context).join(" ")
    };
    assert_eq!(answer(), "pandas.merge");
    let files = files_below(&corpus.indexes()[0]);
    assert!(files.len() >= 4);
    let names: Vec<_> = files
        .iter()
        .map(|file| file.strip_prefix(&corpus.indexes()[0]).unwrap().to_owned())
        .collect();
    for name in names {
        for damage in ["cut", "flip", "remove"] {
            let dir = corpus.indexes().remove(0);
            // The names of the full-text index's files are new each time.
            let Some(file) = files_below(&dir)
                .into_iter()
                .find(|file| file.ends_with(&name) || file.extension() == name.extension())
            else {
                panic!("{} is gone", name.display());
            };
            let mut bytes = fs::read(&file).unwrap();
            match damage {
                "cut" => bytes.truncate(bytes.len() / 2),
                "flip" => bytes.iter_mut().for_each(|byte| *byte ^= 0x55),
                _ => {}
            }
            if damage == "remove" {
                fs::remove_file(&file).unwrap();
            } else {
                fs::write(&file, bytes).unwrap();
            }
            assert_eq!(answer(), "pandas.merge", "{damage} {}", file.display());
            assert_eq!(corpus.indexes().len(), 1);
            assert!(!dir.join("x").exists());
        }
    }
}

#[test]
fn what_a_killed_build_has_left_does_no_harm() {
    let corpus = numpy_and_pandas();
    let left = corpus.dir.path().join("cache").join("building-left");
    fs::create_dir_all(left.join("search")).unwrap();
    fs::write(left.join("texts.bin"), "half").unwrap();
    assert_eq!(corpus.open().num_documents(), 7);
}

#[test]
fn builds_at_the_same_time_all_give_a_whole_index() {
    let corpus = numpy_and_pandas();
    std::thread::scope(|scope| {
        let builds: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let context = corpus.open().retrieve(query("join tables", None, &[]));
                    paths(&context).join(" ")
                })
            })
            .collect();
        for build in builds {
            assert_eq!(build.join().unwrap(), "pandas.merge");
        }
    });
    assert_eq!(corpus.indexes().len(), 1);
}

#[test]
fn a_cache_that_cannot_be_written_is_done_without() {
    let mut corpus = numpy_and_pandas();
    let file = corpus.dir.path().join("file");
    fs::write(&file, "").unwrap();
    corpus.config.cache_dir = Some(file.join("below"));
    let context = corpus.open().retrieve(query("join tables", None, &[]));
    assert_eq!(paths(&context), ["pandas.merge"]);
}
