//! What a producer asks of the run's collector: which queries have their line already.
//!
//! Nothing but work depends on it. Where nobody answers, everything is published, and the collector
//! drops what it has; then nobody is asked for a while.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use producer::{Known, Stats};
use shared::queue::nats::{Fleet, FleetError};
use shared::{IdDigest, JobId, RunId};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long nobody is asked after nobody was there: such an answer comes at once.
const ABSENT_PAUSE: Duration = Duration::from_secs(1);
/// How long nobody is asked after a question was waited for in vain, at first and at most.
const SILENT_PAUSES: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));

/// How patiently a producer asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    /// How long an answer may take.
    pub(super) timeout: Duration,
    /// How long nobody is asked about a run that had no line.
    pub(super) fresh_pause: Duration,
}

impl Manner {
    /// For input that comes in one piece: each id comes once, so that what is written later in a run
    /// that had no line is this producer's own.
    pub(super) const INPUT: Self =
        Self { timeout: Duration::from_secs(3), fresh_pause: Duration::from_secs(86_400 * 365) };
    /// For requests: somebody waits for each, and the same may come again.
    pub(super) const REQUESTS: Self =
        Self { timeout: Duration::from_millis(500), fresh_pause: Duration::from_secs(1) };
}

/// Asks a run's collector. Clones share what they have learnt of it.
#[derive(Clone)]
pub(super) struct Asking {
    inner: Arc<Inner>,
}

struct Inner {
    fleet: Fleet,
    run: RunId,
    manner: Manner,
    stats: Arc<Stats>,
    runtime: Handle,
    state: Mutex<State>,
}

/// What was learnt of the collector. Written with each answer, read before each question.
#[derive(Default)]
struct State {
    /// Nobody is asked until then.
    quiet_until: Option<Instant>,
    /// The next pause after a question in vain.
    next_pause: Option<Duration>,
    /// Whether it was told that nobody answers.
    is_told: bool,
}

impl Asking {
    /// Asks from this runtime, and counts what is answered into `stats`.
    pub(super) fn new(fleet: &Fleet, run: &RunId, manner: Manner, stats: &Arc<Stats>) -> Self {
        let inner = Inner {
            fleet: fleet.clone(),
            run: run.clone(),
            manner,
            stats: Arc::clone(stats),
            runtime: Handle::current(),
            state: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }
}

impl Known for Asking {
    fn ask(&mut self, ids: &[&JobId]) -> oneshot::Receiver<Vec<bool>> {
        let (reply, answer) = oneshot::channel();
        // Without a reply, none is known.
        if !ids.is_empty() && !self.inner.is_quiet() {
            let digests: Vec<IdDigest> = ids.iter().map(|id| id.digest()).collect();
            let inner = Arc::clone(&self.inner);
            self.inner.runtime.spawn(async move {
                if let Some(written) = inner.request(&digests).await {
                    // A reader that is gone has been interrupted.
                    let _gone = reply.send(written);
                }
            });
        }
        answer
    }
}

impl Inner {
    fn is_quiet(&self) -> bool {
        self.state().quiet_until.is_some_and(|until| Instant::now() < until)
    }

    async fn request(&self, ids: &[IdDigest]) -> Option<Vec<bool>> {
        match self.fleet.request_known(&self.run, ids, self.manner.timeout).await {
            Ok(known) => {
                self.heard(known.num_lines);
                let num_written = known.written.iter().filter(|written| **written).count();
                self.stats.add_answered(num_written as u64);
                Some(known.written)
            }
            Err(error) => {
                self.heard_nothing(&error);
                None
            }
        }
    }

    fn heard(&self, num_lines: u64) {
        let mut state = self.state();
        if std::mem::take(&mut state.is_told) {
            tracing::info!(run = self.run.0, "a collector answers: what has its line is left out");
        }
        state.next_pause = None;
        state.quiet_until = (num_lines == 0).then(|| Instant::now() + self.manner.fresh_pause);
    }

    fn heard_nothing(&self, error: &FleetError) {
        let now = Instant::now();
        let mut state = self.state();
        // Questions asked together come back together.
        if state.quiet_until.is_some_and(|until| now < until) {
            return;
        }
        let is_absent = matches!(error, FleetError::NoCollector { .. });
        let pause = if is_absent {
            ABSENT_PAUSE
        } else {
            let (first, longest) = SILENT_PAUSES;
            let pause = state.next_pause.unwrap_or(first);
            state.next_pause = Some((pause * 2).min(longest));
            pause
        };
        state.quiet_until = Some(now + pause);
        if std::mem::replace(&mut state.is_told, true) {
            return;
        }
        let run = &self.run.0;
        if is_absent {
            tracing::info!(
                run,
                "no collector of the run can be asked: all is published, and what has its line is computed again"
            );
        } else {
            tracing::warn!(
                run,
                %error,
                "the run's collector does not tell what has its line: all is published, and that is computed again"
            );
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
