//! The servers and the proxy of these tests do what the other tests take for granted.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use flotilla_tests::process::DEADLINE;
use flotilla_tests::{NatsServer, Process, Proxy, RedisServer};

#[test]
fn process_is_waited_for_and_killed() {
    let process =
        Process::start(Command::new("sh").args(["-c", "echo one; echo two >&2; exec sleep 600"]));
    process.wait_for("one", 1);
    process.wait_for("two", 1);
    assert!(!process.has_line("three", 1, Duration::from_millis(20)));
    assert!(process.is_running());
    process.stop();
    assert!(!process.kill().success());
    assert!(!process.is_running());
}

#[test]
fn nats_server_comes_back_to_its_port() {
    let mut server = NatsServer::start();
    let address = server.address();
    TcpStream::connect(address).unwrap();
    server.kill();
    assert!(TcpStream::connect(address).is_err());
    server.restart();
    TcpStream::connect(address).unwrap();
    server.wipe();
    server.restart();
    server.shut_down();
}

#[test]
fn redis_server_keeps_restores_and_forgets() {
    let mut server = RedisServer::start_with(&["--requirepass", "secret"]);
    let text = |server: &RedisServer| format!("{:?}", server.command(&["GET", "key"]));
    server.command(&["SET", "key", "old"]);
    let copy = server.copy();
    server.command(&["SET", "key", "new"]);
    server.restart();
    assert!(text(&server).contains("new"));
    server.restore(&copy);
    assert!(text(&server).contains("old"));
    server.flush_all();
    assert!(text(&server).contains("nil"));
}

/// A connection through a proxy: the client's end and the server's.
fn pair() -> (Proxy, TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::start(listener.local_addr().unwrap());
    let client = TcpStream::connect(proxy.address()).unwrap();
    let (server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
    }
    (proxy, client, server)
}

fn arrives(mut from: &TcpStream, mut to: &TcpStream) -> bool {
    from.write_all(b"x").unwrap();
    to.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let arrived = to.read(&mut [0; 8]).is_ok_and(|length| length > 0);
    to.set_read_timeout(Some(DEADLINE)).unwrap();
    arrived
}

#[test]
fn proxy_holds_bytes_until_the_link_is_mended() {
    let (proxy, client, mut server) = pair();
    assert!(arrives(&client, &server) && arrives(&server, &client));
    proxy.hold();
    assert!(!arrives(&client, &server));
    proxy.pass();
    server.read_exact(&mut [0]).unwrap();
    assert!(arrives(&server, &client));
}

#[test]
fn proxy_loses_replies_and_then_resets() {
    let (proxy, mut client, server) = pair();
    proxy.lose_replies();
    assert!(arrives(&client, &server));
    assert!(!arrives(&server, &client));
    proxy.pass();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn proxy_resets_and_refuses() {
    let (proxy, mut client, server) = pair();
    assert!(arrives(&client, &server));
    proxy.refuse();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let mut second = TcpStream::connect(proxy.address()).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}
