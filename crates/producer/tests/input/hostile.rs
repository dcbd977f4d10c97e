//! Clients that mean no good, or whose link is bad: slow, broken off, endless.

use std::time::Duration;

use flotilla_producer::ListenConfig;

use crate::client::{Listening, chunk, config, head};
use crate::gate::Gate;
use crate::{good_line, soon};

const READ_TIMEOUT: Duration = Duration::from_secs(1);

async fn impatient() -> Listening {
    let config = ListenConfig { read_timeout: READ_TIMEOUT, ..config() };
    Listening::start(config, Gate::open()).await
}

#[tokio::test]
async fn a_head_that_never_ends_is_not_waited_for() {
    let listening = impatient().await;
    let mut connection = listening.connect().await;
    connection.send("POST /v1/queries HTTP/1.1\r\nHost: ").await;
    assert!(connection.rest().await.is_empty());
    assert!(listening.connect().await.rest().await.is_empty(), "nor is one that never begins");
    assert_eq!(listening.post(good_line("a")).await.status, 202);
}

#[tokio::test]
async fn a_body_that_stops_is_not_waited_for_and_what_came_is_told() {
    let listening = impatient().await;
    let mut connection = listening.connect().await;
    connection.send(head("Transfer-Encoding: chunked\r\n")).await;
    connection.send(chunk(&good_line("a"))).await;
    connection.send(chunk("{\"id\": \"half")).await;
    let answer = connection.answer().await;
    assert_eq!(answer.counts(), (408, 1, 0, 1), "{answer:?}");
    let reason = answer.body["rejected"][0]["reason"].as_str().unwrap();
    assert_eq!(reason, "cannot read on: the body broke off");
}

#[tokio::test]
async fn a_client_that_sends_a_byte_at_a_time_may_not_do_so_for_ever() {
    let listening = impatient().await;
    let mut connection = listening.connect().await;
    connection.send(head("Transfer-Encoding: chunked\r\n")).await;
    let mut interval = tokio::time::interval(READ_TIMEOUT / 5);
    // Each of them in time, all together not.
    let dripping = async {
        loop {
            tokio::select! {
                () = connection.until_answered() => break,
                _ = interval.tick() => connection.send(chunk(" ")).await,
            }
        }
    };
    soon(dripping).await;
    assert_eq!(connection.answer().await.counts().0, 408);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_its_slot_to_the_next() {
    let config = ListenConfig { max_requests: 1, max_connections: 1, ..config() };
    let listening = Listening::start(config, Gate::closed()).await;
    let mut connection = listening.connect().await;
    connection.send(head("Content-Length: 1000\r\n")).await;
    connection.send(good_line("a")).await;
    listening.jobs.until_waiting(1).await;
    drop(connection);
    listening.jobs.until_waiting(0).await;
    listening.jobs.confirm(10);
    assert_eq!(listening.post(good_line("b")).await.counts(), (202, 1, 0, 0));
}

#[tokio::test]
async fn a_wrong_chunked_encoding_breaks_the_body_off() {
    let listening = Listening::open().await;
    let mut connection = listening.connect().await;
    connection.send(head("Transfer-Encoding: chunked\r\n")).await;
    connection.send(chunk(&good_line("a"))).await;
    connection.send("zz\r\n").await;
    let answer = connection.answer().await;
    assert_eq!(answer.counts(), (400, 1, 0, 1), "{answer:?}");
    assert_eq!(answer.error(), "expected a whole body, given one that broke off");
}

#[tokio::test]
async fn brackets_that_never_close_cost_little() {
    let listening = Listening::open().await;
    for start in ["", "[\n"] {
        let body = format!("{start}{}", "{\n".repeat(1 << 18));
        let answer = listening.post(body).await;
        assert_eq!(answer.counts(), (400, 0, 0, 17), "{start}");
        let last = answer.body["rejected"][16]["reason"].as_str().unwrap();
        assert!(last.contains("too many without an end"), "{last}");
    }
}

#[tokio::test]
async fn many_bad_records_are_counted_and_only_some_are_named() {
    let listening = Listening::open().await;
    let answer = listening.post("7\n".repeat(100_000) + &good_line("a")).await;
    assert_eq!(answer.counts(), (202, 1, 0, 100_000));
    assert_eq!(answer.body["rejected"].as_array().unwrap().len(), 100);
}

#[tokio::test]
async fn a_record_too_long_is_rejected_and_the_next_one_taken() {
    let listening = Listening::open().await;
    let long = format!("{{\"id\": \"long\", \"query\": \"{}\"}}\n", "x".repeat(17 << 20));
    for header in ["", "Content-Type: application/jsonl\r\n"] {
        let body = format!("{}{long}{}", good_line("a"), good_line("b"));
        let answer = listening.post_with(header, body).await;
        assert_eq!(answer.counts(), (202, 2, 0, 1), "{header}");
        let reason = answer.body["rejected"][0]["reason"].as_str().unwrap();
        assert!(reason.contains("at most 16777216 bytes"), "{reason}");
    }
}

#[tokio::test]
async fn whatever_the_bytes_are_they_are_answered() {
    let listening = Listening::open().await;
    let good = good_line("good");
    for seed in 0..200_u64 {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let alphabet = b"{}[]\",:\\ \n\r\x00\xff7ab";
        let noise: Vec<u8> = (0..seed % 60)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                alphabet[usize::try_from(state % alphabet.len() as u64).unwrap()]
            })
            .collect();
        let body = [noise.as_slice(), b"\n", good.as_bytes()].concat();
        let answer = listening.post(&body).await;
        assert!([202, 400].contains(&answer.status), "{noise:?} {answer:?}");
        let lines = listening.post_with("Content-Type: application/jsonl\r\n", &body).await;
        assert!([202, 400].contains(&lines.status), "{noise:?} {lines:?}");
    }
}
