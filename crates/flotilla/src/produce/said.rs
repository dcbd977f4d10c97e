//! What a producer says of itself: heartbeats, a log line now and then, its metrics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use producer::{SourceConfig, Stats};
use shared::RunId;
use shared::queue::nats::Fleet;
use shared::status::{Role, RunStatus, unix_now};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::heartbeat::{self, Rate};
use crate::observe::Page;
use crate::{fleet, producers};

/// Between two lines in the log.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// How often the last words are tried: `flotilla collect --until-done` waits for them, and the
/// server may be starting anew.
const LAST_TRIES: u32 = 15;

/// What a producer that begins now says of itself.
pub(crate) fn about(run: &RunId, model: &str, input: String) -> RunStatus {
    RunStatus {
        run: run.clone(),
        role: Role::Producer,
        id: fleet::process_name(),
        host: fleet::host(),
        input: Some(input),
        model: Some(model.to_owned()),
        started_at: unix_now(),
        ..RunStatus::default()
    }
}

/// The name of an input: the same for the same entries of the same file on this machine.
pub(crate) fn input_name(source: &SourceConfig) -> anyhow::Result<String> {
    if source.is_stdin()? {
        return Ok("stdin".to_owned());
    }
    let (file, _) = source.file()?;
    let mut name = std::path::absolute(file)
        .with_context(|| format!("cannot name {}", file.display()))?
        .display()
        .to_string();
    if source.start_index > 0 {
        name += &format!(" from {}", source.start_index);
    }
    if let Some(max) = source.max_samples {
        name += &format!(", {max} at most");
    }
    Ok(name)
}

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
    pub(crate) fn start(fleet: &Fleet, about: RunStatus, stats: &Arc<Stats>) -> Self {
        let over = CancellationToken::new();
        let (is_finished, finished) = watch::channel(false);
        let (total, known_total) = watch::channel(None);
        let mut speaker = Speaker {
            about,
            stats: Arc::clone(stats),
            over: over.clone(),
            finished,
            total: known_total,
            rate: Rate::default(),
            last_line: Instant::now(),
        };
        let fleet = fleet.clone();
        let stop = over.clone();
        let task = tokio::spawn(async move {
            let beating = heartbeat::beat(stop, LAST_TRIES, || {
                let status = speaker.status();
                let fleet = &fleet;
                async move { fleet.put_run(&status).await }
            });
            beating.await;
            let last = speaker.status();
            let removing = producers::remove_replaced(&fleet, &last);
            if !matches!(tokio::time::timeout(heartbeat::TIMEOUT, removing).await, Ok(Ok(()))) {
                tracing::debug!("cannot remove the records of earlier producers");
            }
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
    /// What stays.
    about: RunStatus,
    stats: Arc<Stats>,
    over: CancellationToken,
    finished: watch::Receiver<bool>,
    total: watch::Receiver<Option<u64>>,
    rate: Rate,
    last_line: Instant,
}

impl Speaker {
    fn status(&mut self) -> RunStatus {
        let now = self.stats.snapshot();
        let confirmed = now.published + now.repeated + now.failed;
        // What has its line was published once.
        let published = confirmed + now.answered;
        let finished = *self.finished.borrow();
        let rate = self.rate.update(confirmed);
        if self.last_line.elapsed() >= LINE_INTERVAL && !finished {
            self.last_line = Instant::now();
            tracing::info!(
                "{confirmed} published, {} already answered, {} not yet confirmed, {rate:.1}/s",
                now.answered,
                now.waiting
            );
        }
        RunStatus {
            published,
            repeated: now.repeated,
            // A finished producer knows better than a count of its file, with its repeats.
            total: if finished { Some(published) } else { *self.total.borrow() },
            failed: now.failed,
            rate,
            finished,
            ended: self.over.is_cancelled(),
            seen_at: unix_now(),
            ..self.about.clone()
        }
    }
}

/// The metrics of a producer.
pub(super) fn page(stats: &Stats) -> Page {
    let now = stats.snapshot();
    let mut page = Page::default();
    page.counter("jobs_published_total", "Jobs that the queue confirmed.", now.published);
    page.counter("jobs_repeated_total", "Jobs that the queue had already.", now.repeated);
    page.counter("input_failed_total", "Input published as failed outcomes.", now.failed);
    page.counter("input_rejected_total", "Input that can have no line.", now.rejected);
    page.counter("input_answered_total", "Input whose line was written already.", now.answered);
    page.gauge("jobs_unconfirmed", "Publishes not yet confirmed.", now.waiting);
    page.counter("retrievals_total", "Queries that a context was looked up for.", now.retrievals);
    page.counter(
        "retrieval_seconds_total",
        "Seconds of looking contexts up, summed over threads.",
        now.retrieval_seconds,
    );
    page
}
