//! Whatever kills a run, the same command completes it, each id once.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::process::Command;

use flotilla_tests::{Workplace, program};
use rustix::process::Signal;

const RUN: &str = "run --queries-file queries.jsonl --output-file results.jsonl --max-new-tokens 4";

#[test]
fn run_killed_again_and_again_ends_with_each_id_once() {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 300);
    let mut kills = 0;
    // Kill at a growing number of written lines, so that each run gets somewhere.
    for lines in [1, 3, 20, 40, 60] {
        let mut running = place.start(RUN);
        if running.wait_for("written", lines) {
            running.signal(Signal::KILL);
            kills += 1;
        }
        running.wait();
    }
    assert!(kills >= 3, "the run ended before it could be killed");
    place.run_expecting(0, RUN);
    place.assert_each_once("results.jsonl", 300);
    let before = place.read("results.jsonl");
    place.run_expecting(0, RUN);
    assert_eq!(place.read("results.jsonl"), before, "a finished run added something");
}

#[test]
fn torn_line_is_answered_again_and_kept_beside() {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 5);
    place.run_expecting(0, RUN);
    let whole = place.read("results.jsonl");
    let torn = &whole[..whole.len() - 20];
    place.write("results.jsonl", torn);
    let log = place.run_expecting(0, RUN);
    assert!(log.contains("torn"), "{log}");
    place.assert_each_once("results.jsonl", 5);
    let kept: Vec<_> = fs::read_dir(place.path("."))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("results.jsonl.torn-"))
        .collect();
    assert_eq!(kept.len(), 1);
}

#[test]
fn full_disk_stops_the_run_and_loses_nothing() {
    for (count, more) in [(100, ""), (1_000, " --batch-size 256")] {
        fill_the_disk(count, &format!("{RUN}{more}"));
    }
}

fn fill_the_disk(count: usize, run: &str) {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", count);
    // A file-size limit stands for a full disk: the write that crosses it is cut short.
    let limited = Command::new("bash")
        .arg("-c")
        .arg(format!("trap '' XFSZ; ulimit -f 16; exec \"$0\" {run}"))
        .arg(program())
        .current_dir(place.path("."))
        .env("FLOTILLA_MODEL_PATH", flotilla_tests::repository().join("models/flotilla-reader"))
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&limited.stderr);
    assert_eq!(limited.status.code(), Some(1), "{log}");
    assert!(log.contains("cannot write results.jsonl: File too large"), "{log}");
    let size = fs::metadata(place.path("results.jsonl")).unwrap().len();
    assert!(size > 0 && size <= 16 * 1024, "{size}");
    place.run_expecting(0, run);
    place.assert_each_once("results.jsonl", count);
}

#[test]
fn files_that_are_not_results_are_refused_and_untouched() {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 3);
    let queries = place.read("queries.jsonl");
    let log = place.run_expecting(1, &RUN.replace("results.jsonl", "./queries.jsonl"));
    assert!(log.contains("is both the input and the output"), "{log}");
    place.write("one.json", r#"[{"id":"a","query":"b"}]"#);
    place.write("contexts.jsonl", "{\"id\":\"a\",\"query\":\"b\",\"success\":true}\n");
    for name in ["one.json", "contexts.jsonl"] {
        let before = place.read(name);
        let log = place.run_expecting(1, &RUN.replace("results.jsonl", name));
        assert!(log.contains("expected a line of flotilla's results"), "{log}");
        assert_eq!(place.read(name), before);
    }
    assert_eq!(place.read("queries.jsonl"), queries);
}

#[test]
fn output_of_another_process_is_refused_and_untouched() {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 2_000);
    let mut first = place.start(RUN);
    assert!(first.wait_for("written", 1));
    let log = place.run_expecting(1, RUN);
    assert!(log.contains("is being written by another flotilla process"), "{log}");
    drop(first);

    let mut file = OpenOptions::new().append(true).open(place.path("results.jsonl")).unwrap();
    file.write_all(b"\nmy own notes\n").unwrap();
    let before = place.read("results.jsonl");
    let log = place.run_expecting(1, RUN);
    assert!(log.contains("expected a line of flotilla's results"), "{log}");
    assert_eq!(place.read("results.jsonl"), before);
}
