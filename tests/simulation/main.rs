//! A simulation of the fleet, from seeds: the product's workers and collectors in one thread whose clock
//! is the test's, over a broker, a disk and an index that fail in every way that the real ones do, except
//! that here the seed says when.
//!
//! Each seed is a small world (`plan.rs`): some jobs, up to four workers, up to two collectors, a time of
//! faults (`storm.rs`, and `strikes` wherever it stands), in some worlds a retry of what failed, and then
//! peace. At the end each id must have exactly one line, no job may have failed because of one other, and
//! nothing may be left queued (`life.rs`). In worlds without any fault nothing may be done twice.
//!
//! A failing seed prints itself. `SIMULATION_SEED=n cargo test --workspace --test simulation` lives it again, and writes
//! down all that happens; `SIMULATION_SEEDS=n` lives so many instead of the default.
//!
//! What is not here: the wire and the servers themselves (`tests/servers`, `tests/fleet`), the file (the
//! collector's own tests), threads, a broker that loses what it has confirmed (`flotilla reconcile` is for that).
#![allow(clippy::expect_used, reason = "a failed step is a failed test")]
#![allow(
    clippy::print_stdout,
    reason = "what a failing seed does is for whoever looks for the reason"
)]

mod chance;
mod engine;
mod life;
mod plan;
mod process;
mod queue;
mod roles;
mod storage;
mod storm;
mod stream;
mod world;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use life::{Verdict, live};
use plan::Broken;
use world::{Fault, lock};

/// Seeds of a usual run.
const NUM_SEEDS: u64 = 10_000;
/// Threads that live them.
const NUM_THREADS: usize = 2;
/// Seeds within which something broken has to be noticed.
const NUM_SEEDS_BROKEN: u64 = 300;
/// Lines of a failing seed's trace that are shown.
const MAX_TRACE: usize = 4_000;

/// A number given by the one who runs the tests.
fn given(name: &str) -> Option<u64> {
    let text = std::env::var_os(name)?;
    let number = text.to_str().and_then(|text| text.parse().ok());
    Some(number.unwrap_or_else(|| panic!("{name}: expected a number, given {text:?}")))
}

/// Lives the seeds below `num_seeds` until one fails; that one, and the faults of all.
fn first_failure(num_seeds: u64, broken: Broken) -> (Option<u64>, BTreeMap<Fault, u64>) {
    let (next, failed) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    let faults = Mutex::new(BTreeMap::<Fault, u64>::new());
    std::thread::scope(|scope| {
        for _ in 0..NUM_THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= num_seeds.min(failed.load(Ordering::Relaxed)) {
                        return;
                    }
                    let verdict = live(seed, broken, false);
                    if !verdict.violations.is_empty() {
                        failed.fetch_min(seed, Ordering::Relaxed);
                    }
                    let mut faults = lock(&faults);
                    for (fault, count) in verdict.faults {
                        *faults.entry(fault).or_default() += count;
                    }
                }
            });
        }
    });
    let failed = Some(failed.into_inner()).filter(|&seed| seed < u64::MAX);
    (failed, faults.into_inner().expect("no thread panicked"))
}

/// Lives a seed once more and tells everything.
fn tell(seed: u64) -> Verdict {
    let verdict = live(seed, Broken::Nothing, true);
    let omitted = verdict.trace.len().saturating_sub(MAX_TRACE);
    if omitted > 0 {
        println!("… {omitted} lines before");
    }
    verdict.trace.iter().skip(omitted).for_each(|line| println!("{line}"));
    verdict
}

#[test]
fn each_id_has_exactly_one_line_whatever_happens() {
    if let Some(seed) = given("SIMULATION_SEED") {
        let verdict = tell(seed);
        assert!(verdict.violations.is_empty(), "seed {seed}: {:#?}", verdict.violations);
        return;
    }
    let num_seeds = given("SIMULATION_SEEDS").unwrap_or(NUM_SEEDS);
    let started = std::time::Instant::now();
    let (failed, faults) = first_failure(num_seeds, Broken::Nothing);
    if let Some(seed) = failed {
        let verdict = tell(seed);
        panic!(
            "seed {seed}: {:#?}\nSIMULATION_SEED={seed} cargo test --workspace --test simulation",
            verdict.violations
        );
    }
    println!("{num_seeds} seeds in {:.1?}: {faults:#?}", started.elapsed());
    if num_seeds >= NUM_SEEDS {
        let missing: Vec<Fault> =
            Fault::ALL.into_iter().filter(|fault| !faults.contains_key(fault)).collect();
        assert!(missing.is_empty(), "these faults never struck: {missing:?}");
    }
}

#[test]
fn a_seed_is_the_same_world_each_time() {
    for seed in 0..40 {
        let first = live(seed, Broken::Nothing, true).trace;
        let second = live(seed, Broken::Nothing, true).trace;
        let differing = first.iter().zip(&second).position(|(first, second)| first != second);
        if let Some(line) = differing {
            panic!("seed {seed}: first {:?}, then {:?}", first[line], second[line]);
        }
        assert_eq!(first.len(), second.len(), "seed {seed}");
    }
}

fn is_noticed(broken: Broken, words: &str) {
    let (failed, _) = first_failure(NUM_SEEDS_BROKEN, broken);
    let seed = failed.unwrap_or_else(|| panic!("{broken:?} was not noticed"));
    let violations = live(seed, broken, false).violations;
    let is_named = violations.iter().any(|violation| violation.contains(words));
    assert!(is_named, "expected '{words}' of {broken:?} in seed {seed}: {violations:#?}");
    println!("{broken:?} is noticed at seed {seed}");
}

#[test]
fn a_disk_that_lies_about_syncs_is_noticed() {
    is_noticed(Broken::DiskLies, "has no line");
}

#[test]
fn an_index_that_marks_before_the_file_is_written_is_noticed() {
    is_noticed(Broken::IndexMarksEarly, "has no line");
}

#[test]
fn an_index_that_forgets_is_noticed() {
    is_noticed(Broken::IndexForgets, "has 2 lines");
}

#[test]
fn a_queue_that_confirms_before_it_stores_is_noticed() {
    is_noticed(Broken::OutcomesConfirmEarly, "has no line");
}
