//! Somebody at the NATS server who is no flotilla: an operator who changes a stream, a stranger who
//! publishes garbage, an observer of what is stored. For plain tests: every call blocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_nats::Client;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{Config, State};
use async_nats::jetstream::{self, Context};
use futures_util::StreamExt;
use tokio::runtime::Runtime;

use crate::process::DEADLINE;

/// A connection of its own.
pub struct Outsider {
    client: Client,
    context: Context,
    runtime: Runtime,
}

impl Outsider {
    /// Connects.
    pub fn connect(url: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let connecting = async {
            let client = async_nats::connect(url).await.unwrap();
            (jetstream::new(client.clone()), client)
        };
        let (context, client) = runtime.block_on(connecting);
        Self { client, context, runtime }
    }

    /// Publishes any bytes, and waits until they are stored.
    pub fn publish(&self, subject: &str, bytes: &[u8]) {
        let publishing = async {
            let ack = self.context.publish(subject.to_owned(), bytes.to_vec().into()).await;
            ack.unwrap().await.unwrap();
        };
        self.runtime.block_on(publishing);
    }

    /// Waits until the server has forgotten the ids that were published up to now, by one of its own:
    /// it leaves messages on `subject`.
    pub fn wait_until_forgotten(&self, subject: &str) {
        let deadline = Instant::now() + DEADLINE;
        let is_repeat = || {
            let message = PublishMessage::build().message_id("probe");
            let publishing = async {
                let ack = self.context.send_publish(subject.to_owned(), message).await;
                ack.unwrap().await.unwrap().duplicate
            };
            self.runtime.block_on(publishing)
        };
        is_repeat();
        while is_repeat() {
            assert!(Instant::now() < deadline, "the window does not end");
        }
    }

    /// Replies to the requests on a subject from now on, or never does; how many there were.
    pub fn reply(&self, subject: &str, with: Option<&'static [u8]>) -> Arc<AtomicUsize> {
        let count = Arc::<AtomicUsize>::default();
        let (client, counter) = (self.client.clone(), Arc::clone(&count));
        let subscribing = async {
            let subscriber = client.subscribe(subject.to_owned()).await.unwrap();
            settle(&client).await;
            subscriber
        };
        let mut requests = self.runtime.block_on(subscribing);
        let client = self.client.clone();
        self.runtime.spawn(async move {
            while let Some(request) = requests.next().await {
                counter.fetch_add(1, Ordering::SeqCst);
                if let (Some(to), Some(bytes)) = (request.reply, with) {
                    client.publish(to, bytes.into()).await.unwrap();
                }
            }
        });
        count
    }

    /// Publishes to whoever listens now; nothing is stored.
    pub fn tell(&self, subject: &str, bytes: &[u8]) {
        let telling = async {
            self.client.publish(subject.to_owned(), bytes.to_vec().into()).await.unwrap();
            self.client.flush().await.unwrap();
        };
        self.runtime.block_on(telling);
    }

    /// Changes the settings of a stream.
    pub fn change(&self, stream: &str, change: impl FnOnce(&mut Config)) {
        let changing = async {
            let mut config =
                self.context.get_stream(stream).await.unwrap().cached_info().config.clone();
            change(&mut config);
            self.context.update_stream(config).await.unwrap();
        };
        self.runtime.block_on(changing);
    }

    /// Lets a stream hold at most `count` messages; -1 for any number.
    pub fn set_max_messages(&self, stream: &str, count: i64) {
        self.change(stream, |config| config.max_messages = count);
    }

    /// How long a stream knows a repeated publish.
    pub fn set_duplicate_window(&self, stream: &str, window: Duration) {
        self.change(stream, |config| config.duplicate_window = window);
    }

    /// What a stream holds now, and its last number: how many messages were ever stored.
    pub fn state(&self, stream: &str) -> State {
        let looking =
            async { self.context.get_stream(stream).await.unwrap().cached_info().state.clone() };
        self.runtime.block_on(looking)
    }

    /// Name of the server of a cluster that leads a stream, if there is one, and of those that follow
    /// it and have all that it has.
    pub fn replicas(&self, stream: &str) -> (Option<String>, Vec<String>) {
        let looking = async {
            let cluster =
                self.context.get_stream(stream).await.ok()?.cached_info().cluster.clone()?;
            let current = cluster.replicas.into_iter().filter(|peer| peer.current && !peer.offline);
            Some((cluster.leader, current.map(|peer| peer.name).collect()))
        };
        // Nobody answers while a leader is chosen.
        self.runtime.block_on(looking).unwrap_or_default()
    }

    /// How many pulls wait at a consumer.
    pub fn num_waiting(&self, stream: &str, consumer: &str) -> usize {
        let looking = async {
            let stream = self.context.get_stream(stream).await.unwrap();
            let found = stream.get_consumer::<jetstream::consumer::pull::Config>(consumer).await;
            let mut consumer: PullConsumer = found.unwrap();
            consumer.info().await.unwrap().num_waiting
        };
        self.runtime.block_on(looking)
    }
}

/// Waits until the server has done what this client told it, its subscriptions among that: a round trip. A flush only
/// hands everything to the system.
pub async fn settle(client: &Client) {
    let asked = client.request("nobody.listens.here", Vec::new().into()).await;
    assert!(asked.is_err(), "somebody answered: {asked:?}");
}
