//! Queries over HTTP: what is taken, what is refused, and what a client is told.

use std::time::Duration;

use flotilla_producer::{ListenConfig, ListenError, Published, Server};
use serde_json::json;
use shared::{Outcome, QueueError};

use crate::client::{Listening, chunk, config, head};
use crate::gate::Gate;
use crate::{good_line, soon};

#[tokio::test]
async fn queries_come_as_one_object_an_array_or_lines_whatever_the_type_says() {
    let listening = Listening::open().await;
    let one = good_line("one");
    let pretty = "{\n  \"id\": \"pretty\",\n  \"query\": \"q\",\n  \"extra\": {\n  }\n}\n";
    let array = format!("[\n{},{}]", good_line("in"), good_line("array"));
    let lines = ["x", "y", "z"].map(good_line).concat();
    let types = ["", "Content-Type: application/json\r\n", "Content-Type: text/plain\r\n"];
    for (body, number) in [(one.as_str(), 1), (pretty, 1), (&array, 2), (&lines, 3)] {
        for media_type in types {
            let answer = listening.post_with(media_type, body).await;
            assert_eq!(answer.counts(), (202, number, 0, 0), "{body} {answer:?}");
        }
    }
    let media_type = "Content-Type: application/x-ndjson; charset=utf-8\r\n";
    assert_eq!(listening.post_with(media_type, &lines).await.counts(), (202, 3, 0, 0));
    let ids = ["one", "pretty", "in", "array", "x", "y", "z"];
    assert_eq!(listening.jobs.ids().await, ids, "the same again adds nothing");
    assert_eq!(listening.stop().await, Published { jobs: 7, repeated: 17, ..Published::default() });
}

#[tokio::test]
async fn bad_records_are_named_and_the_others_taken() {
    let listening = Listening::open().await;
    let body = format!(
        "{}oops\n{{\"id\": \"b\"}}\n\n{{\"query\": \"q\"}}\n{{\"id\": \"a\", \"query\": \"other\"}}\n{}{}",
        good_line("a"),
        good_line("a"),
        good_line("c")
    );
    for media_type in ["application/x-ndjson", "application/json"] {
        let header = format!("Content-Type: {media_type}\r\n");
        let answer = listening.post_with(&header, &body).await;
        assert_eq!(answer.counts(), (202, 2, 1, 3), "{answer:?}");
        let rejected = answer.body["rejected"].as_array().unwrap();
        let places: Vec<_> = rejected.iter().map(|bad| (&bad["line"], &bad["index"])).collect();
        assert_eq!(
            places,
            [(&json!(2), &json!(1)), (&json!(5), &json!(3)), (&json!(6), &json!(4))]
        );
        assert!(rejected[2]["reason"].as_str().unwrap().contains("already belongs"));
        let failure = &answer.body["failures"][0];
        assert_eq!((&failure["id"], &failure["line"]), (&json!("b"), &json!(3)));
    }
    assert_eq!(listening.jobs.ids().await, ["a", "c"]);
    let failed = listening.outcomes.take().await;
    assert_eq!(failed.len(), 1);
    assert!(matches!(&failed[0].outcome, Outcome::Failed(reason) if reason.contains("`query`")));
}

#[tokio::test]
async fn bodies_without_a_query_are_bad_requests() {
    let listening = Listening::open().await;
    for body in ["", " \n", "\u{feff}", "[]", "[ ]\n"] {
        let answer = listening.post(body).await;
        assert_eq!(answer.counts(), (400, 0, 0, 0), "{body}");
        assert_eq!(answer.error(), "expected at least one query, given none");
    }
    for body in
        ["oops", "7", "null", "\"text\"", "{\"query\": \"q\"}", "{\"id\": ", "[7]", "]", ","]
    {
        let answer = listening.post(body).await;
        assert_eq!(answer.counts(), (400, 0, 0, 1), "{body} {answer:?}");
        assert_eq!(answer.error(), "no record of the body is a query");
    }
    let answer = listening.post(b"\xff\xfe\x00{").await;
    assert_eq!(answer.status, 400, "{answer:?}");
    assert_eq!(listening.post(good_line("a")).await.counts(), (202, 1, 0, 0));
}

#[tokio::test]
async fn a_token_is_asked_of_whoever_posts_but_not_of_who_asks_for_health() {
    let config = ListenConfig { token: Some("s3cret token".into()), ..config() };
    assert!(!format!("{config:?}").contains("s3cret"));
    let listening = Listening::start(config, Gate::open()).await;
    for given in ["", "Authorization: Bearer wrong\r\n", "Authorization: Basic s3cret token\r\n"] {
        let answer = listening.post_with(given, good_line("a")).await;
        assert_eq!(answer.counts(), (401, 0, 0, 0));
        assert!(answer.head.contains("www-authenticate: bearer"), "{answer:?}");
    }
    for given in
        ["Authorization: Bearer s3cret token\r\n", "authorization: bearer s3cret token\r\n"]
    {
        assert_eq!(listening.post_with(given, good_line("a")).await.status, 202);
    }
    let mut connection = listening.connect().await;
    connection.send("GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    let answer = connection.answer().await;
    assert_eq!((answer.status, answer.body), (200, json!("ok\n")));
}

#[tokio::test]
async fn a_token_is_needed_beyond_this_machine() {
    let refused = |addr: [u8; 4], token: Option<&str>| {
        Server::bind(ListenConfig::new((addr, 0).into(), token.map(str::to_owned)))
    };
    for refused in [refused([0, 0, 0, 0], None), refused([127, 0, 0, 1], Some(" "))] {
        assert!(matches!(refused.await, Err(ListenError::Config(_))));
    }
    assert!(refused([0, 0, 0, 0], Some("t")).await.is_ok());
    let taken = Server::bind(config()).await.unwrap();
    let error = Server::bind(ListenConfig::new(taken.local_addr(), None)).await.err().unwrap();
    assert_eq!(error.to_string(), format!("cannot listen on {}", taken.local_addr()));
}

#[tokio::test]
async fn paths_methods_and_encodings_that_do_not_exist_say_what_does() {
    let listening = Listening::open().await;
    for (line, status) in [("POST /v2/queries", 404), ("GET /v1/queries", 405)] {
        let mut connection = listening.connect().await;
        let head = format!("{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        connection.send(head).await;
        let answer = connection.answer().await;
        assert_eq!(answer.counts(), (status, 0, 0, 0));
        assert!(answer.error().contains("/v1/queries"));
    }
    let answer = listening.post_with("Content-Encoding: gzip\r\n", "x").await;
    assert_eq!(answer.counts(), (415, 0, 0, 0));
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_and_what_came_before_is_told() {
    let config = ListenConfig { max_body_bytes: 10_000, ..config() };
    let listening = Listening::start(config, Gate::closed()).await;
    let answer = listening.post("x".repeat(10_001)).await;
    assert_eq!(answer.counts(), (413, 0, 0, 0));
    assert!(answer.error().contains("at most 10000 bytes"));

    let mut connection = listening.connect().await;
    connection.send(head("Transfer-Encoding: chunked\r\n")).await;
    connection.send(chunk(&good_line("a"))).await;
    listening.jobs.until_waiting(1).await;
    listening.jobs.confirm(10);
    connection.send(chunk(&"x".repeat(10_000))).await;
    connection.send("0\r\n\r\n").await;
    assert_eq!(connection.answer().await.counts(), (413, 1, 0, 1));
    assert_eq!(listening.jobs.ids().await, ["a"]);
}

#[tokio::test]
async fn records_are_published_while_the_body_still_comes() {
    let listening = Listening::start(config(), Gate::closed()).await;
    let mut connection = listening.connect().await;
    connection.send(head("Transfer-Encoding: chunked\r\n")).await;
    for (number, id) in ["a", "b", "c"].into_iter().enumerate() {
        connection.send(chunk(&good_line(id))).await;
        listening.jobs.until_waiting(number + 1).await;
    }
    listening.jobs.confirm(3);
    connection.send("0\r\n\r\n").await;
    assert_eq!(connection.answer().await.counts(), (202, 3, 0, 0));
}

#[tokio::test]
async fn a_full_queue_sends_the_client_away_and_takes_the_same_body_later() {
    let full_timeout = Duration::from_millis(100);
    let listening =
        Listening::start(ListenConfig { full_timeout, ..config() }, Gate::closed()).await;
    listening.jobs.confirm(2);
    let body = ["a", "b", "c", "d"].map(good_line).concat();
    let answer = listening.post(&body).await;
    assert_eq!(answer.counts(), (429, 2, 0, 0), "{answer:?}");
    assert!(answer.head.contains("retry-after: 2"), "{answer:?}");
    assert!(answer.error().contains("the queue is full"));
    listening.jobs.confirm(100);
    assert_eq!(listening.post(&body).await.counts(), (202, 4, 0, 0));
    let mut ids = listening.jobs.ids().await;
    ids.sort_unstable();
    assert_eq!(ids, ["a", "b", "c", "d"]);
}

#[tokio::test]
async fn more_requests_than_allowed_are_sent_away_at_once() {
    let full_timeout = Duration::from_secs(60);
    let config = ListenConfig { max_requests: 1, full_timeout, ..config() };
    let listening = Listening::start(config, Gate::closed()).await;
    let posts = async {
        let first = listening.post(good_line("a"));
        let second = async {
            listening.jobs.until_waiting(1).await;
            let second = listening.post(good_line("b")).await;
            listening.jobs.confirm(1);
            second
        };
        tokio::join!(first, second)
    };
    let (first, second) = soon(posts).await;
    assert_eq!((first.status, second.status), (202, 429));
    assert!(second.head.contains("retry-after"));
}

#[tokio::test]
async fn many_clients_post_at_once_and_everything_is_taken() {
    let config = ListenConfig { max_requests: 24, ..config() };
    let listening = &Listening::start(config, Gate::open()).await;
    let posts = (0..24).map(|client| async move {
        let body: String = (0..50).map(|k| good_line(&format!("{client}-{k}"))).collect();
        assert_eq!(listening.post(body).await.counts(), (202, 50, 0, 0));
    });
    soon(futures_util::future::join_all(posts)).await;
    let ids: std::collections::HashSet<_> = listening.jobs.ids().await.into_iter().collect();
    assert_eq!(ids.len(), 24 * 50);
}

#[tokio::test]
async fn a_shutdown_answers_the_requests_in_hand_and_takes_no_more() {
    let full_timeout = Duration::from_secs(60);
    let listening =
        Listening::start(ListenConfig { full_timeout, ..config() }, Gate::closed()).await;
    let idle = listening.connect().await;
    let mut in_hand = listening.connect().await;
    in_hand.send(head("Transfer-Encoding: chunked\r\n")).await;
    in_hand.send(chunk(&good_line("a"))).await;
    listening.jobs.until_waiting(1).await;
    listening.shutdown.cancel();
    assert!(idle.rest().await.is_empty());
    in_hand.send(chunk(&good_line("b"))).await;
    in_hand.send("0\r\n\r\n").await;
    listening.jobs.until_waiting(2).await;
    listening.jobs.confirm(2);
    assert_eq!(in_hand.answer().await.counts(), (202, 2, 0, 0));
    let addr = listening.addr;
    assert_eq!(listening.ended().await.unwrap().jobs, 2);
    assert!(tokio::net::TcpStream::connect(addr).await.is_err());
}

#[tokio::test]
async fn a_shutdown_waits_only_so_long() {
    let drain_timeout = Duration::from_millis(50);
    let full_timeout = Duration::from_secs(60);
    let config = ListenConfig { drain_timeout, full_timeout, ..config() };
    let listening = Listening::start(config, Gate::closed()).await;
    let mut in_hand = listening.connect().await;
    in_hand.send(head("Transfer-Encoding: chunked\r\n")).await;
    in_hand.send(chunk(&good_line("a"))).await;
    listening.jobs.until_waiting(1).await;
    assert_eq!(listening.stop().await, Published::default());
    assert!(in_hand.rest().await.is_empty());
}

#[tokio::test]
async fn a_queue_that_fails_ends_the_server_with_its_error() {
    let mut jobs = Gate::open();
    jobs.is_broken = true;
    let listening = Listening::start(config(), jobs).await;
    assert_eq!(listening.post(good_line("a")).await.counts(), (503, 0, 0, 0));
    let error = listening.ended().await.unwrap_err();
    assert!(matches!(error, ListenError::Queue(QueueError::Server(_))));
}

#[tokio::test]
async fn a_connection_may_be_kept_for_the_next_request() {
    let listening = Listening::open().await;
    let mut connection = listening.connect().await;
    for (id, last) in [("a", false), ("b", true)] {
        let body = good_line(id);
        let close = if last { "Connection: close\r\n" } else { "" };
        let head = format!(
            "POST /v1/queries HTTP/1.1\r\nHost: x\r\n{close}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        connection.send(head).await;
    }
    let answers = String::from_utf8(connection.rest().await).unwrap();
    assert_eq!(answers.matches("HTTP/1.1 202").count(), 2, "{answers}");
    assert_eq!(listening.jobs.ids().await, ["a", "b"]);
}

#[tokio::test]
async fn who_asks_before_sending_is_refused_before_sending() {
    let config = ListenConfig { token: Some("t".into()), ..config() };
    let listening = Listening::start(config, Gate::open()).await;
    let mut connection = listening.connect().await;
    connection.send(head("Expect: 100-continue\r\nContent-Length: 1000\r\n")).await;
    assert_eq!(connection.answer().await.counts(), (401, 0, 0, 0));
}

/// What a client does that sends all before it reads: closing on it would reset the connection
/// and take the answer away.
#[tokio::test]
async fn a_refused_body_is_read_so_that_its_client_gets_the_answer() {
    let config = ListenConfig { token: Some("t".into()), ..config() };
    let listening = Listening::start(config, Gate::open()).await;
    let answer = listening.post(vec![b' '; 20 << 20]).await;
    assert_eq!(answer.counts(), (401, 0, 0, 0));
}
