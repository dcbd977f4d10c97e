//! Full streams, forgotten duplicates, strangers, and as many workers as a fleet may have.

use std::time::{Duration, Instant};

use flotilla_tests::Outsider;
use flotilla_tests::process::{DEADLINE, Process};
use serde_json::Value;

use crate::harness::{Fleet, LEASE, run};

const JOBS: &str = "FLOTILLA_JOBS";
const RESULTS: &str = "FLOTILLA_RESULTS";

/// A fleet whose streams exist, and somebody who may change them.
fn with_outsider() -> (Fleet, Outsider) {
    let fleet = Fleet::start();
    fleet.status();
    let outsider = Outsider::connect(&fleet.nats.url());
    (fleet, outsider)
}

#[test]
fn full_job_stream_makes_the_producer_wait_and_drops_nothing() {
    let (fleet, outsider) = with_outsider();
    outsider.set_max_messages(JOBS, 20);
    fleet.place.write_queries("queries.jsonl", 400);
    let producer = fleet.spawn("produce --queries-file queries.jsonl --run r --window 32");
    producer.wait_for("the queue is full", 1);
    assert_eq!(outsider.state(JOBS).messages, 20);
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 400);
    assert_eq!(producer.wait(DEADLINE).code(), Some(0), "{}", producer.log());
}

#[test]
fn full_outcome_stream_keeps_the_jobs_that_are_held_and_takes_no_others() {
    let (fleet, outsider) = with_outsider();
    outsider.set_max_messages(RESULTS, 10);
    fleet.place.write_queries("queries.jsonl", 100);
    fleet.produce("");
    let worker = fleet.noop("--noop-slots 4");
    worker.wait_for("the queue is full", 1);
    let held = |state: &Value| {
        let run = run(state, "r");
        (run["in_flight"].as_u64(), run["queued"].as_u64()) == (Some(4), Some(86))
    };
    let seen = |state: &Value| {
        let ago = state["workers"][0]["last_seen_seconds"].as_f64()?;
        Some(state["at"].as_f64()? - ago)
    };
    let before = fleet.wait_for("a full stream", |state| held(state) && seen(state).is_some());
    // Three leases later nothing has changed.
    let later = fleet.wait_for("three leases", |state| {
        assert!(held(state), "{state:#}");
        seen(state).unwrap() > seen(&before).unwrap() + 6.0
    });
    assert_eq!(later["workers"][0]["is_silent"], false);
    assert_eq!(outsider.state(RESULTS).messages, 10);
    fleet.assert_done(&fleet.collect("--until-done"), 100);
    let lines = fleet.place.lines("results.jsonl");
    assert!(lines.iter().all(|line| line["attempts"] == 1), "a lease ran out");
}

#[test]
fn jobs_published_again_after_the_duplicate_window_are_written_once() {
    let (fleet, outsider) = with_outsider();
    outsider.set_duplicate_window(JOBS, Duration::from_millis(100));
    fleet.place.write_queries("queries.jsonl", 50);
    fleet.produce("");
    let deadline = Instant::now() + DEADLINE;
    while outsider.state(JOBS).messages == 50 {
        assert!(Instant::now() < deadline, "the window does not end");
        fleet.produce("");
    }
    let queued = outsider.state(JOBS).messages;
    assert!(queued > 50);
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 50);
    assert_eq!(outsider.state(RESULTS).last_sequence, queued, "each was answered again");
}

#[test]
fn garbage_from_outside_is_put_aside_and_harms_nobody() {
    let (fleet, outsider) = with_outsider();
    fleet.place.write_queries("queries.jsonl", 60);
    let garbage: [&[u8]; 5] =
        [b"", b"garbage", b"{\"id\":\"q1\"}", b"\x81\xa7version\x01", b"\xff"];
    for bytes in garbage {
        outsider.publish("flotilla.jobs.flotilla-reader.r", bytes);
        outsider.publish("flotilla.results.r", bytes);
    }
    fleet.produce("");
    for bytes in garbage {
        outsider.publish("flotilla.jobs.flotilla-reader.r", bytes);
        outsider.publish("flotilla.results.r", bytes);
    }
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 60);
    assert_eq!(run(&fleet.status(), "r")["dead"], 20);
    // They are no jobs, so nothing of them can be put back.
    let log = fleet.run(0, "retry --run r --output-file results.jsonl");
    assert!(log.contains("0 jobs put back") && log.contains("20 dead letters"), "{log}");
}

#[test]
fn six_hundred_workers_share_the_jobs_without_a_stall() {
    let (fleet, outsider) = with_outsider();
    let group = format!("work --backend noop --noop-workers 100 --noop-slots 2 {LEASE}");
    let groups: Vec<Process> = (0..6).map(|_| fleet.spawn(&group)).collect();
    for group in &groups {
        group.wait_for("worker is ready", 100);
    }
    let deadline = Instant::now() + DEADLINE;
    while outsider.num_waiting(JOBS, "jobs-flotilla-reader") < 590 {
        assert!(Instant::now() < deadline, "not all workers ask for jobs");
    }
    fleet.place.write_queries("queries.jsonl", 6_000);
    let collector = fleet.collect("--until-done");
    fleet.produce("");
    fleet.assert_done(&collector, 6_000);
    let lines = fleet.place.lines("results.jsonl");
    assert!(lines.iter().all(|line| line["attempts"] == 1), "a job was delivered twice");
}

#[test]
fn sixty_four_workers_joined_and_killed_at_random_lose_nothing() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 3_000);
    fleet.produce("");
    let collector = fleet.collect("--until-done");
    let join =
        || fleet.spawn(&format!("work --backend noop --noop-latency 300 --noop-slots 2 {LEASE}"));
    let mut workers: Vec<Process> = (0..64).map(|_| join()).collect();
    for lines in (100..2_500).step_by(100) {
        collector.wait_for("written", lines);
        let unlucky = rand::random_range(0..workers.len());
        workers.swap_remove(unlucky).kill();
        if lines % 200 == 0 {
            workers.push(join());
        }
    }
    fleet.assert_done(&collector, 3_000);
}
