//! Jobs that fail, the dead letters they leave, and what brings them back.

use flotilla_tests::process::DEADLINE;
use rustix::process::Signal;

use crate::harness::{Fleet, LEASE, run};

/// A fleet whose job `q7` took its workers down and was given up; the others are answered.
fn poisoned() -> Fleet {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 40);
    fleet.produce("");
    let poison = format!("work --backend noop --noop-poison q7 --max-attempts 2 {LEASE}");
    let collector = fleet.collect("--until-done");
    while collector.is_running() {
        let worker = fleet.spawn(&poison);
        // It ends by the poison's abort, or is told to once the run is done.
        while worker.is_running() && collector.is_running() {
            worker.has_line("written", 1, std::time::Duration::from_millis(100));
        }
    }
    assert_eq!(collector.wait(DEADLINE).code(), Some(3), "{}", collector.log());
    fleet.place.assert_each_once("results.jsonl", 40);
    fleet
}

#[test]
fn only_the_poisonous_job_is_given_up_and_retry_brings_it_back() {
    let fleet = poisoned();
    let failed = || {
        let lines = fleet.place.lines("results.jsonl");
        let failed = lines.into_iter().filter(|line| line["success"] == false);
        failed.map(|line| line["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(failed(), ["q7"]);
    let state = fleet.status();
    assert_eq!((&run(&state, "r")["dead"], &run(&state, "r")["failed"]), (&1.into(), &1.into()));

    // Nobody takes the line out, so nothing is put back.
    let log = fleet.run(1, "retry --run r");
    assert!(log.contains("no collector") && log.contains("--output-file"), "{log}");
    assert_eq!(failed(), ["q7"]);

    let collector = fleet.collect("");
    fleet.wait_for("the collector", |state| run(state, "r")["is_collected"] == true);
    // A failed line is a line: only a retry puts its job back.
    let log = fleet.produce("");
    assert!(log.contains("0 jobs published, 40 already answered"), "{log}");
    let log = fleet.run(0, "retry --run r --id q7 --id nothing");
    assert!(log.contains("1 jobs put back, 1 failed lines"), "{log}");
    assert!(log.contains("no dead letter"), "{log}");
    assert!(failed().is_empty());
    assert_eq!(fleet.place.lines("results.jsonl.retried.jsonl").len(), 1);
    let _worker = fleet.noop("");
    collector.wait_for("written", 1);
    collector.signal(Signal::TERM);
    assert_eq!(collector.wait(DEADLINE).code(), Some(0), "{}", collector.log());
    fleet.assert_done(&fleet.collect("--until-done"), 40);
    let state = fleet.status();
    assert_eq!((&run(&state, "r")["dead"], &run(&state, "r")["failed"]), (&0.into(), &0.into()));
    let log = fleet.run(0, "retry --run r");
    assert!(log.contains("0 jobs put back"), "{log}");
}

#[test]
fn retry_takes_the_lines_out_itself_where_no_collector_runs() {
    let fleet = poisoned();
    let redis = fleet.redis.url();
    let retry = format!("retry --run r --output-file results.jsonl --redis-url {redis} --model");
    let log = fleet.run(0, &format!("{retry} another"));
    assert!(log.contains("0 jobs put back, 0 failed lines"), "{log}");
    let log = fleet.run(0, &format!("{retry} flotilla-reader"));
    assert!(log.contains("1 jobs put back, 1 failed lines"), "{log}");
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 40);
    let log = fleet.run(0, &format!("{retry} flotilla-reader"));
    assert!(log.contains("0 jobs put back, 0 failed lines"), "{log}");
}

#[test]
fn reconcile_publishes_what_a_wiped_queue_lost() {
    let mut fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 300);
    fleet.produce("");
    let collector = fleet.collect("");
    let worker = fleet.noop("--noop-latency 50 --noop-slots 4");
    collector.wait_for("written", 40);
    fleet.nats.wipe();
    drop((collector, worker));
    fleet.nats.restart();
    let command = "reconcile --queries-file queries.jsonl --output-file results.jsonl --run r";
    let log = fleet.run(0, command);
    let written = fleet.ids().len();
    assert!(log.contains(&format!("{} jobs published again", 300 - written)), "{log}");
    // They are queued now, and published again only by force.
    let log = fleet.run(1, command);
    assert!(log.contains("still queued") && log.contains("--force"), "{log}");
    fleet.run(0, &format!("{command} --force"));
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 300);
    let log = fleet.run(0, command);
    assert!(log.contains("0 jobs published again"), "{log}");
}

#[test]
fn reconcile_publishes_a_failed_job_whose_line_was_lost() {
    let fleet = poisoned();
    let command = "reconcile --queries-file queries.jsonl --output-file results.jsonl --run r";
    // A failed line is a line.
    let log = fleet.run(0, command);
    assert!(log.contains("0 jobs published again, 0 failed; 40 have their line"), "{log}");
    assert_eq!(run(&fleet.status(), "r")["dead"], 1);

    let text = fleet.place.read("results.jsonl");
    let older: Vec<&str> = text.lines().filter(|line| line.contains("\"success\":true")).collect();
    assert_eq!(older.len(), 39);
    fleet.place.write("results.jsonl", older.join("\n") + "\n");
    let log = fleet.run(0, command);
    assert!(log.contains("1 jobs published again"), "{log}");
    assert_eq!(run(&fleet.status(), "r")["dead"], 0);
    let _worker = fleet.noop("");
    fleet.assert_done(&fleet.collect("--until-done"), 40);
}

#[test]
fn reconcile_leaves_the_dead_letter_of_a_line_that_is_on_its_way() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 1);
    fleet.produce("");
    // One worker after the other is killed by it, until it is given up.
    let is_dead = || run(&fleet.status(), "r")["dead"] == 1;
    for _ in 0..8 {
        let worker =
            fleet.spawn(&format!("work --backend noop --noop-poison q0 --max-attempts 2 {LEASE}"));
        while worker.is_running() && !is_dead() {}
    }
    assert!(is_dead());
    let command = "reconcile --queries-file queries.jsonl --output-file results.jsonl --run r";
    let log = fleet.run(1, command);
    assert!(log.contains("1 outcomes of run 'r' are still queued"), "{log}");
    let log = fleet.run(0, &format!("{command} --force"));
    assert!(log.contains("1 jobs published again"), "{log}");
    assert_eq!(run(&fleet.status(), "r")["dead"], 1);
    let _worker = fleet.noop("");
    let collector = fleet.collect("--until-done");
    assert_eq!(collector.wait(DEADLINE).code(), Some(3), "{}", collector.log());
    fleet.place.assert_each_once("results.jsonl", 1);
}

#[test]
fn input_that_cannot_be_read_is_reported_and_harms_no_other() {
    let fleet = Fleet::start();
    fleet.place.write(
        "queries.jsonl",
        "{\"id\":\"q0\",\"query\":\"one\"}\n{\"id\":\"bad\",\"query\":7}\nnonsense\n{\"id\":\"q1\",\"query\":\"two\"}\n",
    );
    let produce = "produce --queries-file queries.jsonl --run r";
    fleet.run(3, &format!("{produce} --rejected-file elsewhere.jsonl"));
    let rejected = fleet.place.lines("elsewhere.jsonl");
    assert_eq!((rejected.len(), &rejected[0]["line"]), (1, &3.into()));
    assert!(!fleet.place.path("queries.jsonl.rejected.jsonl").exists());
    let log = fleet.run(3, produce);
    assert!(log.contains("queries.jsonl:3"), "{log}");
    assert_eq!(fleet.place.lines("queries.jsonl.rejected.jsonl").len(), 1);
    let _worker = fleet.noop("");
    let collector = fleet.collect("--until-done");
    assert_eq!(collector.wait(DEADLINE).code(), Some(3), "{}", collector.log());
    let ids: Vec<String> = fleet.ids().into_iter().collect();
    assert_eq!(ids, ["bad", "q0", "q1"]);
}
