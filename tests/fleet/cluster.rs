//! A fleet whose streams are kept by three NATS servers.

use std::time::Instant;

use flotilla_tests::process::{DEADLINE, Process};
use flotilla_tests::{NatsCluster, Outsider};
use rustix::process::Signal;

use crate::harness::{Fleet, LEASE};

/// Waits until the followers of a stream are as expected; who leads it then.
fn leader(outsider: &Outsider, stream: &str, is_so: impl Fn(&[String]) -> bool) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let (leader, current) = outsider.replicas(stream);
        match leader {
            Some(leader) if is_so(&current) => return leader,
            leader => assert!(Instant::now() < deadline, "{stream}: {leader:?}, {current:?}"),
        }
    }
}

/// Runs the program to its end, which must be a good one.
fn run(fleet: &Fleet, url: &str, args: &str) -> Process {
    let process = fleet.spawn_at(url, args);
    assert_eq!(process.wait(DEADLINE).code(), Some(0), "{}", process.log());
    process
}

#[test]
fn cluster_that_loses_one_server_after_the_other_loses_nothing() {
    const STREAMS: [&str; 3] = ["FLOTILLA_JOBS", "FLOTILLA_RESULTS", "KV_flotilla-status"];
    let fleet = Fleet::start();
    let mut cluster = NatsCluster::start(3);
    let url = cluster.url();
    fleet.place.write_queries("queries.jsonl", 500);
    // A worker that does not ask for replicas may be the first, and is no hindrance.
    let work = format!("work --backend noop {LEASE} --noop-latency 100 --noop-slots 8");
    let workers = [fleet.spawn_at(&url, &work), fleet.spawn_at(&url, &work)];
    workers.iter().for_each(|worker| worker.wait_for("worker is ready", 1));
    let produce = "produce --queries-file queries.jsonl --run r --nats-replicas 3";
    run(&fleet, &url, produce);
    let redis = fleet.redis.url();
    let collect =
        format!("collect --run r --output-file results.jsonl --redis-url {redis} {LEASE}");
    let collector = fleet.spawn_at(&url, &collect);
    let outsider = Outsider::connect(&cluster.servers[0].url());
    for stream in STREAMS {
        leader(&outsider, stream, |current| current.len() == 2);
    }
    collector.wait_for("written", 100);

    let lost = leader(&outsider, "FLOTILLA_JOBS", |_| true);
    let number: usize = lost[1..].parse().unwrap();
    cluster.servers[number].kill();
    collector.wait_for("written", 500);
    cluster.servers[number].restart();
    for stream in STREAMS {
        leader(&outsider, stream, |current| current.len() == 2);
    }
    // From here on nothing goes without the one that came back.
    cluster.servers[(number + 1) % 3].kill();
    fleet.place.write_queries("queries.jsonl", 800);
    run(&fleet, &url, produce);
    collector.wait_for("written", 800);
    collector.signal(Signal::TERM);
    fleet.assert_done(&collector, 800);
}

#[test]
fn one_server_alone_keeps_no_replicas_and_says_so() {
    let fleet = Fleet::start();
    let log = fleet.run(1, "status --nats-replicas 3");
    assert!(log.contains("expected a cluster of at least 3 NATS servers"), "{log}");
    // What others have made is used as it is.
    fleet.run(0, "status");
    let log = fleet.run(0, "status --nats-replicas 3");
    assert!(
        log.contains("expected 3 servers to keep this stream, found a server that is alone"),
        "{log}"
    );
}
