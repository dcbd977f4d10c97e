//! What a producer says of itself: heartbeats, a log line now and then, its metrics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use producer::{SourceConfig, Stats};
use shared::RunId;
use shared::queue::nats::Fleet;
use shared::status::{Role, RunStatus, unix_now};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::heartbeat::{self, Rate};
use crate::observe::Page;

/// Between two lines in the log.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// How often the last words are tried: `flotilla collect --until-done` waits for them, and the
/// server may be starting anew.
const LAST_TRIES: u32 = 15;

/// A producer's words, until its end.
pub(crate) struct Said {
    over: CancellationToken,
    /// Whether everything is published.
    is_finished: watch::Sender<bool>,
    total: watch::Sender<Option<u64>>,
    task: JoinHandle<()>,
}

impl Said {
    /// Begins to speak.
    pub(crate) fn start(fleet: &Fleet, run: &RunId, model: &str, stats: &Arc<Stats>) -> Self {
        let over = CancellationToken::new();
        let (is_finished, finished) = watch::channel(false);
        let (total, known_total) = watch::channel(None);
        let mut speaker = Speaker {
            run: run.clone(),
            model: model.to_owned(),
            stats: Arc::clone(stats),
            finished,
            total: known_total,
            rate: Rate::default(),
            started_at: unix_now(),
            last_line: Instant::now(),
        };
        let fleet = fleet.clone();
        let stop = over.clone();
        let task = tokio::spawn(async move {
            let beating = heartbeat::beat(stop, LAST_TRIES, || {
                let status = speaker.status();
                let fleet = fleet.clone();
                async move { fleet.put_run(&status).await }
            });
            beating.await;
        });
        Self { over, is_finished, total, task }
    }

    /// Counts the queries of a file beside the publishing.
    pub(crate) fn count(&self, source: SourceConfig) {
        let total = self.total.clone();
        // Given up at the end of the command, like all that only reads.
        drop(tokio::task::spawn_blocking(move || total.send_replace(producer::count(&source))));
    }

    /// The last words.
    pub(crate) async fn end(self, is_finished: bool) {
        self.is_finished.send_replace(is_finished);
        self.over.cancel();
        // The words that were said before stay true.
        drop(self.task.await);
    }
}

struct Speaker {
    run: RunId,
    model: String,
    stats: Arc<Stats>,
    finished: watch::Receiver<bool>,
    total: watch::Receiver<Option<u64>>,
    rate: Rate,
    started_at: f64,
    last_line: Instant,
}

impl Speaker {
    fn status(&mut self) -> RunStatus {
        let now = self.stats.snapshot();
        let published = now.published + now.failed;
        let finished = *self.finished.borrow();
        let rate = self.rate.update(published);
        if self.last_line.elapsed() >= LINE_INTERVAL && !finished {
            self.last_line = Instant::now();
            tracing::info!("{published} published, {} not yet confirmed, {rate:.1}/s", now.waiting);
        }
        RunStatus {
            run: self.run.clone(),
            role: Role::Producer,
            model: Some(self.model.clone()),
            published,
            // A finished producer knows better than a count of its file, with its repeats.
            total: if finished { Some(published) } else { *self.total.borrow() },
            done: 0,
            failed: now.failed,
            rate,
            finished,
            output: None,
            seen_at: unix_now(),
            started_at: self.started_at,
        }
    }
}

/// The metrics of a producer.
pub(super) fn page(stats: &Stats) -> Page {
    let now = stats.snapshot();
    let mut page = Page::default();
    page.counter("jobs_published_total", "Jobs that the queue confirmed.", now.published);
    page.counter("input_failed_total", "Input published as failed outcomes.", now.failed);
    page.counter("input_rejected_total", "Input that can have no line.", now.rejected);
    page.gauge("jobs_unconfirmed", "Publishes not yet confirmed.", now.waiting);
    page.counter("retrievals_total", "Queries that a context was looked up for.", now.retrievals);
    page.counter(
        "retrieval_seconds_total",
        "Seconds of looking contexts up, summed over threads.",
        now.retrieval_seconds,
    );
    page
}
