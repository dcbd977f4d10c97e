//! Queries in, answers out, through real servers.

use std::collections::BTreeMap;
use std::io::Write;

use flotilla_tests::process::DEADLINE;
use flotilla_tests::{Workplace, repository};
use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Fleet, LEASE, run};

#[test]
fn fleet_gives_the_answers_of_a_run_in_one_process() {
    let fleet = Fleet::start();
    let examples = repository().join("examples");
    let input = format!(
        "--queries-file {0}/queries.jsonl --corpus-path {0}/corpus --temperature 0",
        examples.display()
    );
    let workers: Vec<_> =
        (0..2).map(|_| fleet.spawn(&format!("work --devices cpu --threads 1 {LEASE}"))).collect();
    fleet.run(0, &format!("produce {input} --run r"));
    let collector = fleet.collect("--until-done --statistics-file statistics.json");
    let status = collector.wait(DEADLINE);
    assert_eq!(status.code(), Some(0), "{}", collector.log());
    for worker in workers {
        worker.signal(Signal::TERM);
        assert_eq!(worker.wait(DEADLINE).code(), Some(0), "{}", worker.log());
    }
    fleet.place.run_expecting(0, &format!("run {input} --output-file alone.jsonl"));
    assert_eq!(answers(&fleet.place, "results.jsonl"), answers(&fleet.place, "alone.jsonl"));
    let statistics: Value = serde_json::from_str(&fleet.place.read("statistics.json")).unwrap();
    assert_eq!(statistics["answered"], fleet.ids().len());
    let state = fleet.status();
    assert_eq!(state["workers"], Value::Array(Vec::new()), "workers say when they leave");
}

/// What of a line must not depend on who computed it, by id.
fn answers(place: &Workplace, name: &str) -> BTreeMap<String, Value> {
    let lines = place.lines(name).into_iter().map(|mut line| {
        let fields = line.as_object_mut().unwrap();
        for varying in ["retrieval_time", "inference_time", "total_time", "worker_rank"] {
            fields.remove(varying).unwrap();
        }
        (fields["id"].as_str().unwrap().to_owned(), line)
    });
    lines.collect()
}

#[test]
fn queries_stream_in_while_it_runs_and_nothing_comes_twice() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 200);
    let _worker = fleet.noop("");
    let first = fleet.collect("");
    fleet.produce("");
    first.wait_for("written", 1);
    fleet.place.write_queries("queries.jsonl", 500);
    // The first 200 again: the queue knows them.
    fleet.produce("");
    first.wait_for("written", 500);
    // Those of an earlier run that the queue has forgotten are known to the collector.
    first.signal(Signal::TERM);
    assert_eq!(first.wait(DEADLINE).code(), Some(0), "{}", first.log());
    fleet.assert_done(&fleet.collect("--until-done"), 500);
}

#[test]
fn several_runs_at_once_have_an_output_each() {
    let fleet = Fleet::start();
    let _worker = fleet.noop("");
    std::fs::create_dir(fleet.place.path("outputs")).unwrap();
    let redis = fleet.redis.url();
    let collector =
        fleet.spawn(&format!("collect --output-dir outputs --redis-url {redis} {LEASE}"));
    for (name, count) in [("one", 100), ("two", 50), ("a.b*c> d/é", 25)] {
        let file = fleet.place.path("queries.jsonl");
        fleet.place.write_queries("queries.jsonl", count);
        let mut produce = fleet.place.command("produce --queries-file");
        produce.arg(file).args(["--run", name]).env("FLOTILLA_NATS_URL", fleet.nats.url());
        assert!(produce.status().unwrap().success());
    }
    collector.wait_for("written", 175);
    collector.signal(Signal::TERM);
    assert_eq!(collector.wait(DEADLINE).code(), Some(0), "{}", collector.log());
    fleet.place.assert_each_once("outputs/one.jsonl", 100);
    fleet.place.assert_each_once("outputs/two.jsonl", 50);
    let others = std::fs::read_dir(fleet.place.path("outputs")).unwrap().count();
    assert_eq!(others, 3);
}

#[test]
fn queries_come_from_a_growing_file() {
    let fleet = Fleet::start();
    let _worker = fleet.noop("");
    let collector = fleet.collect("");
    fleet.place.write("queries.jsonl", "");
    let producer = fleet.spawn("produce --queries-file queries.jsonl --run r --follow");
    let mut file =
        std::fs::OpenOptions::new().append(true).open(fleet.place.path("queries.jsonl")).unwrap();
    for number in 0..20 {
        writeln!(file, r#"{{"id":"q{number}","query":"What is number {number}?"}}"#).unwrap();
        collector.wait_for("written", number + 1);
    }
    producer.signal(Signal::INT);
    assert_eq!(producer.wait(DEADLINE).code(), Some(0), "{}", producer.log());
    fleet.place.assert_each_once("results.jsonl", 20);
}

#[test]
fn queries_come_through_stdin() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 300);
    let queries = std::fs::File::open(fleet.place.path("queries.jsonl")).unwrap();
    let mut produce = fleet.place.command("produce --queries-file - --run r");
    produce.env("FLOTILLA_NATS_URL", fleet.nats.url()).stdin(queries);
    assert!(produce.status().unwrap().success());
    assert_eq!(run(&fleet.status(), "r")["queued"], 300);
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 300);
}

#[test]
fn run_with_servers_gives_the_same_answers_alone_and_with_help() {
    let fleet = Fleet::start();
    let examples = repository().join("examples");
    let input = format!(
        "run --queries-file {0}/queries.jsonl --corpus-path {0}/corpus --temperature 0 --threads 1",
        examples.display()
    );
    let servers = format!("--nats-url {} --redis-url {}", fleet.nats.url(), fleet.redis.url());
    fleet.place.run_expecting(0, &format!("{input} --output-file memory.jsonl"));
    fleet.place.run_expecting(0, &format!("{input} --output-file servers.jsonl {servers}"));
    assert_eq!(answers(&fleet.place, "servers.jsonl"), answers(&fleet.place, "memory.jsonl"));
    // Again: everything has its line.
    let before = fleet.place.read("servers.jsonl");
    fleet.place.run_expecting(0, &format!("{input} --output-file servers.jsonl {servers}"));
    assert_eq!(fleet.place.read("servers.jsonl"), before);

    let _helper = fleet.spawn(&format!("work --threads 1 {LEASE}"));
    fleet
        .place
        .run_expecting(0, &format!("{input} --output-file helped.jsonl --workers 0 {servers}"));
    assert_eq!(answers(&fleet.place, "helped.jsonl"), answers(&fleet.place, "memory.jsonl"));
    fleet.place.run_expecting(2, &format!("{input} --output-file none.jsonl --workers 0"));
}
