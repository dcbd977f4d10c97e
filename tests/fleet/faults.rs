//! Whatever is killed, stopped or cut off, each id ends as one line.

use std::os::unix::process::ExitStatusExt;

use flotilla_tests::process::{DEADLINE, Process};
use flotilla_tests::proxy::Proxy;
use rustix::process::Signal;

use crate::harness::{Fleet, LEASE, run};

/// A worker that never answers, once it holds jobs.
fn holder(fleet: &Fleet, more: &str) -> Process {
    let worker = fleet.noop(&format!("--noop-latency 3600000 {more}"));
    fleet.wait_for("jobs in flight", |state| run(state, "r")["in_flight"].as_u64() > Some(0));
    worker
}

#[test]
fn worker_killed_with_jobs_in_flight_loses_nothing() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 200);
    fleet.produce("");
    let collector = fleet.collect("--until-done");
    holder(&fleet, "").kill();
    let _worker = fleet.noop("");
    fleet.assert_done(&collector, 200);
    let again = fleet.place.lines("results.jsonl");
    let again = again.iter().filter(|line| line["attempts"].as_u64() > Some(1)).count();
    assert!(again >= 1, "no job was delivered again");
}

#[test]
fn drained_worker_gives_its_jobs_back_and_ends_in_good_order() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 200);
    fleet.produce("");
    let leaving = holder(&fleet, "--drain-timeout 0.2");
    leaving.signal(Signal::TERM);
    assert_eq!(leaving.wait(DEADLINE).code(), Some(0), "{}", leaving.log());
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 200);
}

#[test]
fn second_signal_stops_a_worker_at_once() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 10);
    fleet.produce("");
    let leaving = holder(&fleet, "--drain-timeout 3600");
    leaving.signal(Signal::TERM);
    leaving.wait_for("again to stop at once", 1);
    leaving.signal(Signal::TERM);
    assert_eq!(leaving.wait(DEADLINE).code(), Some(130), "{}", leaving.log());
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 10);
}

#[test]
fn worker_stopped_beyond_its_lease_doubles_nothing() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 100);
    fleet.produce("");
    let first = fleet.collect("");
    let stopped = fleet.noop("--noop-latency 3000 --noop-slots 32");
    fleet.wait_for("jobs in flight", |state| run(state, "r")["in_flight"].as_u64() > Some(0));
    stopped.stop();
    let _worker = fleet.noop("");
    // The others finish what it held.
    first.wait_for("written", 100);
    stopped.cont();
    stopped.signal(Signal::TERM);
    assert_eq!(stopped.wait(DEADLINE).code(), Some(0), "{}", stopped.log());
    first.kill();
    fleet.assert_done(&fleet.collect("--until-done"), 100);
}

#[test]
fn collector_killed_again_and_again_writes_each_id_once() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 1_500);
    fleet.produce("");
    let _worker = fleet.noop("--noop-latency 20 --noop-slots 8");
    for lines in [1, 20, 60] {
        let collector = fleet.collect("");
        collector.wait_for("written", lines);
        collector.kill();
    }
    fleet.assert_done(&fleet.collect("--until-done"), 1_500);
}

#[test]
fn collector_that_dies_after_any_step_writes_each_id_once() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 3_000);
    fleet.produce("");
    let _worker = fleet.noop("--noop-latency 5 --noop-slots 8");
    for step in ["pulled", "checked", "picked", "written", "synced", "marked", "acked"] {
        let collector = fleet.collect(&format!("--abort-at {step}"));
        let status = collector.wait(DEADLINE);
        assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{step}\n{}", collector.log());
    }
    fleet.assert_done(&fleet.collect("--until-done"), 3_000);
}

#[test]
fn second_collector_waits_and_takes_over() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 300);
    fleet.produce("");
    let first = fleet.collect("");
    let worker = fleet.noop("--noop-latency 200 --noop-slots 4");
    first.wait_for("written", 5);
    let second = fleet.collect("--until-done");
    second.wait_for("waiting", 1);
    let refused = fleet.collect("--no-wait");
    assert_eq!(refused.wait(DEADLINE).code(), Some(1));
    assert!(refused.log().contains("is being written by another"), "{}", refused.log());
    assert_eq!(second.count("written"), 0);
    first.kill();
    second.wait_for("written", 5);
    drop(worker);
    let _worker = fleet.noop("");
    fleet.assert_done(&second, 300);
}

#[test]
fn nats_server_killed_under_load_loses_nothing() {
    let mut fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 2_000);
    let collector = fleet.collect("");
    let _worker = fleet.noop("--noop-latency 5 --noop-slots 16");
    let producer = fleet.spawn("produce --queries-file queries.jsonl --run r --window 4");
    for lines in [50, 300] {
        collector.wait_for("written", lines);
        fleet.nats.restart();
    }
    assert_eq!(producer.wait(DEADLINE).code(), Some(0), "{}", producer.log());
    collector.kill();
    fleet.assert_done(&fleet.collect("--until-done"), 2_000);
}

#[test]
fn redis_killed_flushed_and_rolled_back_doubles_nothing() {
    let mut fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 1_000);
    fleet.produce("");
    let collector = fleet.collect("--until-done");
    let _worker = fleet.noop("--noop-latency 10 --noop-slots 4");
    collector.wait_for("written", 50);
    let older = fleet.redis.copy();
    collector.wait_for("written", 150);
    fleet.redis.flush_all();
    collector.wait_for("written", 300);
    fleet.redis.restart();
    collector.wait_for("written", 450);
    fleet.redis.restore(&older);
    fleet.assert_done(&collector, 1_000);
}

#[test]
fn links_cut_without_a_reset_lose_nothing() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 400);
    fleet.produce("");
    let proxy = Proxy::start(fleet.nats.address());
    let collector = fleet.collect("");
    let url = fleet.nats.url_at(proxy.address());
    let work = format!("work --backend noop --noop-latency 20 --noop-slots 4 {LEASE}");
    let cut_off = fleet.spawn_at(&url, &work);
    collector.wait_for("written", 20);
    proxy.hold();
    let other = fleet.noop("");
    collector.wait_for("written", 400);
    proxy.pass();
    for worker in [cut_off, other] {
        worker.signal(Signal::TERM);
        assert_eq!(worker.wait(DEADLINE).code(), Some(0), "{}", worker.log());
    }
    collector.kill();
    fleet.assert_done(&fleet.collect("--until-done"), 400);
}

#[test]
fn producer_killed_and_run_again_publishes_everything_once() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 5_000);
    let command = "produce --queries-file queries.jsonl --run r --window 1";
    let killed = fleet.spawn(command);
    fleet.wait_for("jobs", |state| run(state, "r")["queued"].as_u64() > Some(0));
    killed.kill();
    fleet.run(0, &command.replace("--window 1", ""));
    assert_eq!(run(&fleet.status(), "r")["queued"], 5_000, "the queue knew what it had");
    let _worker = fleet.noop("--noop-slots 256");
    fleet.assert_done(&fleet.collect("--until-done"), 5_000);
}

#[test]
fn full_output_disk_stops_the_collector_and_loses_nothing() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 500);
    fleet.produce("");
    let _worker = fleet.noop("");
    // A file-size limit stands for a full disk: the write that crosses it is cut short.
    let limited = std::process::Command::new("bash")
        .arg("-c")
        .arg("trap '' XFSZ; ulimit -f 16; exec \"$0\" collect --run r --output-file results.jsonl")
        .arg(flotilla_tests::program())
        .current_dir(fleet.place.path("."))
        .env("FLOTILLA_NATS_URL", fleet.nats.url())
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&limited.stderr);
    assert_eq!(limited.status.code(), Some(1), "{log}");
    assert!(log.contains("cannot write results.jsonl: File too large"), "{log}");
    fleet.assert_done(&fleet.collect("--until-done"), 500);
}
