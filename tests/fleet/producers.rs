//! Several producers of one run: it is complete when all of them have published everything.

use flotilla_tests::process::{DEADLINE, Process};
use rustix::process::Signal;

use crate::harness::{Fleet, run};

/// A fleet with 30 queries, of which one producer published 10 and ended well, and another died with
/// 20 of its file; and a collector that has written them all and waits.
fn widowed() -> (Fleet, [Process; 2]) {
    let fleet = Fleet::start();
    let worker = fleet.noop("");
    fleet.place.write_queries("one.jsonl", 10);
    // The last line may still grow, so it is not read before its newline.
    fleet.place.write_queries("two.jsonl", 30);
    let text = fleet.place.read("two.jsonl") + "\n";
    fleet.place.write("two.jsonl", text);
    let collector = fleet.collect("--until-done");
    let producer = fleet.spawn("produce --queries-file two.jsonl --run r --follow");
    collector.wait_for("written", 30);
    fleet.run(0, "produce --queries-file one.jsonl --run r");
    producer.kill();
    collector.wait_for("is gone and has not published everything", 1);
    let state =
        fleet.wait_for("the loss", |state| run(state, "r")["gone_producers"][0].is_string());
    let gone = run(&state, "r")["gone_producers"][0].as_str().unwrap();
    assert!(gone.contains("two.jsonl on "), "{gone}");
    assert_eq!(run(&state, "r")["is_published"], false);
    let table = fleet.run(0, "status");
    assert!(table.contains("run r is not all published: the producer of "), "{table}");
    assert!(collector.is_running());
    (fleet, [collector, worker])
}

#[test]
fn run_is_complete_when_the_last_of_its_producers_has_finished() {
    let fleet = Fleet::start();
    let _worker = fleet.noop("");
    fleet.place.write_queries("queries.jsonl", 20);
    let listening = fleet.spawn("produce --listen 127.0.0.1:0 --run r");
    listening.wait_for("listening at", 1);
    fleet.wait_for("its first word", |state| run(state, "r")["published"] == 0);
    fleet.produce("");
    let collector = fleet.collect("--until-done");
    collector.wait_for("written", 20);
    let state = fleet.wait_for("an empty queue", |state| {
        let run = run(state, "r");
        run["done"] == 20 && run["queued"] == 0 && run["in_flight"] == 0 && run["unwritten"] == 0
    });
    assert_eq!(run(&state, "r")["is_published"], false);
    assert_eq!(run(&state, "r")["published"], 20);
    assert!(!collector.has_line("results.jsonl has", 1, std::time::Duration::from_secs(1)));
    listening.signal(Signal::TERM);
    assert_eq!(listening.wait(DEADLINE).code(), Some(0), "{}", listening.log());
    fleet.assert_done(&collector, 20);
    assert_eq!(run(&fleet.status(), "r")["is_published"], true);
}

#[test]
fn run_waits_for_a_producer_that_died_until_its_command_is_run_again() {
    let (fleet, [collector, _worker]) = widowed();
    fleet.run(0, "produce --queries-file two.jsonl --run r");
    fleet.assert_done(&collector, 30);
    assert_eq!(run(&fleet.status(), "r")["gone_producers"].as_array().unwrap().len(), 0);
}

#[test]
fn run_waits_for_a_producer_that_died_until_its_input_is_reconciled_elsewhere() {
    let (fleet, [collector, _worker]) = widowed();
    let command =
        |file: &str| format!("reconcile --queries-file {file} --output-file results.jsonl --run r");
    // That of another file says nothing about it.
    fleet.run(0, &command("one.jsonl"));
    assert_eq!(run(&fleet.status(), "r")["gone_producers"].as_array().unwrap().len(), 1);
    fleet.place.write("elsewhere/two.jsonl", fleet.place.read("two.jsonl"));
    fleet.run(0, &command("elsewhere/two.jsonl"));
    fleet.assert_done(&collector, 30);
}
