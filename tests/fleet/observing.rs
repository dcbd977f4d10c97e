//! `flotilla status`, /metrics and /healthz while a fleet works.

use rustix::process::Signal;

use crate::harness::{Fleet, LEASE, get, run};

#[test]
fn status_tells_runs_and_workers_while_they_work() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 200);
    fleet.produce("");
    let state = fleet.status();
    let waiting = run(&state, "r");
    assert_eq!((&waiting["queued"], &waiting["published"]), (&200.into(), &200.into()));
    assert_eq!((&waiting["is_published"], &waiting["is_collected"]), (&true.into(), &false.into()));
    assert_eq!(waiting["models"][0], "flotilla-reader");

    let collector = fleet.collect("");
    let worker = fleet.noop("--noop-latency 2000 --noop-slots 8");
    let state = fleet.wait_for("work", |state| {
        let run = run(state, "r");
        run["in_flight"] == 8 && run["is_collected"] == true && run["done"].as_u64() > Some(0)
    });
    let worker_state = &state["workers"][0];
    assert_eq!(worker_state["slots"], 8);
    assert_eq!(worker_state["model"], "flotilla-reader");
    assert_eq!(worker_state["is_silent"], false);
    let output = fleet.place.path("results.jsonl").canonicalize().unwrap();
    assert_eq!(run(&state, "r")["output"], output.to_str().unwrap());
    let table = fleet.run(0, "status");
    assert!(table.contains("IN FLIGHT") && table.contains("flotilla-reader"), "{table}");

    worker.kill();
    fleet.wait_for("the silent worker", |state| state["workers"][0]["is_silent"] == true);
    let _worker = fleet.noop("--noop-slots 256");
    collector.wait_for("written", 200);
    fleet.wait_for("the end", |state| {
        let run = run(state, "r");
        run["done"] == 200
            && run["queued"] == 0
            && run["in_flight"] == 0
            && run["eta_seconds"] == 0.0
    });
}

#[test]
fn watched_status_goes_on_until_it_is_interrupted() {
    let fleet = Fleet::start();
    let watching = fleet.spawn("status --watch 0.2 --json");
    watching.wait_for("\"runs\":", 3);
    watching.signal(Signal::INT);
    assert_eq!(watching.wait(flotilla_tests::process::DEADLINE).code(), Some(0));
}

#[test]
fn every_role_tells_its_metrics_and_its_health() {
    let fleet = Fleet::start();
    fleet.place.write_queries("queries.jsonl", 50);
    let any = "--metrics-addr 127.0.0.1:0";
    let producer =
        fleet.spawn(&format!("produce --queries-file queries.jsonl --run r --follow {any}"));
    let worker = fleet.spawn(&format!("work --backend noop {LEASE} {any}"));
    let collector = fleet.collect(any);
    collector.wait_for("written", 49);
    for (role, names) in [
        (&producer, &["jobs_published_total 49", "queue_up 1", "queue_jobs_waiting{"][..]),
        (
            &worker,
            &[
                "num_requests_running{model_name=\"flotilla-reader\",engine=\"0\"} 0",
                "request_success_total{",
                "e2e_request_latency_seconds_bucket{",
                "generation_tokens_total{",
                "kv_cache_usage_perc{",
            ][..],
        ),
        (
            &collector,
            &["outcomes_written_total{run=\"r\"} 49", "outcomes_duplicate_total{run=\"r\"} 0"][..],
        ),
    ] {
        assert!(get(role, "/healthz").ends_with("ok\n"));
        let page = get(role, "/metrics");
        assert!(page.contains("text/plain; version=0.0.4"), "{page}");
        for name in names {
            assert!(page.contains(&format!("\nflotilla:{name}")), "{name} is not in\n{page}");
        }
    }
}
