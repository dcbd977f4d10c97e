//! A real nats-server with JetStream for a test, alone or several in a cluster.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use crate::process::free_port;
use crate::server::{Server, Settings};

/// A running (or killed) nats-server.
pub type NatsServer = Server<NatsOptions>;

/// What differs from a plain server.
#[derive(Clone, Debug, Default)]
pub struct NatsOptions {
    /// Lines at the top level of its configuration, such as `authorization { … }` or `tls { … }`.
    pub config: String,
    /// Lines inside `jetstream { … }`, such as `sync_interval: always`.
    pub jetstream: String,
    /// Whether JetStream is switched off.
    pub no_jetstream: bool,
    /// What stands before `@` in its URL: `user:password`.
    pub credentials: Option<String>,
}

impl NatsServer {
    /// A server that lets everybody in.
    pub fn start() -> Self {
        Self::start_with(NatsOptions::default())
    }

    /// A server with these options.
    pub fn start_with(options: NatsOptions) -> Self {
        Self::launch(options)
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        self.url_at(self.address())
    }

    /// The URL of this server behind another address, such as a proxy's.
    pub fn url_at(&self, address: SocketAddr) -> String {
        match &self.settings.credentials {
            Some(credentials) => format!("nats://{credentials}@{address}"),
            None => format!("nats://{address}"),
        }
    }

    /// Starts it again with other options.
    pub fn restart_with(&mut self, options: NatsOptions) {
        self.settings = options;
        self.restart();
    }
}

impl Settings for NatsOptions {
    const PROGRAM: &str = "nats-server";
    const READY: &str = "Server is ready";

    fn arguments(&self, command: &mut Command, dir: &Path, address: SocketAddr) {
        let mut text = format!("listen: {address}\nmax_payload: 8MB\n{}\n", self.config);
        if !self.no_jetstream {
            let store = dir.join("data");
            let inside = &self.jetstream;
            // Only a bound for reservations: small disks would refuse the usual streams.
            let bound =
                if inside.contains("max_file_store") { "" } else { "max_file_store: 64GB\n" };
            writeln!(text, "jetstream {{\nstore_dir: {store:?}\n{bound}{inside}\n}}").unwrap();
        }
        let file = dir.join("nats.conf");
        std::fs::write(&file, text).unwrap();
        command.arg("-c").arg(&file);
    }
}

/// Several servers that know one another, named `n0`, `n1` and so on.
pub struct NatsCluster {
    /// The servers, by number.
    pub servers: Vec<NatsServer>,
}

impl NatsCluster {
    /// A cluster of so many servers.
    pub fn start(count: usize) -> Self {
        let ports: Vec<u16> = (0..count).map(|_| free_port()).collect();
        let routes: Vec<String> =
            ports.iter().map(|port| format!("nats-route://127.0.0.1:{port}")).collect();
        let server = |(number, port): (usize, &u16)| {
            let config = format!(
                "server_name: n{number}\ncluster {{ name: tests, listen: \"127.0.0.1:{port}\", routes: {routes:?} }}"
            );
            NatsServer::start_with(NatsOptions { config, ..NatsOptions::default() })
        };
        Self { servers: ports.iter().enumerate().map(server).collect() }
    }

    /// Where clients connect: all of them.
    pub fn url(&self) -> String {
        let urls: Vec<String> = self.servers.iter().map(NatsServer::url).collect();
        urls.join(",")
    }
}
