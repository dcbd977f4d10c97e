//! Who may connect, to which server, over what.

use std::path::{Path, PathBuf};

use flotilla_tests::{NatsOptions, Proxy};
use serde_json::json;
use shared::queue::nats::FleetError;

use super::nkeys::{Nkey, Owner, openssl};
use super::*;

async fn refused(config: &NatsConfig) -> FleetError {
    let connecting = tokio::time::timeout(LONG, Fleet::connect(config)).await;
    connecting.expect("an answer in time").err().expect("no connection")
}

/// The error and all its sources.
fn chain(error: &FleetError) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// Whether a job goes through.
async fn works(config: &NatsConfig) {
    let queue = Fleet::connect(config).await.unwrap().jobs(MODEL);
    queue.publish(job("a")).await.unwrap();
    pull_one(&queue).await.ack().await.unwrap();
}

fn with_config(config: &str, credentials: Option<&str>) -> NatsServer {
    NatsServer::start_with(NatsOptions {
        config: config.to_owned(),
        credentials: credentials.map(str::to_owned),
        ..NatsOptions::default()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn user_and_password_of_the_url_are_used_and_never_shown() {
    let server = with_config(
        "authorization { user: fleet, password: \"p@ss/word\" }",
        Some("fleet:p%40ss%2Fword"),
    );
    works(&config(server.url())).await;
    for credentials in ["fleet:wr0ng@", "nobody:p%40ss%2Fword@", ""] {
        let error = refused(&config(format!("nats://{credentials}{}", server.address()))).await;
        assert!(matches!(error, FleetError::Refused { .. }), "{}", chain(&error));
        assert!(!chain(&error).contains("wr0ng") && !format!("{error:?}").contains("wr0ng"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn token_of_the_url_is_used() {
    let server = with_config("authorization { token: s3cret }", Some("s3cret"));
    works(&config(server.url())).await;
    let error = refused(&config(format!("nats://{}", server.address()))).await;
    assert!(matches!(error, FleetError::Refused { .. }), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn nkey_of_a_file_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let (seed, key) = (dir.path().join("user.nk"), Nkey::new(Owner::User));
    std::fs::write(&seed, format!("{}\n", key.seed)).unwrap();
    let server =
        with_config(&format!("authorization {{ users: [{{ nkey: {} }}] }}", key.public), None);
    let with_seed = NatsConfig { nkey_file: Some(seed), ..config(server.url()) };
    works(&with_seed).await;
    let error = refused(&config(server.url())).await;
    assert!(matches!(error, FleetError::Refused { .. }), "{}", chain(&error));
    let missing = NatsConfig { nkey_file: Some("/nowhere.nk".into()), ..config(server.url()) };
    let error = refused(&missing).await;
    assert!(matches!(&error, FleetError::File { path, .. } if path == Path::new("/nowhere.nk")));
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_file_is_used() {
    let (operator, user) = (Nkey::new(Owner::Operator), Nkey::new(Owner::User));
    let (account, system) = (Nkey::new(Owner::Account), Nkey::new(Owner::Account));
    let all = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
        "conn": -1, "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let of_operator =
        operator.sign("o", &operator.public, &json!({ "type": "operator", "version": 2 }));
    let nats = json!({ "limits": all, "type": "account", "version": 2 });
    let of_account = operator.sign("a", &account.public, &nats);
    let nats = json!({ "type": "account", "version": 2 });
    let of_system = operator.sign("s", &system.public, &nats);
    let nats = json!({ "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2 });
    let of_user = account.sign("u", &user.public, &nats);
    let server = with_config(
        &format!(
            "operator: {of_operator}\nsystem_account: {system}\nresolver: MEMORY\n\
             resolver_preload: {{ {account}: {of_account}, {system}: {of_system} }}",
            account = account.public,
            system = system.public
        ),
        None,
    );
    let creds = server.dir().join("user.creds");
    let text = format!(
        "-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        user.seed
    );
    std::fs::write(&creds, text).unwrap();
    works(&NatsConfig { creds_file: Some(creds), ..config(server.url()) }).await;
    let error = refused(&config(server.url())).await;
    assert!(matches!(error, FleetError::Refused { .. }), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn options_that_contradict_one_another_are_refused() {
    let two = NatsConfig {
        nkey_file: Some("a".into()),
        creds_file: Some("b".into()),
        ..config("nats://127.0.0.1:1".into())
    };
    assert!(matches!(refused(&two).await, FleetError::Options(_)));
    let half = NatsConfig { tls_cert: Some("/dev/null".into()), ..config("127.0.0.1:1".into()) };
    assert!(matches!(refused(&half).await, FleetError::Options(_)));
    assert!(matches!(refused(&config("http://x".into())).await, FleetError::Options(_)));
}

/// Certificates made for one test: of an authority, of the server and of a client.
struct Certificates {
    dir: tempfile::TempDir,
}

impl Certificates {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let this = Self { dir };
        this.openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign -keyout ca.key -out ca.pem");
        std::fs::write(this.path("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
        for name in ["server", "client"] {
            this.openssl(&format!("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"));
            this.openssl(&format!("x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out {name}.pem"));
        }
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn openssl(&self, arguments: &str) {
        openssl(self.dir.path(), arguments);
    }

    fn server(&self, more: &str) -> NatsServer {
        let file = |name: &str| format!("{:?}", self.path(name));
        with_config(
            &format!(
                "tls {{ cert_file: {}, key_file: {}, ca_file: {}, {more} }}",
                file("server.pem"),
                file("server.key"),
                file("ca.pem")
            ),
            None,
        )
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_trusts_the_given_authority_and_no_other() {
    let certificates = Certificates::new();
    let server = certificates.server("");
    let url = format!("tls://{}", server.address());
    let trusting = NatsConfig { tls_ca: Some(certificates.path("ca.pem")), ..config(url) };
    works(&trusting).await;
    let stranger = Certificates::new();
    let mistaken = NatsConfig { tls_ca: Some(stranger.path("ca.pem")), ..trusting.clone() };
    let error = refused(&mistaken).await;
    assert!(matches!(error, FleetError::Tls { .. }), "{}", chain(&error));
    assert!(chain(&error).contains("certificate"), "{}", chain(&error));
    let no_certificate = NatsConfig { tls_ca: Some(certificates.path("ca.key")), ..trusting };
    let error = refused(&no_certificate).await;
    assert!(matches!(error, FleetError::Tls { .. }), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_shows_the_clients_certificate() {
    let certificates = Certificates::new();
    let server = certificates.server("verify: true");
    let known = NatsConfig {
        tls_ca: Some(certificates.path("ca.pem")),
        tls_cert: Some(certificates.path("client.pem")),
        tls_key: Some(certificates.path("client.key")),
        ..config(format!("tls://{}", server.address()))
    };
    works(&known).await;
    let unknown = NatsConfig { tls_cert: None, tls_key: None, ..known };
    let error = refused(&unknown).await;
    assert!(matches!(error, FleetError::Tls { .. }), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn server_without_jetstream_is_refused() {
    let options = NatsOptions { no_jetstream: true, ..NatsOptions::default() };
    let server = NatsServer::start_with(options);
    let error = refused(&config(server.url())).await;
    assert!(matches!(error, FleetError::NoJetStream { .. }), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn account_without_jetstream_is_refused() {
    let accounts = "accounts { A: { users: [{ user: a, password: a }] }, B: { jetstream: enabled, users: [{ user: b, password: b }] } }";
    let server = with_config(accounts, Some("b:b"));
    works(&config(server.url())).await;
    let error = refused(&config(format!("nats://a:a@{}", server.address()))).await;
    assert!(matches!(error, FleetError::NoJetStream { .. }), "{}", chain(&error));
}

/// A server that only says hello, as an old one would.
fn pretend_server(version: &str) -> std::net::SocketAddr {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let hello = format!(
        "INFO {{\"server_id\":\"x\",\"server_name\":\"x\",\"version\":\"{version}\",\"go\":\"x\",\"host\":\"x\",\"port\":1,\"headers\":true,\"max_payload\":1048576,\"proto\":1,\"client_id\":1,\"jetstream\":true}}\r\n"
    );
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(hello.as_bytes()).unwrap();
        let mut heard = String::new();
        let mut bytes = [0; 1024];
        while let Ok(length @ 1..) = stream.read(&mut bytes) {
            heard += &String::from_utf8_lossy(&bytes[..length]);
            if heard.contains("PING") {
                stream.write_all(b"PONG\r\n").unwrap();
                heard.clear();
            }
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn old_server_is_refused_by_its_version() {
    let error = refused(&config(format!("nats://{}", pretend_server("2.12.4")))).await;
    let text = chain(&error);
    assert!(matches!(error, FleetError::TooOld { .. }), "{text}");
    assert!(text.contains("2.12.5") && text.contains("2.12.4"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_that_would_lose_jobs_is_refused() {
    use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
    let good = || Config {
        name: "FLOTILLA_JOBS".into(),
        subjects: vec!["flotilla.jobs.*.*".into()],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        storage: StorageType::File,
        ..Config::default()
    };
    let age = Duration::from_secs(3600);
    let bad = [
        ("retention", Config { retention: RetentionPolicy::Limits, ..good() }),
        ("discard", Config { discard: DiscardPolicy::Old, ..good() }),
        ("storage", Config { storage: StorageType::Memory, ..good() }),
        ("max age", Config { max_age: age, ..good() }),
        ("subjects", Config { subjects: vec!["flotilla.jobs.>".into()], ..good() }),
        ("subjects", Config { name: "OTHER".into(), ..good() }),
    ];
    for (field, stream) in bad {
        let server = NatsServer::start();
        outsider(&server).await.create_stream(stream).await.unwrap();
        let error = refused(&config(server.url())).await;
        assert!(matches!(error, FleetError::Mismatch { .. }), "{field}: {}", chain(&error));
        assert!(error.to_string().contains(field), "{error}");
    }
    // What only bounds a stream is the operator's.
    let server = NatsServer::start();
    let bounded = Config { max_bytes: 1 << 20, ..good() };
    outsider(&server).await.create_stream(bounded).await.unwrap();
    works(&config(server.url())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_without_room_for_the_streams_says_what_to_change() {
    let jetstream = "max_file_store: 1GB".to_owned();
    let server = NatsServer::start_with(NatsOptions { jetstream, ..NatsOptions::default() });
    let error = refused(&config(server.url())).await;
    assert!(matches!(error, FleetError::NoRoom { wanted: 8_589_934_592, .. }), "{}", chain(&error));
    assert!(error.to_string().contains("max_file_store"));
}

#[tokio::test(flavor = "multi_thread")]
async fn connecting_waits_for_a_server_that_is_not_there_yet() {
    let server = NatsServer::start();
    let proxy = Proxy::start(server.address());
    proxy.refuse();
    let connecting = tokio::spawn({
        let config = config(format!("nats://{}", proxy.address()));
        async move { works(&config).await }
    });
    assert!(tokio::time::timeout(Duration::from_millis(400), async {}).await.is_ok());
    assert!(!connecting.is_finished());
    proxy.pass();
    connecting.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn longer_lease_of_a_consumer_holds_and_a_shorter_one_is_raised() {
    let server = NatsServer::start();
    let fleet = Fleet::connect(&config(server.url())).await.unwrap();
    let lease = async |seconds: u64| {
        let queue = fleet.clone().with_lease(Duration::from_secs(seconds)).jobs(MODEL);
        queue.publish(job(&format!("{seconds}"))).await.unwrap();
        let delivery = pull_one(&queue).await;
        let lease = delivery.lease().as_secs();
        delivery.ack().await.unwrap();
        lease
    };
    assert_eq!(lease(5).await, 5);
    assert_eq!(lease(20).await, 20);
    assert_eq!(lease(6).await, 20);
}
