//! Somebody at the NATS server who is no flotilla: an operator who changes a stream, a stranger who
//! publishes garbage, an observer of what is stored. For plain tests: every call blocks.

use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::stream::{Config, State};
use async_nats::jetstream::{self, Context};
use tokio::runtime::Runtime;

/// A connection of its own.
pub struct Outsider {
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
        let connecting = async { jetstream::new(async_nats::connect(url).await.unwrap()) };
        Self { context: runtime.block_on(connecting), runtime }
    }

    /// Publishes any bytes, and waits until they are stored.
    pub fn publish(&self, subject: &str, bytes: &[u8]) {
        let publishing = async {
            let ack = self.context.publish(subject.to_owned(), bytes.to_vec().into()).await;
            ack.unwrap().await.unwrap();
        };
        self.runtime.block_on(publishing);
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
