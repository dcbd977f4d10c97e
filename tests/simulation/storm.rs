//! What strikes a world from outside, at random times, until its storm is over.

use tokio::time::{Instant, sleep};

use crate::process::Role;
use crate::world::{Fault, World};

pub(crate) async fn rage(world: World) {
    let end = Instant::now() + world.plan.storm;
    while Instant::now() < end && !world.is_calm() {
        sleep(world.chance.millis(1, world.plan.max_lull)).await;
        if !world.is_calm() {
            strike(&world);
        }
    }
    world.calm();
}

fn strike(world: &World) {
    let lease = world.plan.lease.as_millis() as u64;
    let until = Instant::now() + world.chance.millis(10, lease * 2);
    match world.chance.between(0, 12) {
        0..=2 => {
            if let Some(process) = world.any_process() {
                world.kill(&process);
            }
        }
        3 | 4 => {
            if let Some(process) = world.any_process() {
                world.count(Fault::ProcessStopped);
                world.note(|| format!("{} is stopped", process.name()));
                process.stop_until(until);
            }
        }
        5 => {
            if let Some(process) = world.any_process() {
                world.count(Fault::LinkCut);
                world.note(|| format!("{} is cut off", process.name()));
                process.cut_until(until);
            }
        }
        6 => terminate(world),
        7 => {
            world.count(Fault::BrokerRestarted);
            world.note(|| "the broker is down".to_owned());
            world.break_down(|outages| outages.broker = until);
        }
        8 => {
            world.count(Fault::BrokerLostPower);
            world.note(|| "the broker loses its power".to_owned());
            world.lose_power();
            world.break_down(|outages| outages.broker = until);
        }
        9 if world.plan.has_index_server => {
            world.count(Fault::IndexDown);
            world.note(|| "the index is down".to_owned());
            world.break_down(|outages| outages.index = until);
        }
        10 if world.plan.has_index_server => {
            world.count(Fault::IndexFlushed);
            world.note(|| "the index is flushed".to_owned());
            world.index.restore(Default::default());
        }
        11 if world.plan.has_index_server => {
            world.count(Fault::IndexRolledBack);
            world.note(|| "the index is rolled back".to_owned());
            world.roll_index_back();
        }
        12 => world.disk.fail_syncs(world.chance.one_in(2)),
        _ => {}
    }
    if world.plan.has_index_server && world.chance.one_in(3) {
        world.copy_index();
    }
}

fn terminate(world: &World) {
    let Some(process) = world.any_process() else { return };
    world.count(match process.role() {
        Role::Producer => return,
        Role::Worker => Fault::WorkerTerminated,
        Role::Collector => Fault::CollectorTerminated,
    });
    world.note(|| format!("{} is asked to end", process.name()));
    process.shutdown().cancel();
}
