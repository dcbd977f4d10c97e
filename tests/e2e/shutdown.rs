//! Ctrl-C drains: what is running is finished and written, and the same command goes on.

use flotilla_tests::Workplace;
use rustix::process::Signal;

const RUN: &str = "run --queries-file queries.jsonl --output-file results.jsonl --max-new-tokens 4";

#[test]
fn interrupt_drains_and_the_same_command_goes_on() {
    for signal in [Signal::INT, Signal::TERM] {
        let place = Workplace::new();
        place.write_queries("queries.jsonl", 2_000);
        let mut running = place.start(RUN);
        assert!(running.wait_for("written", 5));
        running.signal(signal);
        let (status, log) = running.wait();
        assert_eq!(status.code(), Some(130), "{log}");
        assert!(log.contains("the same command goes on"), "{log}");
        let written = place.lines("results.jsonl").len();
        assert!((5..2_000).contains(&written), "{written} lines");
        assert!(place.lines("results.jsonl").iter().all(|line| line["success"] == true));
        place.run_expecting(0, RUN);
        place.assert_each_once("results.jsonl", 2_000);
    }
}

#[test]
fn second_interrupt_stops_at_once() {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 500);
    // Answers so long that a drain would take many times longer than the test.
    let long = RUN.replace("--max-new-tokens 4", "--max-new-tokens 1500 --temperature 5 --top-p 1");
    let mut running = place.start(&long);
    assert!(running.wait_for("worker is ready", 1));
    running.signal(Signal::INT);
    assert!(running.wait_for("interrupt again to stop at once", 1));
    running.signal(Signal::INT);
    let (status, log) = running.wait();
    assert_eq!(status.code(), Some(130), "{log}");
    assert!(!log.contains("the same command goes on"), "{log}");
    place.run_expecting(0, RUN);
    place.assert_each_once("results.jsonl", 500);
}
