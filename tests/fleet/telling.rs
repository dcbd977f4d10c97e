//! What people are told when a run is not as they think: lines that are missing, another output, ids that
//! are taken, names that are wrong.

use flotilla_tests::process::DEADLINE;
use rustix::process::Signal;

use crate::harness::{Fleet, run};
use crate::listening::post;

#[test]
fn run_whose_lines_are_elsewhere_is_no_success_until_they_are_here() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 20);
    fleet.produce("");
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 20);
    let elsewhere = "collect --run r --output-file other.jsonl --until-done";
    let log = fleet.run(1, elsewhere);
    assert!(log.contains("20 lines are missing"), "{log}");
    assert!(log.contains("results.jsonl on ") && log.contains("20 lines there, 0 in"), "{log}");
    assert_eq!(run(&fleet.status(), "r")["missing"], 20);
    let table = fleet.run(0, "status");
    assert!(table.contains("lines missing") && !table.contains("complete"), "{table}");

    // A file that was moved is the same run's output.
    let moved = fleet.place.path("moved.jsonl");
    std::fs::rename(fleet.place.path("results.jsonl"), moved).unwrap();
    let log = fleet.run(0, "collect --run r --output-file moved.jsonl --until-done");
    assert!(!log.contains("lines there"), "{log}");
    let table = fleet.run(0, "status --run r");
    assert!(table.contains("complete"), "{table}");
}

#[test]
fn second_output_of_a_run_is_refused_while_the_first_is_written() {
    let fleet = Fleet::start();
    let first = fleet.collect("");
    fleet.wait_for("the collector", |state| run(state, "r")["is_collected"] == true);
    let second = "collect --run r --output-file other.jsonl";
    let log = fleet.run(1, second);
    assert!(log.contains("is being collected into") && log.contains("results.jsonl on "), "{log}");
    assert!(!fleet.place.path("other.jsonl").exists());
    first.signal(Signal::TERM);
    assert_eq!(first.wait(DEADLINE).code(), Some(0), "{}", first.log());
    let second = fleet.spawn(second);
    second.wait_for("collecting", 1);
}

#[test]
fn ids_that_the_queue_has_already_are_counted_and_not_published() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 5);
    fleet.produce("");
    fleet.place.write("others.jsonl", "{\"id\":\"q1\",\"query\":\"Another question?\"}\n");
    let log = fleet.run(0, "produce --queries-file others.jsonl --run r");
    assert!(log.contains("0 jobs published, 1 already queued"), "{log}");
    assert_eq!(run(&fleet.status(), "r")["published"], 5);
    let listening = fleet.spawn("produce --listen 127.0.0.1:0 --run r --token secret");
    let answer = post(&listening, r#"{"id":"q2","query":"Another question?"}"#, "secret");
    assert!(answer.contains(r#""accepted":1,"answered":0,"already_queued":1"#), "{answer}");
}

#[test]
fn corrected_input_is_answered_once_its_failed_line_is_taken_out() {
    let fleet = Fleet::start();
    let good = "{\"id\":\"q0\",\"query\":\"one\"}\n";
    fleet.place.write("queries.jsonl", format!("{good}{{\"id\":\"q1\",\"query\":7}}\n"));
    let produce = "produce --queries-file queries.jsonl --run r";
    fleet.run(3, produce);
    let _worker = fleet.noop("");
    let collector = fleet.collect("");
    collector.wait_for("written", 2);
    let log = fleet.run(0, "retry --run r");
    assert!(log.contains("0 jobs put back") && log.contains("1 failed lines are of bad"), "{log}");
    fleet.place.write("queries.jsonl", format!("{good}{{\"id\":\"q1\",\"query\":\"two\"}}\n"));
    let log = fleet.run(0, produce);
    assert!(log.contains("0 jobs published, 2 already answered"), "{log}");
    let log = fleet.run(0, "retry --run r --input-failures");
    assert!(log.contains("1 failed lines taken out"), "{log}");
    let log = fleet.run(0, produce);
    assert!(log.contains("1 jobs published, 1 already answered"), "{log}");
    collector.wait_for("written", 3);
    collector.signal(Signal::TERM);
    assert_eq!(collector.wait(DEADLINE).code(), Some(0), "{}", collector.log());
    fleet.assert_done(&fleet.collect("--until-done"), 2);
    assert_eq!(fleet.place.lines("results.jsonl.retried.jsonl").len(), 1);
}

#[test]
fn cancelled_run_ends_with_what_it_has_and_harms_no_other() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 100);
    fleet.produce("");
    fleet.run(0, "produce --queries-file queries.jsonl --run r.2");
    fleet.run(0, "produce --queries-file queries.jsonl --run r --model nobody");
    let worker = fleet.noop("--noop-latency 500 --noop-slots 4");
    let collector = fleet.collect("--until-done");
    collector.wait_for("written", 4);
    let log = fleet.run(0, "cancel --run r");
    assert!(log.contains("jobs dropped"), "{log}");
    // Also those that nobody has the model for; what the worker holds comes to its end.
    assert_eq!(collector.wait(DEADLINE).code(), Some(0), "{}", collector.log());
    let lines = fleet.ids().len();
    assert!((4..100).contains(&lines), "{lines}");
    assert_eq!(run(&fleet.status(), "r")["queued"], 0);
    worker.kill();
    let _worker = fleet.noop("");
    let other = "collect --run r.2 --output-file other.jsonl --until-done";
    fleet.run(0, other);
    fleet.place.assert_each_once("other.jsonl", 100);
    let producer = fleet.spawn("produce --listen 127.0.0.1:0 --run r");
    fleet.wait_for("the producer", |state| run(state, "r")["is_published"] == false);
    let log = fleet.run(1, "cancel --run r");
    assert!(log.contains("still being published from http://"), "{log}");
    assert!(producer.is_running());
}

#[test]
fn names_that_nobody_knows_are_told_with_those_there_are() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 2);
    let log = fleet.produce("--model nobody");
    assert!(log.contains("no worker runs yet"), "{log}");
    let _worker = fleet.noop("");
    fleet.wait_for("the worker", |state| state["workers"].as_array().unwrap().len() == 1);
    let log = fleet.produce("--model nobody");
    assert!(log.contains("no worker has the model 'nobody'"), "{log}");
    assert!(log.contains("workers of: flotilla-reader"), "{log}");
    let table = fleet.run(0, "status");
    assert!(table.contains("run r waits: no worker has its model nobody"), "{table}");
    for command in ["status --run typo", "retry --run typo"] {
        let log = fleet.run(1, command);
        assert!(log.contains("nothing is known of a run 'typo'"), "{log}");
        assert!(log.contains("runs of the last day: r"), "{log}");
    }
    let missing = "reconcile --queries-file queries.jsonl --output-file none.jsonl --run r --force";
    let log = fleet.run(0, missing);
    assert!(log.contains("there is no none.jsonl"), "{log}");
}
