//! Connecting: credentials, TLS, waiting for a server that is not there yet, and knowing at any
//! moment whether the connection holds.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::rustls;
use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use tokio::sync::watch;

use super::publish::Throttle;
use super::{FleetError, NatsConfig};

/// The first nats-server without known loss of acknowledged messages that has all we need.
const MIN_SERVER: &str = "2.12.5";
const MIN_SERVER_PARTS: (u64, u64, u64) = (2, 12, 5);
/// A link that is cut without a reset is noticed after three of these.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest delay between two tries to connect.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(2);
/// Commands to the connection that wait to be written; more than a producer's window.
const CLIENT_CAPACITY: usize = 4096;

/// What is known of the connection. Written by the client's events.
#[derive(Clone, Copy, Debug)]
struct LinkState {
    connected: bool,
    /// Connections that were lost so far.
    lost: u64,
}

/// Whether the connection holds.
#[derive(Clone)]
pub(super) struct Link {
    state: watch::Receiver<LinkState>,
}

impl Link {
    /// Waits until there is a connection; its number.
    pub(super) async fn up(&self) -> u64 {
        let mut state = self.state.clone();
        let number = state.wait_for(|state| state.connected).await.map(|state| state.lost);
        match number {
            Ok(number) => number,
            // The client is gone, and with it everybody who could wait here.
            Err(_) => std::future::pending().await,
        }
    }

    /// Whether there is a connection now.
    pub(super) fn is_up(&self) -> bool {
        self.state.borrow().connected
    }

    /// Waits until the connection of this number is lost.
    pub(super) async fn lost(&self, number: u64) {
        let mut state = self.state.clone();
        let is_gone = state.wait_for(|state| state.lost != number).await.is_err();
        if is_gone {
            std::future::pending::<()>().await;
        }
    }
}

/// Connects to a server that will do.
pub(super) async fn connect(config: &NatsConfig) -> Result<(Client, Link), FleetError> {
    let url = redacted(&config.url);
    let (sender, receiver) = watch::channel(LinkState { connected: true, lost: 0 });
    let options = options(config, sender).await?;
    let addresses = addresses(&config.url)?;
    let mut delay = Duration::from_millis(100);
    let notice = Throttle::default();
    let client = loop {
        match options.clone().connect(addresses.clone()).await {
            Ok(client) => break client,
            Err(error) => match lasting(&url, error) {
                Ok(lasting) => return Err(lasting),
                Err(passing) if notice.is_due() => {
                    tracing::warn!(error = %passing, "waiting for the NATS server at {url}");
                }
                Err(passing) => tracing::debug!(error = %passing, "still no NATS server at {url}"),
            },
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(MAX_RECONNECT_DELAY);
    };
    let found = client.server_info().version;
    if !new_enough(&found) {
        return Err(FleetError::TooOld { url, found, needed: MIN_SERVER });
    }
    tracing::debug!("connected to nats-server {found} at {url}");
    Ok((client, Link { state: receiver }))
}

/// The error, if waiting would not help.
fn lasting(url: &str, error: ConnectError) -> Result<FleetError, ConnectError> {
    let url = url.to_owned();
    match error.kind() {
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            Ok(FleetError::Refused { url, source: error.into() })
        }
        ConnectErrorKind::ServerParse => {
            Ok(FleetError::Options(format!("cannot use {url}: {error}")))
        }
        ConnectErrorKind::Tls => Ok(FleetError::Tls { url, source: error.into() }),
        // What TLS finds wrong with the other side comes as an error of input and output.
        _ if is_tls(&error) => Ok(FleetError::Tls { url, source: error.into() }),
        _ => Err(error),
    }
}

fn is_tls(error: &ConnectError) -> bool {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if error.is::<rustls::Error>() {
            return true;
        }
        // An error of input and output hides the one it was made of from its `source`.
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = inner.map(|inner| inner as &(dyn Error + 'static)).or_else(|| error.source());
    }
    false
}

async fn options(
    config: &NatsConfig,
    link: watch::Sender<LinkState>,
) -> Result<ConnectOptions, FleetError> {
    let mut options = ConnectOptions::new()
        .name("flotilla")
        .ping_interval(PING_INTERVAL)
        .connection_timeout(CONNECT_TIMEOUT)
        .client_capacity(CLIENT_CAPACITY)
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_delay)
        .event_callback(move |event| {
            note(&link, &event);
            std::future::ready(())
        });
    let user = user(&config.url)?;
    let given = [user.is_some(), config.creds_file.is_some(), config.nkey_file.is_some()];
    if given.iter().filter(|given| **given).count() > 1 {
        return Err(FleetError::Options(
            "expected one of a user in the NATS URL, a credentials file and an nkey, given more"
                .to_owned(),
        ));
    }
    match user {
        Some((user, Some(password))) => options = options.user_and_password(user, password),
        Some((token, None)) => options = options.token(token),
        None => {}
    }
    if let Some(path) = &config.creds_file {
        let read = options.credentials_file(path).await;
        options = read.map_err(|error| unusable(path, error))?;
    }
    if let Some(path) = &config.nkey_file {
        let seed = tokio::fs::read_to_string(path).await;
        options = options.nkey(seed.map_err(|error| unusable(path, error))?.trim().to_owned());
    }
    tls(config, options)
}

fn tls(config: &NatsConfig, mut options: ConnectOptions) -> Result<ConnectOptions, FleetError> {
    for path in [&config.tls_ca, &config.tls_cert, &config.tls_key].into_iter().flatten() {
        // The client reads them when it connects, and would say less about them.
        std::fs::File::open(path).map_err(|error| unusable(path, error))?;
    }
    if let Some(ca) = &config.tls_ca {
        // Whoever names a certificate does not want to talk without it.
        options = options.add_root_certificates(ca.clone()).require_tls(true);
    }
    match (&config.tls_cert, &config.tls_key) {
        (Some(cert), Some(key)) => {
            options = options.add_client_certificate(cert.clone(), key.clone()).require_tls(true);
        }
        (None, None) => {}
        _ => {
            return Err(FleetError::Options(
                "expected both a client certificate and its key for NATS, given one".to_owned(),
            ));
        }
    }
    Ok(options)
}

fn unusable(path: &Path, error: std::io::Error) -> FleetError {
    FleetError::File { path: PathBuf::from(path), source: error.into() }
}

/// Written down for all who wait on the link, and logged.
fn note(link: &watch::Sender<LinkState>, event: &Event) {
    match event {
        Event::Connected => {
            let was = link.borrow().connected;
            link.send_modify(|state| state.connected = true);
            if !was {
                tracing::info!("connected to the NATS server again");
            }
        }
        Event::Disconnected => {
            link.send_modify(|state| {
                state.connected = false;
                state.lost += 1;
            });
            tracing::warn!("the connection to the NATS server is lost; connecting again");
        }
        Event::SlowConsumer(_) | Event::ServerError(_) => tracing::warn!("NATS: {event}"),
        _ => tracing::debug!("NATS: {event}"),
    }
}

/// At once, then doubling. Spread, so that a fleet does not come back in one moment.
fn reconnect_delay(attempts: usize) -> Duration {
    if attempts <= 1 {
        return Duration::ZERO;
    }
    let doubled = Duration::from_millis(50) * (1 << attempts.min(7));
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let spread = Duration::from_millis(u64::from(clock.subsec_micros()) % 250);
    (doubled + spread).min(MAX_RECONNECT_DELAY)
}

fn new_enough(version: &str) -> bool {
    let number = version.trim_start_matches('v').split(['-', '+']).next().unwrap_or_default();
    let mut parts = number.split('.').map(|part| part.parse::<u64>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next()) >= MIN_SERVER_PARTS
}

/// The servers of a URL, without credentials.
fn addresses(url: &str) -> Result<Vec<ServerAddr>, FleetError> {
    let split = url.split(',').map(str::trim).filter(|one| !one.is_empty());
    let addresses: Vec<ServerAddr> = split
        .map(|one| {
            let (scheme, _, host) = parts(one);
            let address = format!("{scheme}{host}").parse();
            address.map_err(|error| {
                FleetError::Options(format!("cannot use NATS URL '{}': {error}", redacted(one)))
            })
        })
        .collect::<Result<_, _>>()?;
    if addresses.is_empty() {
        return Err(FleetError::Options("expected a NATS URL, given none".to_owned()));
    }
    Ok(addresses)
}

/// User and password, or a token, of the first server that names one; percent-decoded.
fn user(url: &str) -> Result<Option<(String, Option<String>)>, FleetError> {
    let Some(user) = url.split(',').find_map(|one| parts(one.trim()).1) else {
        return Ok(None);
    };
    let decoded = |text: &str| {
        let wrong = || FleetError::Options("cannot read the user in the NATS URL".to_owned());
        percent_decoded(text).ok_or_else(wrong)
    };
    match user.split_once(':') {
        Some((user, password)) => Ok(Some((decoded(user)?, Some(decoded(password)?)))),
        None => Ok(Some((decoded(user)?, None))),
    }
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
            let (high, low) = (digit(rest.next())?, digit(rest.next())?);
            bytes.push(u8::try_from(high << 4 | low).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// `scheme://`, what stands before the `@`, and the rest.
fn parts(url: &str) -> (&str, Option<&str>, &str) {
    let (scheme, rest) = url.split_at(url.find("://").map_or(0, |at| at + 3));
    match rest.rsplit_once('@') {
        Some((user, host)) => (scheme, Some(user), host),
        None => (scheme, None, rest),
    }
}

/// `url` for people to read: without user and password.
pub(super) fn redacted(url: &str) -> String {
    let one = |url: &str| match parts(url.trim()) {
        (scheme, Some(_), host) => format!("{scheme}***@{host}"),
        (scheme, None, host) => format!("{scheme}{host}"),
    };
    url.split(',').map(one).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_leave_the_url_and_never_show() {
        let url = "nats://me:p%40ss%2Cword@one:4222, tls://two";
        assert_eq!(user(url).unwrap(), Some(("me".into(), Some("p@ss,word".into()))));
        assert_eq!(redacted(url), "nats://***@one:4222,tls://two");
        let addresses = addresses(url).unwrap();
        assert_eq!(addresses.len(), 2);
        assert!(!addresses[0].has_user_pass());
        assert!(addresses[1].tls_required());
        let config = NatsConfig { url: url.into(), ..NatsConfig::default() };
        assert!(!format!("{config:?}").contains("p%40"));
    }

    #[test]
    fn token_and_plain_host_are_understood() {
        assert_eq!(user("nats://s3cret@host").unwrap(), Some(("s3cret".into(), None)));
        assert_eq!(user("host:4222").unwrap(), None);
        assert_eq!(addresses("host").unwrap()[0].port(), 4222);
        assert!(addresses(" ").is_err());
        assert!(addresses("http://host").is_err());
        assert!(user("nats://a%zz@host").is_err());
    }

    #[test]
    fn versions_are_compared_by_number() {
        for version in ["2.12.5", "2.12.10", "2.13.0-RC.1", "3.0.0", "v2.14.0"] {
            assert!(new_enough(version), "{version}");
        }
        for version in ["2.12.4", "2.9.10", "1.99.99", "", "?"] {
            assert!(!new_enough(version), "{version}");
        }
    }

    #[test]
    fn reconnecting_is_quick_first_and_never_slow() {
        assert_eq!(reconnect_delay(1), Duration::ZERO);
        assert!((2..1000).all(|n| reconnect_delay(n) <= MAX_RECONNECT_DELAY));
    }
}
