//! Queries over HTTP, through the fleet.

use std::io::{Read, Write};
use std::net::TcpStream;

use flotilla_tests::process::{DEADLINE, Process};
use rustix::process::Signal;

use crate::harness::Fleet;

#[test]
fn queries_posted_are_answered_once_each() {
    let fleet = Fleet::start();
    let _worker = fleet.noop("");
    let collector = fleet.collect("");
    let producer = fleet.spawn("produce --listen 127.0.0.1:0 --run r --token secret");
    let lines: String = (0..50)
        .map(|n| format!("{{\"id\":\"q{n}\",\"query\":\"What is number {n}?\"}}\n"))
        .collect();
    let refused = post(&producer, &lines, "wrong");
    assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
    let accepted = post(&producer, &lines, "secret");
    assert!(accepted.starts_with("HTTP/1.1 202"), "{accepted}");
    collector.wait_for("written", 50);
    // Sent again, it is accepted and adds nothing.
    let again = post(&producer, &lines, "secret");
    assert!(again.starts_with("HTTP/1.1 202"), "{again}");
    let one_more = post(&producer, r#"{"id":"q50","query":"One more?"}"#, "secret");
    assert!(one_more.starts_with("HTTP/1.1 202"), "{one_more}");
    collector.wait_for("written", 51);
    producer.signal(Signal::TERM);
    assert_eq!(producer.wait(DEADLINE).code(), Some(0), "{}", producer.log());
    assert!(!producer.log().contains("secret"), "{}", producer.log());
    collector.kill();
    fleet.assert_done(&fleet.collect("--until-done"), 51);
}

/// What the producer answers to a body.
pub(crate) fn post(producer: &Process, body: &str, token: &str) -> String {
    producer.wait_for("listening at http://", 1);
    let log = producer.log();
    let address = log.split_once("listening at http://").unwrap().1.split('/').next().unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "POST /v1/queries HTTP/1.1\r\nHost: flotilla\r\nConnection: close\r\n\
         Authorization: Bearer {token}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
