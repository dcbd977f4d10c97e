//! The role: outcomes off the queue, into the collector, acked once they are on disk and marked.
//!
//! What the collector itself may not know lives here: leases, batches, when to end.

use std::collections::HashSet;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::join_all;
use shared::status::Known;
use shared::{Delivery, IdDigest, Queue, QueueError, Settled};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::collector::{Collector, Written};
use crate::{Dedup, Error, Log, Step};

/// Most outcomes written and synced together, and so the most lines at an output's end that may not be
/// on disk when it is opened.
pub(crate) const MAX_BATCH: usize = 128;
/// Longest time an outcome waits for others to share its sync.
const MAX_BATCH_AGE: Duration = Duration::from_millis(50);
/// How long a pull waits: so often the observer is told that time passes.
const PULL_WAIT: Duration = Duration::from_secs(1);
/// How long the queue must give nothing to count as drained.
const DRAINED_AFTER: Duration = Duration::from_millis(200);
/// Batches whose acks may be under way while the next one is written.
const MAX_ACKING: usize = 4;
/// How long a collector that shall end now waits for an index that can't be reached, and for
/// its deliveries to go back to the queue.
const GRACE: Duration = Duration::from_secs(2);
/// Delay of what goes back to the queue: long enough for this collector to be gone.
const GIVE_BACK_DELAY: Duration = Duration::from_secs(1);

/// When a collector's work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Not yet known.
    Open,
    /// When this many new lines are written.
    AtLines(u64),
    /// When no outcome is left in the queue.
    WhenDrained,
    /// After the batch in hand.
    Now,
}

/// What a running collector can be asked to do.
#[derive(Debug)]
pub enum Control {
    /// Takes the lines of these jobs, those that failed, out of the output, so that they can be
    /// tried again. Replies how many there were, or what is wrong.
    RemoveFailed {
        /// The jobs' ids.
        ids: HashSet<IdDigest>,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<u64, String>>,
    },
    /// Looks for failed lines of bad input, and takes them out if that is wanted. Replies how many there
    /// were, or what is wrong.
    BadInput {
        /// Only of these ids; of all where there are none.
        ids: HashSet<IdDigest>,
        /// Whether they leave the output.
        remove: bool,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<u64, String>>,
    },
    /// Tells which of these jobs have their line. Where the collector can't tell any more, `reply` is
    /// dropped.
    Known {
        /// The jobs' ids.
        ids: Vec<IdDigest>,
        /// Where the answer goes.
        reply: oneshot::Sender<Known>,
    },
}

/// What the collector tells as it goes.
pub trait Observer: Send {
    /// The lines of these outcomes are on disk. Also called with none, now and then, so that time
    /// can be told to pass.
    fn written(&mut self, outcomes: &[Settled]);

    /// So many outcomes had their line already and were dropped.
    fn repeated(&mut self, _outcomes: u64) {}

    /// Syncing a batch took so long.
    fn synced(&mut self, _elapsed: Duration) {}
}

/// Writes every outcome of `queue` that has no line yet, and acks it.
///
/// Ends when `end` says so. Any error ends it at once, nothing acked that isn't on disk: a failed
/// sync is never tried again, since the kernel may have dropped the pages.
pub async fn run<Q: Queue<Settled>, D: Dedup, L: Log>(
    queue: &Q,
    collector: &mut Collector<D, L>,
    end: watch::Receiver<End>,
    mut controls: mpsc::Receiver<Control>,
    observer: &mut impl Observer,
) -> Result<(), Error> {
    let mut acks = JoinSet::new();
    let role = Role { queue, end, acks: &mut acks };
    let served = role.serve(collector, &mut controls, observer).await;
    // What is marked may be acked, whatever came after it.
    while acks.join_next().await.is_some() {}
    served
}

struct Role<'a, Q> {
    queue: &'a Q,
    end: watch::Receiver<End>,
    /// Acks of batches that are on disk and marked.
    acks: &'a mut JoinSet<()>,
}

impl<Q: Queue<Settled>> Role<'_, Q> {
    async fn serve<D: Dedup, L: Log>(
        mut self,
        collector: &mut Collector<D, L>,
        controls: &mut mpsc::Receiver<Control>,
        observer: &mut impl Observer,
    ) -> Result<(), Error> {
        let mut num_written = 0;
        let (mut controllable, mut endable) = (true, true);
        loop {
            // As many as wait have their turn between two batches: neither they nor the batches starve.
            for _ in 0..controls.len() {
                if *self.end.borrow() == End::Now {
                    return Ok(());
                }
                if let Ok(control) = controls.try_recv() {
                    self.obey(collector, control).await?;
                }
            }
            // Read before the pull: what ended the run was published before the end was told.
            let end = *self.end.borrow_and_update();
            match end {
                End::Now => return Ok(()),
                End::AtLines(lines) if num_written >= lines => return Ok(()),
                _ => {}
            }
            let wait = if end == End::WhenDrained { DRAINED_AFTER } else { PULL_WAIT };
            let first = tokio::select! {
                biased;
                changed = self.end.changed(), if endable => {
                    endable = changed.is_ok();
                    continue;
                }
                pulled = self.queue.pull(MAX_BATCH, wait) => pulled?,
                control = controls.recv(), if controllable => {
                    match control {
                        Some(control) => self.obey(collector, control).await?,
                        None => controllable = false,
                    }
                    continue;
                }
            };
            if first.is_empty() {
                if end == End::WhenDrained {
                    return Ok(());
                }
                self.check_claim(collector).await?;
                observer.written(&[]);
                continue;
            }
            let batch = self.fill(first).await?;
            let Some(written) = self.write(collector, batch).await? else { return Ok(()) };
            num_written += written.new.len() as u64;
            observer.synced(written.sync);
            observer.written(&written.new);
            if written.repeated > 0 {
                observer.repeated(written.repeated);
            }
        }
    }

    /// One that has nothing to write learns here that it was taken over.
    async fn check_claim<D: Dedup, L: Log>(
        &self,
        collector: &mut Collector<D, L>,
    ) -> Result<(), Error> {
        tokio::select! {
            biased;
            known = collector.known(&[]) => known.map(drop),
            // What was cut short here is not looked at again: the next thing is the end.
            () = give_up(self.end.clone()) => Ok(()),
        }
    }

    /// Waits a little for others that can share the sync.
    async fn fill(&self, first: Vec<Q::Delivery>) -> Result<Vec<Q::Delivery>, QueueError> {
        let mut batch = first;
        let deadline = Instant::now() + MAX_BATCH_AGE;
        while batch.len() < MAX_BATCH {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            match self.queue.pull(MAX_BATCH - batch.len(), left).await {
                Ok(more) => batch.extend(more),
                Err(error) => {
                    give_back(batch).await;
                    return Err(error);
                }
            }
        }
        Ok(batch)
    }

    /// Writes a batch and starts its acks. `None` if the collector was told to end while the
    /// index could not be reached; the batch has gone back to the queue then.
    async fn write<D: Dedup, L: Log>(
        &mut self,
        collector: &mut Collector<D, L>,
        batch: Vec<Q::Delivery>,
    ) -> Result<Option<Batch>, Error> {
        collector.reached(Step::Pulled)?;
        let outcomes: Vec<&Settled> = batch.iter().map(Delivery::message).collect();
        let written = tokio::select! {
            biased;
            written = collector.write(&outcomes) => Some(written),
            () = give_up(self.end.clone()) => None,
            never = keep_alive(&batch) => match never {},
        };
        let Written { new, sync } = match written {
            Some(Ok(written)) => written,
            // A crash that a test asked for gives nothing back.
            Some(Err(error @ Error::Stopped(_))) => return Err(error),
            Some(Err(error)) => {
                give_back(batch).await;
                return Err(error);
            }
            None => {
                give_back(batch).await;
                return Ok(None);
            }
        };
        let repeated = (outcomes.len() - new.len()) as u64;
        let new = new.into_iter().map(|index| outcomes[index].clone()).collect();
        self.ack(collector, batch).await?;
        Ok(Some(Batch { new, repeated, sync }))
    }

    /// Acks a batch while the next ones are taken and written.
    async fn ack<D: Dedup, L: Log>(
        &mut self,
        collector: &mut Collector<D, L>,
        batch: Vec<Q::Delivery>,
    ) -> Result<(), Error> {
        self.acks.spawn(async move {
            for acked in join_all(batch.into_iter().map(Delivery::ack)).await {
                // An expired lease means that it comes again and is dropped as known.
                if let Err(error) = acked {
                    tracing::debug!(%error, "late ack of an outcome");
                }
            }
        });
        while self.acks.len() > MAX_ACKING {
            self.acks.join_next().await;
        }
        while self.acks.try_join_next().is_some() {
            collector.reached(Step::Acked)?;
        }
        Ok(())
    }

    async fn obey<D: Dedup, L: Log>(
        &self,
        collector: &mut Collector<D, L>,
        control: Control,
    ) -> Result<(), Error> {
        match control {
            Control::RemoveFailed { ids, reply } => {
                answer(reply, collector.remove_failed(&ids).await)
            }
            Control::BadInput { ids, remove, reply } => {
                answer(reply, collector.handle_bad_input(&ids, remove).await)
            }
            Control::Known { ids, reply } => {
                let written = tokio::select! {
                    biased;
                    written = collector.known(&ids) => written?,
                    // What was cut short here is not looked at again: the next thing is the end.
                    () = give_up(self.end.clone()) => return Ok(()),
                };
                let _gone = reply.send(Known { num_lines: collector.num_lines(), written });
                Ok(())
            }
        }
    }
}

/// Tells whoever asked, who may have gone. An error is the collector's end: nobody knows what it left
/// behind until the output is opened anew.
fn answer(
    reply: oneshot::Sender<Result<u64, String>>,
    done: Result<u64, Error>,
) -> Result<(), Error> {
    let _gone = reply.send(done.as_ref().copied().map_err(ToString::to_string));
    done.map(drop)
}

/// A batch, written.
struct Batch {
    new: Vec<Settled>,
    repeated: u64,
    sync: Duration,
}

/// Ready when the collector shall end and its index has had time to answer.
async fn give_up(mut end: watch::Receiver<End>) {
    if end.wait_for(|end| *end == End::Now).await.is_err() {
        // Nobody is left who could tell it to end.
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(GRACE).await;
}

/// Keeps the leases of `batch` for as long as it is polled.
async fn keep_alive<D: Delivery<Settled>>(batch: &[D]) -> std::convert::Infallible {
    let lease = batch.iter().map(Delivery::lease).min().unwrap_or(Duration::from_secs(60));
    loop {
        tokio::time::sleep(lease / 3).await;
        for kept in join_all(batch.iter().map(Delivery::keep_alive)).await {
            // It comes again and is dropped as known.
            if let Err(error) = kept {
                tracing::debug!(%error, "an outcome's lease could not be kept");
            }
        }
    }
}

/// Gives deliveries back to the queue, for the next collector not to wait for their leases.
async fn give_back<D: Delivery<Settled>>(batch: Vec<D>) {
    let given = join_all(batch.into_iter().map(|delivery| delivery.retry(GIVE_BACK_DELAY)));
    let given = pin!(given);
    // Where the queue can't be reached, their leases end by themselves.
    let _late = tokio::time::timeout(GRACE, given).await;
}
