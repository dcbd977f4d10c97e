//! A small TCP proxy on loopback that plays a bad network: silence without a reset, lost bytes,
//! delay, resets, refusal. Runs on threads of its own, so that plain and async tests may use it.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// What happens to the bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flow {
    /// They arrive.
    #[default]
    Pass,
    /// They wait, as in a link that is cut without a reset: they arrive once it is mended.
    Hold,
    /// They vanish. A connection that lost some is reset once bytes pass again.
    Lose,
}

#[derive(Clone, Copy, Debug, Default)]
struct Link {
    to_server: Flow,
    to_client: Flow,
    delay: Duration,
    refuses: bool,
    /// Connections of an earlier generation are reset.
    generation: u64,
}

#[derive(Clone, Copy)]
enum Direction {
    ToServer,
    ToClient,
}

impl Link {
    fn flow(&self, direction: Direction) -> Flow {
        match direction {
            Direction::ToServer => self.to_server,
            Direction::ToClient => self.to_client,
        }
    }
}

/// A proxy in front of a server. Its connections are cut when it is dropped.
pub struct Proxy {
    address: SocketAddr,
    link: watch::Sender<Link>,
    runtime: Option<Runtime>,
}

impl Proxy {
    /// A proxy that passes everything on to `upstream`.
    pub fn start(upstream: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (link, watching) = watch::channel(Link::default());
        runtime.spawn(accept(listener, upstream, watching));
        Self { address, link, runtime: Some(runtime) }
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Everything passes again, without delay. What was held arrives; a connection that lost bytes is reset.
    pub fn pass(&self) {
        self.link
            .send_modify(|link| *link = Link { generation: link.generation, ..Link::default() });
    }

    /// Nothing passes any more, and nobody is told.
    pub fn hold(&self) {
        self.flows(Flow::Hold, Flow::Hold);
    }

    /// What the server answers is lost; what the client sends arrives.
    pub fn lose_replies(&self) {
        self.flows(Flow::Pass, Flow::Lose);
    }

    /// Sets both directions.
    pub fn flows(&self, to_server: Flow, to_client: Flow) {
        self.link.send_modify(|link| {
            link.to_server = to_server;
            link.to_client = to_client;
        });
    }

    /// Every chunk of bytes waits so long, in each direction.
    pub fn delay(&self, delay: Duration) {
        self.link.send_modify(|link| link.delay = delay);
    }

    /// Resets all connections; new ones are let in.
    pub fn reset(&self) {
        self.link.send_modify(|link| link.generation += 1);
    }

    /// Resets all connections and every new one at once, until [`pass`](Self::pass).
    pub fn refuse(&self) {
        self.link.send_modify(|link| {
            link.generation += 1;
            link.refuses = true;
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // In the background, since a runtime must not wait for another one.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(
    listener: std::net::TcpListener,
    upstream: SocketAddr,
    link: watch::Receiver<Link>,
) {
    let listener = TcpListener::from_std(listener).unwrap();
    while let Ok((client, _)) = listener.accept().await {
        tokio::spawn(connect(client, upstream, link.clone()));
    }
}

async fn connect(client: TcpStream, upstream: SocketAddr, link: watch::Receiver<Link>) {
    let generation = link.borrow().generation;
    let refuses = link.borrow().refuses;
    let server = if refuses { None } else { TcpStream::connect(upstream).await.ok() };
    let Some(server) = server else {
        drop(client.set_zero_linger());
        return;
    };
    // Many small messages: nobody waits for a fuller packet.
    drop((client.set_nodelay(true), server.set_nodelay(true)));
    let (from_client, mut to_client) = client.into_split();
    let (from_server, mut to_server) = server.into_split();
    let up = Pump { direction: Direction::ToServer, generation, link: link.clone(), lost: false };
    let down = Pump { direction: Direction::ToClient, generation, link, lost: false };
    let ended = tokio::try_join!(
        up.run(from_client, &mut to_server),
        down.run(from_server, &mut to_client)
    );
    if ended.is_err() {
        drop((to_client.as_ref().set_zero_linger(), to_server.as_ref().set_zero_linger()));
        // A plain drop would end the connection in good order first.
        to_client.forget();
        to_server.forget();
    }
}

/// The connection is to be reset.
struct Broken;

/// Moves the bytes of one direction of one connection.
struct Pump {
    direction: Direction,
    generation: u64,
    link: watch::Receiver<Link>,
    lost: bool,
}

impl Pump {
    async fn run(mut self, mut from: OwnedReadHalf, to: &mut OwnedWriteHalf) -> Result<(), Broken> {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let flow = self.flow()?;
            let length = tokio::select! {
                biased;
                changed = self.link.changed() => {
                    changed.map_err(|_| Broken)?;
                    continue;
                }
                read = from.read(&mut buffer), if flow != Flow::Hold => read.map_err(|_| Broken)?,
            };
            if length == 0 {
                return to.shutdown().await.map_err(|_| Broken);
            }
            if flow == Flow::Lose {
                self.lost = true;
                continue;
            }
            let delay = self.link.borrow().delay;
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            to.write_all(&buffer[..length]).await.map_err(|_| Broken)?;
        }
    }

    /// What holds for the next bytes.
    fn flow(&mut self) -> Result<Flow, Broken> {
        let link = *self.link.borrow_and_update();
        let flow = link.flow(self.direction);
        let broken = link.generation != self.generation || (self.lost && flow == Flow::Pass);
        if broken { Err(Broken) } else { Ok(flow) }
    }
}
