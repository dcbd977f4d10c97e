//! A producer that is run again: what has its line is left out, and where nobody can say what has, all
//! is published. The server's own memory of what it has seen is too short to help here.

use std::sync::atomic::Ordering;
use std::time::Duration;

use flotilla_tests::Outsider;
use flotilla_tests::process::{DEADLINE, Process};
use rustix::process::Signal;

use crate::harness::{Fleet, run};

const JOBS: &str = "FLOTILLA_JOBS";
const RESULTS: &str = "FLOTILLA_RESULTS";
const QUESTIONS: &str = "flotilla.known.r";

/// A fleet whose server forgets at once what it has seen, with a collector that has written the
/// first 200 queries.
fn answered() -> (Fleet, Outsider, Process) {
    let fleet = Fleet::start();
    fleet.status();
    let outsider = Outsider::connect(&fleet.nats.url());
    outsider.set_duplicate_window(JOBS, Duration::from_millis(100));
    fleet.place.write_queries("queries.jsonl", 200);
    fleet.produce("");
    let collector = fleet.collect("");
    let _worker = fleet.noop("");
    collector.wait_for("written", 200);
    (fleet, outsider, collector)
}

/// Publishes the first 300 queries, of which 200 have their line; what the producer said.
fn produce_more(fleet: &Fleet) -> String {
    fleet.place.write_queries("queries.jsonl", 300);
    fleet.produce("")
}

/// Ends the collector, has a new one end the run, and checks the output; how often a job was
/// computed.
fn finish(fleet: &Fleet, outsider: &Outsider, collector: &Process) -> u64 {
    let _worker = fleet.noop("");
    collector.signal(Signal::TERM);
    assert_eq!(collector.wait(DEADLINE).code(), Some(0), "{}", collector.log());
    fleet.assert_done(&fleet.collect("--until-done"), 300);
    outsider.state(RESULTS).last_sequence
}

#[test]
fn what_has_its_line_is_left_out_and_nothing_computed_twice() {
    let (fleet, outsider, collector) = answered();
    let log = produce_more(&fleet);
    assert!(log.contains("100 jobs published, 200 already answered"), "{log}");
    // The run is as far as if it had been published at once.
    let state = fleet.wait_for("the producer's word", |state| {
        run(state, "r")["published"].as_u64() == Some(300)
    });
    assert_eq!(run(&state, "r")["is_published"], true);
    assert_eq!(finish(&fleet, &outsider, &collector), 300, "each was computed once");
    assert_eq!(outsider.state(JOBS).last_sequence, 300, "none was queued twice");
    // The run has a line for each query: a collector that knows nothing by itself, without Redis,
    // says so too.
    let collector = fleet.spawn("collect --run r --output-file results.jsonl");
    collector.wait_for("collecting", 1);
    fleet.wait_for("the collector", |state| run(state, "r")["is_collected"] == true);
    let log = fleet.produce("");
    assert!(log.contains("0 jobs published, 300 already answered"), "{log}");
    assert_eq!(outsider.state(JOBS).last_sequence, 300);
}

#[test]
fn without_a_collector_all_is_published_and_written_once() {
    let (fleet, outsider, collector) = answered();
    collector.signal(Signal::TERM);
    assert_eq!(collector.wait(DEADLINE).code(), Some(0), "{}", collector.log());
    outsider.wait_until_forgotten("flotilla.jobs.nobody.other");
    let log = produce_more(&fleet);
    assert!(log.contains("300 jobs published, 0 already answered"), "{log}");
    assert_eq!(log.matches("no collector of the run can be asked").count(), 1, "{log}");
    let collector = fleet.collect("");
    collector.wait_for("collecting", 1);
    assert_eq!(finish(&fleet, &outsider, &collector), 500, "200 were computed again");
}

#[test]
fn a_waiting_collector_tells_nothing_until_it_has_taken_over() {
    let (fleet, outsider, holder) = answered();
    let waiting = fleet.collect("");
    waiting.wait_for("waiting", 1);
    holder.stop();
    let log = produce_more(&fleet);
    assert!(log.contains("300 jobs published, 0 already answered"), "{log}");
    assert!(log.contains("does not tell what has its line"), "{log}");
    holder.kill();
    waiting.wait_for("collecting", 1);
    fleet.wait_for("the collector", |state| run(state, "r")["is_collected"] == true);
    let log = fleet.produce("");
    let num_answered: u64 = {
        let before = log.split(" already answered").next().unwrap();
        before.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(num_answered >= 200, "{log}");
    finish(&fleet, &outsider, &waiting);
}

#[test]
fn strangers_who_ask_and_answer_lose_nothing() {
    let (fleet, outsider, collector) = answered();
    // What is no question harms neither the collector nor those who ask it.
    for garbage in [&b""[..], b"garbage", &[0; 17], &[255; 20_000]] {
        outsider.tell(QUESTIONS, garbage);
    }
    let log = produce_more(&fleet);
    assert!(log.contains("100 jobs published, 200 already answered"), "{log}");
    assert_eq!(finish(&fleet, &outsider, &collector), 300);
    // A stranger in the collector's place, whose answers are none.
    let num_asked = outsider.reply(QUESTIONS, Some(b"nonsense that is no answer"));
    let log = fleet.produce("");
    assert!(log.contains("300 jobs published, 0 already answered"), "{log}");
    assert!(log.contains("does not tell what has its line"), "{log}");
    assert_eq!(num_asked.load(Ordering::SeqCst), 1);
}

#[test]
fn a_run_without_a_line_is_asked_about_once() {
    let fleet = Fleet::start();
    let collector = fleet.collect("");
    fleet.wait_for("the collector", |state| run(state, "r")["is_collected"] == true);
    // It only listens: the collector answers.
    let outsider = Outsider::connect(&fleet.nats.url());
    let num_asked = outsider.reply(QUESTIONS, None);
    fleet.place.write_queries("queries.jsonl", 20_000);
    let log = fleet.produce("");
    assert!(log.contains("20000 jobs published, 0 already answered"), "{log}");
    // As many as are on their way before the first answer.
    assert!(num_asked.load(Ordering::SeqCst) <= 5, "{num_asked:?}");
    assert!(collector.is_running());
}

#[test]
fn lines_of_input_that_cannot_be_read_count_as_answered() {
    let fleet = Fleet::start();
    // A query that can't be read has a failed line.
    let bad = "{\"id\":\"q0\",\"query\":7}\n{\"id\":\"q1\",\"query\":\"one\"}\n";
    fleet.place.write("queries.jsonl", bad);
    fleet.run(3, "produce --queries-file queries.jsonl --run r");
    let collector = fleet.collect("");
    let _worker = fleet.noop("");
    collector.wait_for("written", 2);
    let log = fleet.run(0, "produce --queries-file queries.jsonl --run r");
    assert!(log.contains("0 jobs published, 2 already answered, 0 failed"), "{log}");
    assert_eq!(fleet.ids().len(), 2);
}

#[test]
fn queries_posted_again_are_counted_and_not_queued() {
    let (fleet, outsider, collector) = answered();
    let producer = fleet.spawn("produce --listen 127.0.0.1:0 --run r");
    let body = |from: u32, to: u32| -> String {
        let line = |n| format!("{{\"id\":\"q{n}\",\"query\":\"What is number {n}?\"}}\n");
        (from..to).map(line).collect()
    };
    let answer = crate::listening::post(&producer, &body(0, 300), "");
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    assert!(answer.contains("\"accepted\":100,\"answered\":200"), "{answer}");
    let answer = crate::listening::post(&producer, &body(0, 100), "");
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    assert!(answer.contains("\"accepted\":0,\"answered\":100"), "{answer}");
    producer.signal(Signal::TERM);
    assert_eq!(producer.wait(DEADLINE).code(), Some(0), "{}", producer.log());
    assert_eq!(outsider.state(JOBS).last_sequence, 300);
    assert_eq!(finish(&fleet, &outsider, &collector), 300);
}
