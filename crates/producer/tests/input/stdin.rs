//! Standard input: read through a pipe, so that what is there can be told from what isn't.

use std::io::{PipeWriter, Write};
use std::sync::mpsc::{Receiver, sync_channel};

use flotilla_producer::{BadInput, SourceConfig, contexts_from, count};
use shared::Context;

use crate::{DEADLINE, good_line};

type Item = Result<Context, BadInput>;

/// Reads a pipe as standard input, on a thread of its own.
fn read(source: SourceConfig) -> (PipeWriter, Receiver<Item>) {
    let (reader, writer) = std::io::pipe().unwrap();
    let (sender, items) = sync_channel(100);
    std::thread::spawn(move || {
        for item in contexts_from(reader, &source, None).unwrap() {
            sender.send(item).unwrap();
        }
    });
    (writer, items)
}

fn queries() -> SourceConfig {
    SourceConfig { queries_file: Some("-".into()), ..SourceConfig::default() }
}

fn next_id(items: &Receiver<Item>) -> String {
    items.recv_timeout(DEADLINE).unwrap().unwrap().id.0
}

#[test]
fn lines_are_handed_on_as_they_come() {
    let (mut pipe, items) = read(queries());
    for id in ["a", "b", "c"] {
        pipe.write_all((good_line(id) + "\n").as_bytes()).unwrap();
        assert_eq!(next_id(&items), id, "waits for what follows a blank line");
    }
    pipe.write_all(b"oops\n{\"id\": \"last\", \"query\": \"q\"}").unwrap();
    let bad = items.recv_timeout(DEADLINE).unwrap().unwrap_err();
    assert!(bad.to_string().starts_with("<stdin>:7: "), "{bad}");
    assert_eq!(bad.index, 3);
    drop(pipe);
    assert_eq!(next_id(&items), "last");
    assert!(items.recv_timeout(DEADLINE).is_err());
}

#[test]
fn elements_of_an_array_are_handed_on_as_they_come() {
    let (mut pipe, items) = read(queries());
    pipe.write_all(b"[\n").unwrap();
    for id in ["a", "b", "c"] {
        pipe.write_all(format!("{},", good_line(id)).as_bytes()).unwrap();
        assert_eq!(next_id(&items), id);
    }
    pipe.write_all(b"{\"id\": \"d\", \"query\": \"q\"}]").unwrap();
    drop(pipe);
    assert_eq!(next_id(&items), "d");
    assert!(items.recv_timeout(DEADLINE).is_err());
}

#[test]
fn contexts_come_from_standard_input_too() {
    let source = SourceConfig { contexts_file: Some("-".into()), ..SourceConfig::default() };
    let (mut pipe, items) = read(source);
    let written = Context { context: "text".into(), context_length: 4, ..crate::context("a") };
    serde_json::to_writer(&mut pipe, &written).unwrap();
    drop(pipe);
    assert_eq!(items.recv_timeout(DEADLINE).unwrap().unwrap(), written);
}

#[test]
fn what_can_be_read_only_once_is_not_counted() {
    assert_eq!(count(&queries()), None);
}
