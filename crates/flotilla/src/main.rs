//! flotilla: answers files of queries with local models, each exactly once.

mod bench;
mod cli;
mod collect;
mod contexts;
mod files;
mod fleet;
mod heartbeat;
mod observe;
mod produce;
mod progress;
mod reconcile;
mod rejects;
mod retry;
mod run;
mod signals;
mod statistics;
mod status;
mod telemetry;
mod work;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

/// The command failed; what it had done is kept.
const FAILED: u8 = 1;
/// The options can't be meant; what clap says too.
const WRONG_USAGE: u8 = 2;
/// Everything has its line, but some jobs failed or some input could not be read.
const FINISHED_WITH_FAILURES: u8 = 3;
/// Interrupted by a signal: what a shell reports for SIGINT.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let cli = Cli::parse_from(cli::hyphenated(std::env::args_os()));
    telemetry::init(cli.verbose);
    let done = match cli.command {
        Command::Run(options) => run::main(&options),
        Command::Contexts(options) => contexts::main(&options),
        Command::Produce(options) => produce::main(&options),
        Command::Work(options) => work::main(&options),
        Command::Collect(options) => collect::main(&options),
        Command::Status(options) => status::main(&options),
        Command::Retry(options) => retry::main(&options),
        Command::Reconcile(options) => reconcile::main(&options),
        Command::Bench(options) => bench::main(&options),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            telemetry::complain(&format!("{error:#}"));
            ExitCode::from(if is_usage(&error) { WRONG_USAGE } else { FAILED })
        }
    }
}

fn is_usage(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(producer::Error::Config(_))) || error.is::<cli::Usage>()
}
