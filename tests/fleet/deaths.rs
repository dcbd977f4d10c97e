//! Deaths at the worst moments, one by one, and what lives on although it is dead.

use std::os::unix::process::ExitStatusExt;

use flotilla_tests::Outsider;
use flotilla_tests::process::{DEADLINE, Process};
use rustix::process::Signal;

use crate::harness::{Fleet, run};

/// Waits for a process that takes its own life.
fn assert_dies(process: &Process) {
    let status = process.wait(DEADLINE);
    assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{}", process.log());
}

#[test]
fn worker_killed_between_the_outcome_and_the_ack_of_its_job_doubles_nothing() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 40);
    fleet.produce("");
    // The third outcome is stored, its job not acked, and others are in the middle.
    assert_dies(&fleet.spawn("work --backend noop --lease 2 --noop-slots 4 --die-after-publish 3"));
    let outsider = Outsider::connect(&fleet.nats.url());
    assert!(outsider.state("FLOTILLA_RESULTS").messages >= 3);
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 40);
    let stored = outsider.state("FLOTILLA_RESULTS").last_sequence;
    assert!(stored > 40, "{stored} outcomes: the job was not answered twice");
}

#[test]
fn hung_device_lets_its_jobs_go_while_its_process_lives() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 40);
    fleet.produce("");
    let collector = fleet.collect("--until-done");
    let hung = fleet.noop("--noop-hang q7 --noop-slots 4");
    hung.wait_for("the engine hangs", 1);
    let _worker = fleet.noop("");
    fleet.assert_done(&collector, 40);
    let state = fleet.status();
    let workers = state["workers"].as_array().unwrap();
    assert_eq!(workers.len(), 2, "{state:#}");
    assert!(workers.iter().all(|worker| worker["is_silent"] == false), "{state:#}");
    assert_eq!(run(&state, "r")["in_flight"], 0, "{state:#}");
    hung.signal(Signal::TERM);
    assert_eq!(hung.wait(DEADLINE).code(), Some(0), "{}", hung.log());
}

#[test]
fn redis_with_a_full_disk_is_waited_for_and_doubles_nothing() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 600);
    fleet.produce("");
    let collector = fleet.collect("--until-done");
    let _worker = fleet.noop("--noop-latency 20 --noop-slots 4");
    collector.wait_for("written", 50);
    // A limit of its files' sizes stands for the full disk.
    fleet.redis.process().limit_file_size(Some(1024));
    fleet.redis.process().wait_for("Error writing to the AOF file", 1);
    collector.wait_for("can't serve; waiting for it", 1);
    fleet.redis.process().limit_file_size(None);
    fleet.assert_done(&collector, 600);
}

#[test]
fn nats_server_with_a_full_disk_is_waited_for_and_loses_nothing() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 1_000);
    fleet.produce("");
    let collector = fleet.collect("");
    let _worker = fleet.noop("--noop-latency 20 --noop-slots 4");
    collector.wait_for("written", 50);
    fleet.nats.process().limit_file_size(Some(1024));
    fleet.place.write_queries("queries.jsonl", 2_000);
    let producer = fleet.spawn("produce --queries-file queries.jsonl --run r --window 4");
    producer.wait_for("has not confirmed a message", 1);
    fleet.nats.process().wait_for("file too large", 5);
    fleet.nats.process().limit_file_size(None);
    assert_eq!(producer.wait(DEADLINE).code(), Some(0), "{}", producer.log());
    collector.wait_for("written", 2_000);
    collector.kill();
    fleet.assert_done(&fleet.collect("--until-done"), 2_000);
}
