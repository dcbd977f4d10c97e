//! A short round of what `make chaos` does for minutes.

use std::time::Duration;

use flotilla_tests::chaos::{Settings, run};

#[test]
fn chaos_loses_nothing_and_doubles_nothing() {
    // A new one each time; a failure tells it, and `make chaos SEED=…` has the same faults.
    let seed = rand::random_range(0..1_000_000);
    let settings = Settings {
        program: flotilla_tests::program().to_owned(),
        seed,
        time: Duration::from_secs(25),
        fault_interval: Duration::from_millis(600),
        workers: 5,
        wipe: false,
    };
    match run(&settings) {
        Ok(report) => println!("{report}"),
        Err(failure) => panic!("seed {seed}: {failure}"),
    }
}
