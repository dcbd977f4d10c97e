//! Jobs that take the engine or the whole process down: they are found, and harm no other.

use std::sync::atomic::Ordering;

use shared::{Outcome, Settled};

use crate::script::{LEASE, Process, QUICK, Queues, query};

const MAX_ATTEMPTS: u32 = 5;

/// Innocent jobs `i0`, `i1`, … with guilty ones `g0`, … at these places among them.
async fn publish(queues: &Queues, num_innocents: usize, guilty: &[usize]) {
    let mut num_guilty = 0;
    for number in 0..num_innocents {
        if guilty.contains(&number) {
            queues.publish([(format!("g{num_guilty}").as_str(), query::KILL)]).await;
            num_guilty += 1;
        }
        queues.publish([(format!("i{number}").as_str(), query::QUICK)]).await;
    }
}

/// Checks that exactly the guilty ones failed; most deliveries of an innocent one.
fn check(settled: &[Settled], num_guilty: usize) -> u32 {
    let mut most = 0;
    let mut num_failed = 0;
    for settled in settled {
        let (id, attempts) = (&settled.context.id.0, settled.attempts);
        match &settled.outcome {
            Outcome::Completed(_) => most = most.max(attempts),
            Outcome::Failed(reason) => {
                assert!(id.starts_with('g'), "{id} is innocent: {reason}");
                assert!(reason.contains("gone at the end of each of 8 deliveries"), "{reason}");
                num_failed += 1;
            }
        }
    }
    assert_eq!(num_failed, num_guilty);
    most
}

#[tokio::test(start_paused = true)]
async fn a_job_that_kills_its_process_is_given_up_and_all_others_are_answered() {
    for num_processes in [1, 2, 5] {
        for place in [0, 7, 39] {
            let queues = Queues::new();
            publish(&queues, 40, &[place]).await;
            let start = |_| Process::start(MAX_ATTEMPTS, 16, queues.clone());
            let processes: Vec<Process> = (0..num_processes).map(start).collect();
            let settled = queues.collect(41).await;
            let most = check(&settled, 1);
            assert!(most <= MAX_ATTEMPTS, "an innocent job was delivered {most} times");
            assert!(queues.jobs.is_empty());
            assert_eq!(queues.jobs.dead_letters().len(), 1);
            let shared = processes.iter().map(|process| &process.script.shared);
            let deaths: Vec<u64> =
                shared.flat_map(|shared| shared.held_at_death.lock().unwrap().clone()).collect();
            assert_eq!(deaths.len(), 8);
            let num_alone = deaths.iter().filter(|num_held| **num_held == 1).count();
            assert!(num_alone >= 4, "jobs held at the deaths: {deaths:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn several_jobs_that_kill_their_process_harm_no_other() {
    let queues = Queues::new();
    publish(&queues, 60, &[0, 1, 30, 31, 59]).await;
    let start = |_| Process::start(MAX_ATTEMPTS, 16, queues.clone());
    let _processes: Vec<Process> = (0..3).map(start).collect();
    let most = check(&queues.collect(65).await, 5);
    assert!(most <= MAX_ATTEMPTS + 1, "an innocent job was delivered {most} times");
    assert!(queues.jobs.is_empty());
}

/// The worst case: a guilty job with its neighbours meets workers that never died and have all slots free.
#[tokio::test(start_paused = true)]
async fn idle_workers_that_meet_an_old_group_one_after_another_harm_no_innocent() {
    let queues = Queues::new();
    let processes: Vec<Process> =
        (0..12).map(|_| Process::start(MAX_ATTEMPTS, 40, queues.clone())).collect();
    publish(&queues, 32, &[0]).await;
    let most = check(&queues.collect(33).await, 1);
    assert!(most <= MAX_ATTEMPTS + 1, "an innocent job was delivered {most} times");
    drop(processes);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_takes_the_engine_down_is_found_when_it_is_alone() {
    let queues = Queues::new();
    queues.publish([("a", query::QUICK), ("guilty", query::CRASH), ("z", query::QUICK)]).await;
    let process = Process::start(MAX_ATTEMPTS, 8, queues.clone());
    let settled = queues.collect(3).await;
    let failed: Vec<(&str, u32)> = settled
        .iter()
        .filter(|settled| matches!(settled.outcome, Outcome::Failed(_)))
        .map(|settled| (settled.context.id.0.as_str(), settled.attempts))
        .collect();
    assert_eq!(failed, [("guilty", MAX_ATTEMPTS)]);
    assert!(process.script.shared.num_starts.load(Ordering::Relaxed) >= u64::from(MAX_ATTEMPTS));
}

#[tokio::test(start_paused = true)]
async fn a_job_with_bad_luck_alone_is_answered() {
    let queues = Queues::new();
    queues.publish([("unlucky", query::QUICK)]).await;
    // Workers that went away, however innocent it was in that.
    for _ in 0..MAX_ATTEMPTS + 2 {
        drop(shared::Queue::pull(&queues.jobs, 1, LEASE * 2).await.unwrap());
    }
    let _process = Process::start(MAX_ATTEMPTS, 8, queues.clone());
    let settled = queues.collect(1).await;
    assert_eq!(settled[0].attempts, MAX_ATTEMPTS + 3);
    assert!(matches!(settled[0].outcome, Outcome::Completed(_)));
}

/// Its deliveries are few by then: one that it never ran in must not be taken from it.
#[tokio::test(start_paused = true)]
async fn a_job_that_waits_to_be_alone_loses_no_delivery_when_a_neighbour_takes_the_engine_down() {
    let queues = Queues::new();
    queues.publish([("waiting", query::QUICK)]).await;
    for _ in 1..MAX_ATTEMPTS {
        let pulled = shared::Queue::pull(&queues.jobs, 1, LEASE).await.unwrap().remove(0);
        shared::Delivery::retry(pulled, QUICK / 2).await.unwrap();
    }
    queues.publish([("guilty", query::CRASH_LATER)]).await;
    let process = Process::start(MAX_ATTEMPTS, 8, queues.clone());
    let settled = queues.collect(2).await;
    let attempts: Vec<(&str, u32)> =
        settled.iter().map(|settled| (settled.context.id.0.as_str(), settled.attempts)).collect();
    assert_eq!(attempts, [("guilty", MAX_ATTEMPTS), ("waiting", MAX_ATTEMPTS)]);
    assert!(process.script.shared.num_starts.load(Ordering::Relaxed) >= u64::from(MAX_ATTEMPTS));
    assert!(queues.jobs.is_empty());
}
