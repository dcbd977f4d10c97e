//! Wrong options and servers that can't be used: told at once, and what to do.

use flotilla_tests::nats_server::{NatsOptions, NatsServer};
use flotilla_tests::process::{DEADLINE, Process};
use flotilla_tests::{Workplace, repository};

const PASSWORD: &str = "s3cret";

#[test]
fn wrong_credentials_end_each_role_with_a_clear_error() {
    let server = NatsServer::start_with(NatsOptions {
        config: format!("authorization {{ user: fleet, password: {PASSWORD} }}"),
        credentials: Some("fleet:wrong-pass".to_owned()),
        ..NatsOptions::default()
    });
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 1);
    for role in [
        "produce --queries-file queries.jsonl",
        "work --backend noop",
        "collect --output-file results.jsonl",
        "status",
    ] {
        let mut command = place.command(role);
        let process = Process::start(command.env("FLOTILLA_NATS_URL", server.url()));
        assert_eq!(process.wait(DEADLINE).code(), Some(1), "{role}\n{}", process.log());
        let log = process.log().to_lowercase();
        assert!(log.contains("authorization") || log.contains("credentials"), "{role}: {log}");
        assert!(!log.contains("wrong-pass"), "{role}: {log}");
    }
    assert!(!place.path("results.jsonl").exists() || place.read("results.jsonl").is_empty());
}

#[test]
fn right_credentials_in_the_url_are_let_in() {
    let server = NatsServer::start_with(NatsOptions {
        config: format!("authorization {{ user: fleet, password: {PASSWORD} }}"),
        credentials: Some(format!("fleet:{PASSWORD}")),
        ..NatsOptions::default()
    });
    let place = Workplace::new();
    let mut command = place.command("status");
    let process = Process::start(command.env("FLOTILLA_NATS_URL", server.url()));
    assert_eq!(process.wait(DEADLINE).code(), Some(0), "{}", process.log());
    assert!(process.log().contains("no runs"), "{}", process.log());
    assert!(!process.log().contains(PASSWORD), "{}", process.log());
}

#[test]
fn every_command_talks_tls_with_a_password() {
    let place = Workplace::new();
    let made = std::process::Command::new(repository().join("deploy/make_certs.sh"))
        .args([place.path("certs"), "127.0.0.1".into()])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let server = NatsServer::start_with(NatsOptions {
        config: format!(
            "authorization {{ user: fleet, password: {PASSWORD} }}\ntls {{ cert_file: {:?}, key_file: {:?} }}",
            place.path("certs/server.crt"),
            place.path("certs/server.key")
        ),
        credentials: Some(format!("fleet:{PASSWORD}")),
        ..NatsOptions::default()
    });
    let url = server.url().replace("nats://", "tls://");
    let start = |args: &str, more: &str| {
        let mut command = place.command(&format!("{args} {more}"));
        Process::start(command.env("FLOTILLA_NATS_URL", &url))
    };
    let ends = |args: &str, code: i32| {
        let process = start(args, "--nats-ca certs/ca.crt");
        assert_eq!(process.wait(DEADLINE).code(), Some(code), "{args}\n{}", process.log());
    };
    place.write_queries("queries.jsonl", 5);
    let _worker = start("work --backend noop", "--nats-ca certs/ca.crt");
    ends("produce --queries-file queries.jsonl --run r", 0);
    ends("collect --run r --output-file results.jsonl --until-done", 0);
    place.assert_each_once("results.jsonl", 5);
    ends("reconcile --queries-file queries.jsonl --output-file results.jsonl --run r", 0);
    ends("retry --run r", 0);
    ends("status", 0);
    let stranger = start("status", "");
    assert_eq!(stranger.wait(DEADLINE).code(), Some(1), "{}", stranger.log());
    assert!(stranger.log().contains("no TLS with the NATS server"), "{}", stranger.log());
}

#[test]
fn wrong_options_are_told_with_what_was_expected() {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 1);
    let nats = "--nats-url nats://127.0.0.1:1";
    for (code, args, expected) in [
        (2, "produce --queries-file queries.jsonl", "--nats-url"),
        (2, "status", "FLOTILLA_NATS_URL"),
        (2, "produce --run r", "--queries-file"),
        (2, "produce --run r", "--listen"),
        (2, "produce --queries-file - ", "--run"),
        (2, "produce --listen 127.0.0.1:0", "--run"),
        (2, "produce --listen 127.0.0.1:0 --run r --queries-file queries.jsonl", "cannot be used"),
        (2, "produce --listen 0.0.0.0:0 --run r", "expected a token"),
        (2, "produce --queries-file queries.jsonl --run=", "expected a name"),
        (1, "produce --queries-file missing.jsonl", "missing.jsonl"),
        (2, "collect", "--output-file"),
        (2, "collect", "--output-dir"),
        (2, "collect --output-dir d --run r", "cannot be used"),
        (2, "work --devices 7", "--features cuda"),
        (2, "work --devices gpu", "expected cpu, a number or a name"),
        (1, "work --model-path nowhere", "nowhere is not a model"),
        (2, "work --max-attempts 1", "1 is not in 2.."),
        (2, "work --drain-timeout soon", "number of seconds"),
        (2, "status --watch 0", "number of seconds"),
        (2, "retry", "--run"),
        (2, "reconcile --queries-file queries.jsonl", "--output-file"),
    ] {
        let args = match expected {
            "--nats-url" | "FLOTILLA_NATS_URL" => args.to_owned(),
            _ => format!("{args} {nats}"),
        };
        let log = place.run_expecting(code, &args);
        assert!(log.contains(expected), "{args}: {log}");
    }
}

#[test]
fn a_server_that_is_not_there_yet_is_waited_for() {
    let mut server = NatsServer::start();
    server.kill();
    let place = Workplace::new();
    let mut command = place.command("status");
    let process = Process::start(command.env("FLOTILLA_NATS_URL", server.url()));
    process.wait_for("waiting", 1);
    server.restart();
    assert_eq!(process.wait(DEADLINE).code(), Some(0), "{}", process.log());
}

#[test]
fn a_server_that_does_not_come_is_given_up_by_what_only_looks() {
    let mut server = NatsServer::start();
    server.kill();
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 1);
    let started: Vec<Process> = [
        "status",
        "retry --run r",
        "reconcile --queries-file queries.jsonl --output-file results.jsonl",
    ]
    .iter()
    .map(|args| Process::start(place.command(args).env("FLOTILLA_NATS_URL", server.url())))
    .collect();
    for process in started {
        assert_eq!(process.wait(DEADLINE).code(), Some(1), "{}", process.log());
        assert!(process.log().contains("no NATS server answered within"), "{}", process.log());
    }
}
