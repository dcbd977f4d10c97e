//! `make chaos`: kills, stops and cuts off everything of a fleet for minutes, from a seed, and checks
//! that every id has one line at the end. Exit code 1, and everything kept, if anything is wrong.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what it says is its product")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use flotilla_tests::chaos::{self, Settings};

const USAGE: &str = "usage: chaos [--minutes N] [--seed N] [--program FILE] [--workers N] [--fault-interval SECONDS]
  --minutes N               how long faults happen [default: 5]
  --seed N                  what the faults are made from [default: a new one, which is told]
  --program FILE            flotilla [default: the one that was built with this program]
  --workers N               workers at first [default: 8]
  --fault-interval SECONDS  between two faults, on the average [default: 0.7]";

fn main() -> ExitCode {
    let settings = match settings(std::env::args().skip(1)) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("{error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let Settings { seed, time, workers, .. } = &settings;
    println!("seed {seed}: faults for {time:?}, {workers} workers");
    match chaos::run(&settings) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("seed {seed} failed: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn settings(mut args: impl Iterator<Item = String>) -> Result<Settings, String> {
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    // This one lies in <profile>/examples.
    let built = this.ancestors().nth(2).unwrap_or(&this);
    let mut settings = Settings {
        program: built.join("flotilla"),
        seed: rand::random_range(0..1_000_000),
        time: Duration::from_secs(300),
        fault_interval: Duration::from_millis(700),
        workers: 8,
        wipe: true,
    };
    while let Some(option) = args.next() {
        let value = args.next().ok_or_else(|| format!("{option}: expected a value"))?;
        let wrong = |what: &str| format!("{option}: expected {what}, given '{value}'");
        let seconds = |of: f64| {
            let seconds = value.parse::<f64>().ok().map(|number| number * of);
            let time = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
            time.filter(|time| !time.is_zero()).ok_or_else(|| wrong("a number above 0"))
        };
        match option.as_str() {
            "--minutes" => settings.time = seconds(60.0)?,
            "--fault-interval" => settings.fault_interval = seconds(1.0)?,
            "--seed" => settings.seed = value.parse().map_err(|_| wrong("a number"))?,
            "--workers" => settings.workers = value.parse().map_err(|_| wrong("a number"))?,
            "--program" => settings.program = PathBuf::from(&value),
            _ => return Err(format!("{option}: no such option")),
        }
    }
    if !settings.program.is_file() {
        return Err(format!("--program: expected a file, given {}", settings.program.display()));
    }
    Ok(settings)
}
