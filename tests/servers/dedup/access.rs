//! Getting at a Redis: passwords, users without rights, one that isn't there yet.

use collector::{Dedup, DedupError, Position, RedisConfig, RedisDedup};
use flotilla_tests::RedisServer;
use flotilla_tests::process::DEADLINE;

use super::run_id;

async fn try_connect(url: String) -> Result<RedisDedup, DedupError> {
    let config = RedisConfig::new(url);
    let run = run_id("run");
    let connecting = RedisDedup::connect(&config, &run);
    tokio::time::timeout(DEADLINE, connecting).await.expect("tells before the deadline")
}

fn with_credentials(server: &RedisServer, credentials: &str) -> String {
    server.url().replace("redis://", &format!("redis://{credentials}@"))
}

#[tokio::test]
async fn password_is_used_and_a_wrong_one_told_at_once_without_it() {
    let server = RedisServer::start_with(&["--requirepass", "s3cret-right"]);
    let mut dedup = try_connect(with_credentials(&server, ":s3cret-right")).await.unwrap();
    dedup.claim().await.unwrap();
    assert!(!format!("{dedup:?}").contains("s3cret"));
    for url in [with_credentials(&server, ":s3cret-wrong"), server.url()] {
        assert!(!format!("{:?}", RedisConfig::new(&url)).contains("s3cret"));
        let refused = try_connect(url).await.unwrap_err();
        assert!(matches!(refused, DedupError::Refused(_)));
        assert!(!format!("{refused:?}").contains("s3cret"));
    }
}

#[tokio::test]
async fn url_that_is_none_is_told_at_once() {
    for url in ["", "localhost", "http://localhost", "redis://s3cret@:nonsense"] {
        let refused = try_connect(url.to_owned()).await.unwrap_err();
        let text = format!("{refused:?}");
        assert!(!text.contains("s3cret") && text.contains("expected redis://"), "{text}");
    }
}

#[tokio::test]
async fn user_that_may_not_read_settings_can_collect() {
    let server = RedisServer::start();
    let user = ["ACL", "SETUSER", "collector", "on", ">pw", "~{flotilla:*", "+@all", "-config"];
    server.command(&user);
    let mut dedup = try_connect(with_credentials(&server, "collector:pw")).await.unwrap();
    assert_eq!(dedup.claim().await.unwrap(), None);
    dedup.clear(&Position::default()).await.unwrap();
    assert_eq!(dedup.known(&[], &Position::default()).await.unwrap(), [false; 0]);
}

#[tokio::test]
async fn user_without_rights_is_told_so() {
    let server = RedisServer::start();
    server.command(&["ACL", "SETUSER", "nobody", "on", ">pw", "~other:*", "+@all"]);
    let mut dedup = try_connect(with_credentials(&server, "nobody:pw")).await.unwrap();
    assert!(matches!(dedup.claim().await, Err(DedupError::Refused(_))));
}

#[tokio::test]
async fn server_that_is_not_there_yet_is_waited_for() {
    let mut server = RedisServer::start();
    server.kill();
    let connecting = tokio::spawn(try_connect(server.url()));
    tokio::task::yield_now().await;
    server.restart();
    connecting.await.unwrap().unwrap().claim().await.unwrap();
}

#[tokio::test]
async fn full_server_is_waited_for() {
    let server = RedisServer::start();
    let mut dedup = try_connect(server.url()).await.unwrap();
    dedup.claim().await.unwrap();
    server.command(&["CONFIG", "SET", "maxmemory", "1"]);
    let start = Position::default();
    let mut clearing = tokio::spawn(async move { dedup.clear(&start).await });
    let waits = tokio::time::timeout(std::time::Duration::from_millis(300), &mut clearing).await;
    assert!(waits.is_err(), "{waits:?}");
    server.command(&["CONFIG", "SET", "maxmemory", "0"]);
    tokio::time::timeout(DEADLINE, clearing).await.expect("goes on").unwrap().unwrap();
}
