//! Random histories of crashes, outages, rollbacks and repeats: each id comes out once.

use std::collections::BTreeSet;
use std::time::Duration;

use flotilla_collector::dedup::server::IndexServer;
use flotilla_collector::log::memory::Disk;
use flotilla_collector::{Collector, Error, Probe, Step};
use proptest::prelude::*;
use shared::Settled;

use crate::fixture::{answered, failed};

const DEADLINE: Duration = Duration::from_secs(3600);

/// What happens next.
#[derive(Clone, Debug)]
enum Event {
    /// Outcomes with these ids are delivered; acked if all went well.
    Batch(Vec<u8>),
    /// The collector dies the n-th time that it does this, and unsynced bytes are lost but for some.
    CrashAt(Step, u8, prop::sample::Index),
    /// The index is flushed.
    Flush,
    /// The index goes back to a copy that was made earlier.
    Restore(prop::sample::Index),
    /// A copy of the index is made.
    Copy,
    /// Failed lines of these ids are taken out, to be tried again.
    Retry(Vec<u8>),
    /// Another collector takes over; the first goes on without knowing.
    TakeOver,
}

fn event() -> impl Strategy<Value = Event> {
    let ids = proptest::collection::vec(0_u8..24, 1..8);
    let step = proptest::sample::select(&Step::ALL[1..6]);
    let removing = proptest::sample::select(&Step::ALL[7..]);
    let index = any::<prop::sample::Index>;
    prop_oneof![
        8 => ids.clone().prop_map(Event::Batch),
        3 => (step, 1_u8..3, index()).prop_map(|(s, n, i)| Event::CrashAt(s, n, i)),
        1 => (removing, 1_u8..2, index()).prop_map(|(s, n, i)| Event::CrashAt(s, n, i)),
        1 => Just(Event::Flush),
        1 => index().prop_map(Event::Restore),
        2 => Just(Event::Copy),
        2 => ids.prop_map(Event::Retry),
        1 => Just(Event::TakeOver),
    ]
}

/// Every third id fails at first.
fn outcome(id: u8, retried: &BTreeSet<u8>) -> Settled {
    let name = id.to_string();
    if id.is_multiple_of(3) && !retried.contains(&id) { failed(&name) } else { answered(&name) }
}

struct World {
    disk: Disk,
    server: IndexServer,
    /// Ids whose outcome was acked: nobody delivers them again, unless retried.
    acked: BTreeSet<u8>,
    /// Ids whose failed line was asked to go.
    retried: BTreeSet<u8>,
    /// Outcomes seen, acked or not.
    delivered: BTreeSet<u8>,
}

type Running = Collector<
    flotilla_collector::dedup::server::ServerDedup,
    flotilla_collector::log::memory::MemoryLog,
>;

impl World {
    async fn open(&self) -> Running {
        Collector::open(self.disk.open(), self.server.client()).await.unwrap()
    }

    async fn deliver(&mut self, collector: &mut Running, ids: &[u8]) -> Result<(), Error> {
        let outcomes: Vec<Settled> = ids.iter().map(|&id| outcome(id, &self.retried)).collect();
        self.delivered.extend(ids);
        let outcomes: Vec<&Settled> = outcomes.iter().collect();
        collector.write(&outcomes).await?;
        self.acked.extend(ids);
        Ok(())
    }

    async fn retry(&mut self, collector: &mut Running, ids: &[u8]) -> Result<(), Error> {
        // Only what has its outcome already can be asked for; its job is published again then.
        let ids: Vec<u8> = ids.iter().copied().filter(|id| self.acked.contains(id)).collect();
        let digests = ids.iter().map(|id| shared::JobId(id.to_string()).digest()).collect();
        let lines = self.disk.lines();
        let has_failed = |id: &u8| lines.contains(&(id.to_string(), true));
        let failed: Vec<u8> = ids.into_iter().filter(has_failed).collect();
        // From here on the answer may come, whether this works or not.
        self.retried.extend(&failed);
        for id in &failed {
            self.acked.remove(id);
        }
        collector.remove_failed(&digests).await.map(drop)
    }

    fn check(&self) {
        let lines = self.disk.lines();
        let ids: BTreeSet<&str> = lines.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(ids.len(), lines.len(), "an id has two lines");
        for id in &self.acked {
            assert!(ids.contains(id.to_string().as_str()), "{id} was acked and has no line");
        }
    }
}

async fn live(events: Vec<Event>) {
    let mut world = World {
        disk: Disk::default(),
        server: IndexServer::default(),
        acked: BTreeSet::new(),
        retried: BTreeSet::new(),
        delivered: BTreeSet::new(),
    };
    let mut copies = vec![world.server.snapshot()];
    let mut collector = world.open().await;
    let mut keep = None;
    for event in events {
        let done = match event {
            Event::Batch(ids) => world.deliver(&mut collector, &ids).await,
            Event::Retry(ids) => world.retry(&mut collector, &ids).await,
            Event::CrashAt(step, nth, index) => {
                let mut left = nth;
                keep = Some(index);
                collector.set_probe(Probe::new(move |reached| {
                    left -= u8::from(reached == step);
                    reached == step && left == 0
                }));
                Ok(())
            }
            Event::Flush => {
                world.server.restore(Default::default());
                Ok(())
            }
            Event::Restore(index) => {
                world.server.restore(index.get(&copies).clone());
                Ok(())
            }
            Event::Copy => {
                copies.push(world.server.snapshot());
                Ok(())
            }
            Event::TakeOver => {
                let next = world.open().await;
                let mut first = std::mem::replace(&mut collector, next);
                let refused = world.deliver(&mut first, &[1]).await;
                assert!(matches!(refused, Err(Error::TakenOver { .. })), "{refused:?}");
                Ok(())
            }
        };
        match done {
            Ok(()) => {}
            Err(Error::Stopped(_)) => {
                let index = keep.take().unwrap();
                world.disk.crash(|unsynced| index.index(unsynced + 1));
                collector = world.open().await;
            }
            Err(error) => panic!("{error}"),
        }
        world.check();
    }
    // In the end everything that was ever delivered comes again, as it would from the queue.
    collector = world.open().await;
    for id in world.delivered.clone() {
        world.deliver(&mut collector, &[id]).await.unwrap();
    }
    world.check();
    assert_eq!(world.disk.lines().len(), world.delivered.len());
    assert_eq!(collector.num_lines() as usize, world.delivered.len());
    let failed = world.disk.lines().iter().filter(|(_, failed)| *failed).count();
    assert_eq!(collector.num_failed() as usize, failed);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn each_id_comes_out_once_whatever_crashes(
        events in proptest::collection::vec(event(), 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            tokio::time::timeout(DEADLINE, live(events)).await.expect("never waits");
        });
    }
}
