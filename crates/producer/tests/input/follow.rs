//! Files that grow: appended to, rotated, truncated, replaced, and left alone.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, sync_channel};

use flotilla_producer::{BadInput, Error, FollowConfig, SourceConfig, follow};
use shared::Context;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{DEADLINE, good_line};

type Item = Result<Context, BadInput>;

struct Place {
    dir: tempfile::TempDir,
    source: SourceConfig,
    config: FollowConfig,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let queries_file = Some(dir.path().join("queries.jsonl"));
        Self {
            dir,
            source: SourceConfig { queries_file, ..SourceConfig::default() },
            config: FollowConfig { follow: true, idle_timeout: None },
        }
    }

    fn path(&self) -> PathBuf {
        self.source.queries_file.clone().unwrap()
    }

    fn append(&self, text: &str) {
        append(&self.path(), text);
    }

    fn follow(&self) -> Following {
        let (sender, items) = sync_channel(100);
        let shutdown = CancellationToken::new();
        let (source, config, token) = (self.source.clone(), self.config.clone(), shutdown.clone());
        std::thread::spawn(move || {
            for item in follow(&source, &config, None, &token).unwrap() {
                sender.send(item).unwrap();
            }
        });
        Following { items, shutdown: shutdown.drop_guard() }
    }

    fn error(&self) -> Error {
        let token = CancellationToken::new();
        follow(&self.source, &self.config, None, &token).err().unwrap()
    }
}

fn append(path: &std::path::Path, text: &str) {
    let mut file = File::options().append(true).create(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

struct Following {
    items: Receiver<Item>,
    shutdown: DropGuard,
}

impl Following {
    /// The id of a good query; of a bad one, file and line.
    fn next(&self) -> String {
        match self.items.recv_timeout(DEADLINE).unwrap() {
            Ok(context) => context.id.0,
            Err(bad) => format!("{}!", bad.line),
        }
    }

    fn ends(self) {
        let end = self.items.recv_timeout(DEADLINE);
        assert_eq!(end.unwrap_err(), std::sync::mpsc::RecvTimeoutError::Disconnected);
    }
}

#[test]
fn what_is_appended_comes_line_by_line() {
    let place = Place::new();
    place.append(&good_line("a"));
    let following = place.follow();
    assert_eq!(following.next(), "a");
    for id in ["b", "c", "d"] {
        place.append(&good_line(id));
        assert_eq!(following.next(), id);
    }
    place.append("oops\n");
    assert_eq!(following.next(), "5!");
}

#[test]
fn a_line_is_read_once_it_has_its_end() {
    let place = Place::new();
    let (head, tail) = ("{\"id\": \"b\", ", "\"query\": \"q\"}\noops\n");
    place.append(&(good_line("a") + head));
    let following = place.follow();
    assert_eq!(following.next(), "a");
    place.append(tail);
    assert_eq!(following.next(), "b");
    assert_eq!(following.next(), "3!");
}

#[test]
fn a_file_that_is_not_there_yet_is_waited_for() {
    let place = Place::new();
    let following = place.follow();
    place.append(&good_line("a"));
    assert_eq!(following.next(), "a");
}

#[test]
fn after_a_rotation_the_old_file_is_read_to_its_end_and_the_new_one_from_its_start() {
    let place = Place::new();
    place.append(&good_line("a"));
    let following = place.follow();
    assert_eq!(following.next(), "a");
    let old = place.dir.path().join("queries.jsonl.1");
    fs::rename(place.path(), &old).unwrap();
    append(&old, &good_line("b"));
    assert_eq!(following.next(), "b", "its writer had not yet turned to the new file");
    File::create(place.path()).unwrap();
    append(&old, &good_line("c"));
    assert_eq!(following.next(), "c", "the new file was empty");
    append(&old, "{\"id\": \"d\", \"query\": \"no line end\"}");
    place.append("oops\n");
    assert_eq!(following.next(), "d");
    assert_eq!(following.next(), "1!");
    place.append(&good_line("e"));
    assert_eq!(following.next(), "e");
}

#[test]
fn a_truncated_file_is_read_anew() {
    let place = Place::new();
    place.append(&(good_line("a") + &good_line("b")));
    let following = place.follow();
    assert_eq!([following.next(), following.next()], ["a", "b"]);
    File::options().write(true).open(place.path()).unwrap().set_len(0).unwrap();
    place.append("oops\n");
    assert_eq!(following.next(), "1!");
    place.append(&good_line("c"));
    assert_eq!(following.next(), "c");
}

#[test]
fn a_file_that_takes_the_name_is_read_and_what_it_repeats_is_left_out() {
    let place = Place::new();
    place.append(&good_line("a"));
    let following = place.follow();
    assert_eq!(following.next(), "a");
    let new = place.dir.path().join("new");
    append(&new, &(good_line("a") + &good_line("b")));
    fs::rename(&new, place.path()).unwrap();
    assert_eq!(following.next(), "b");
}

#[test]
fn an_idle_timeout_ends_it_and_takes_the_last_line_as_it_is() {
    let mut place = Place::new();
    place.config.idle_timeout = Some(0.25);
    place.append(&(good_line("a") + good_line("b").trim_end()));
    let following = place.follow();
    assert_eq!([following.next(), following.next()], ["a", "b"]);
    following.ends();
}

#[test]
fn an_idle_timeout_ends_the_wait_for_a_file_too() {
    let mut place = Place::new();
    place.config.idle_timeout = Some(0.0);
    place.follow().ends();
}

#[test]
fn a_shutdown_ends_it_and_leaves_an_unfinished_line() {
    let place = Place::new();
    place.append(&(good_line("a") + "{\"id\": \"half"));
    let following = place.follow();
    assert_eq!(following.next(), "a");
    let Following { items, shutdown } = following;
    drop(shutdown);
    assert_eq!(
        items.recv_timeout(DEADLINE).unwrap_err(),
        std::sync::mpsc::RecvTimeoutError::Disconnected
    );
}

#[test]
fn numbers_of_entries_count_on_through_a_rotation() {
    let mut place = Place::new();
    (place.source.start_index, place.source.max_samples) = (1, Some(3));
    place.append(&["passed over", "a"].map(good_line).concat());
    let following = place.follow();
    assert_eq!(following.next(), "a");
    fs::rename(place.path(), place.dir.path().join("old")).unwrap();
    append(&place.path(), &["b", "c", "d"].map(good_line).concat());
    assert_eq!([following.next(), following.next()], ["b", "c"]);
    following.ends();
}

#[test]
fn what_cannot_be_followed_is_refused() {
    let mut place = Place::new();
    place.append(" \n[{\"id\": \"a\", \"query\": \"q\"}]");
    let error = place.error().to_string();
    assert!(error.contains("expected one JSON object on each line"), "{error}");
    place.source.queries_file = Some(place.dir.path().to_owned());
    let error = place.error().to_string();
    assert!(error.contains("expected a regular file to --follow"), "{error}");
    place.source.queries_file = Some("-".into());
    let error = place.error().to_string();
    assert!(error.contains("standard input is read to its end"), "{error}");
    place.source.queries_file = Some("missing".into());
    place.config.idle_timeout = Some(-1.0);
    let error = place.error().to_string();
    assert!(error.contains("expected --idle-timeout of 0 seconds or more, given -1"), "{error}");
}

#[test]
fn an_array_that_comes_later_is_reported_and_ends_it() {
    let place = Place::new();
    place.append(&good_line("a"));
    let following = place.follow();
    assert_eq!(following.next(), "a");
    let new = place.dir.path().join("new");
    append(&new, "[]");
    fs::rename(&new, place.path()).unwrap();
    let bad = following.items.recv_timeout(DEADLINE).unwrap().unwrap_err();
    assert!(bad.reason.contains("given an array"), "{bad}");
    following.ends();
}
