//! Runs whose output can't be written, beside others whose can.

use std::time::Instant;

use flotilla_tests::process::{DEADLINE, Process, with_failing_writes};
use rustix::process::Signal;

use crate::harness::{Fleet, LEASE, get, run};

/// A collector of all runs, which a full disk doesn't kill.
fn collect_all(fleet: &Fleet) -> Process {
    let mut command = with_failing_writes(flotilla_tests::program());
    let args = format!("collect --verbose --output-dir outputs --metrics-addr 127.0.0.1:0 {LEASE}");
    command
        .args(args.split_whitespace())
        .current_dir(fleet.place.path("."))
        .env("FLOTILLA_NATS_URL", fleet.nats.url());
    Process::start(&mut command)
}

/// Asks for the collector's health until it ends so.
fn wait_for_health(collector: &Process, end: &str) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let health = get(collector, "/healthz");
        if health.ends_with(end) {
            return health;
        }
        assert!(Instant::now() < deadline, "waiting for '{end}': {health}\n{}", collector.log());
    }
}

#[test]
fn run_that_cannot_be_written_is_told_and_tried_again_while_others_go_on() {
    let fleet = Fleet::start();
    fleet.place.write("outputs/bad.jsonl", "nonsense\n");
    let _worker = fleet.noop("");
    for (name, count) in [("bad", 20), ("good", 30)] {
        fleet.place.write_queries("queries.jsonl", count);
        fleet.run(0, &format!("produce --queries-file queries.jsonl --run {name}"));
    }
    let collector = collect_all(&fleet);
    collector.wait_for("written", 30);
    fleet.place.assert_each_once("outputs/good.jsonl", 30);
    let reason = "outputs/bad.jsonl:1: expected a line of flotilla's results";
    collector.wait_for(reason, 1);

    let health = get(&collector, "/healthz");
    assert!(health.contains("503 Service Unavailable"), "{health}");
    assert!(health.contains(&format!("run 'bad' is not collected: {reason}")), "{health}");
    let page = get(&collector, "/metrics");
    for up in ["output_up{run=\"bad\"} 0\n", "output_up{run=\"good\"} 1\n"] {
        assert!(page.contains(up), "{up} is not in\n{page}");
    }
    let state = fleet.wait_for("the reason", |state| !run(state, "bad")["error"].is_null());
    let bad = run(&state, "bad");
    assert!(bad["error"].as_str().unwrap().starts_with(reason), "{bad:#}");
    assert_eq!((&bad["is_collected"], &bad["unwritten"]), (&false.into(), &20.into()));
    assert_eq!(run(&state, "good")["error"], serde_json::Value::Null);
    let table = fleet.run(0, "status");
    assert!(table.contains("not written"), "{table}");
    assert!(table.contains(&format!("run bad is not written: {reason}")), "{table}");

    std::fs::remove_file(fleet.place.path("outputs/bad.jsonl")).unwrap();
    collector.wait_for("written", 50);
    wait_for_health(&collector, "ok\n");
    fleet.wait_for("the end of the trouble", |state| run(state, "bad")["is_collected"] == true);
    collector.signal(Signal::TERM);
    assert_eq!(collector.wait(DEADLINE).code(), Some(0), "{}", collector.log());
    fleet.place.assert_each_once("outputs/bad.jsonl", 20);
}

#[test]
fn full_disk_is_told_until_there_is_room_and_nothing_is_lost() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 200);
    fleet.produce("");
    let collector = collect_all(&fleet);
    collector.wait_for("collecting", 1);
    collector.limit_file_size(Some(0));
    let _worker = fleet.noop("");
    collector.wait_for("this run is not collected", 1);
    // An output that can be opened is not yet one that can be written.
    collector.wait_for("collecting", 2);
    let health = get(&collector, "/healthz");
    assert!(health.contains("cannot write outputs/r.jsonl: File too large"), "{health}");
    collector.limit_file_size(None);
    wait_for_health(&collector, "ok\n");
    collector.wait_for("written", 200);
    collector.signal(Signal::TERM);
    assert_eq!(collector.wait(DEADLINE).code(), Some(0), "{}", collector.log());
    fleet.place.assert_each_once("outputs/r.jsonl", 200);
}

#[test]
fn collector_that_leaves_a_run_uncollected_ends_with_an_error() {
    let fleet = Fleet::start();
    std::fs::create_dir_all(fleet.place.path("outputs/r.jsonl")).unwrap();
    fleet.place.write_queries("queries.jsonl", 1);
    fleet.produce("");
    let collector = collect_all(&fleet);
    collector.wait_for("this run is not collected", 1);
    collector.signal(Signal::TERM);
    assert_eq!(collector.wait(DEADLINE).code(), Some(1), "{}", collector.log());
    assert_eq!(run(&fleet.status(), "r")["queued"], 1);
}
