//! flotilla: answers files of queries with local models, each exactly once.

mod bench;
mod cancel;
mod cli;
mod collect;
mod columns;
mod contexts;
mod files;
mod fleet;
mod heartbeat;
mod hub;
mod models;
mod observe;
mod produce;
mod producers;
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
use clap::error::{ContextKind, ContextValue, ErrorKind};

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
    let cli = match Cli::try_parse_from(cli::hyphenated(std::env::args_os())) {
        Ok(cli) => cli,
        Err(error) => return tell_usage(&error),
    };
    telemetry::init(cli.verbose);
    let done = match cli.command {
        Command::Run(options) => run::main(&options),
        Command::Contexts(options) => contexts::main(&options),
        Command::Produce(options) => produce::main(&options),
        Command::Work(options) => work::main(&options),
        Command::Collect(options) => collect::main(&options),
        Command::Models(options) => models::main(&options),
        Command::Status(options) => status::main(&options),
        Command::Retry(options) => retry::main(&options),
        Command::Reconcile(options) => reconcile::main(&options),
        Command::Cancel(options) => cancel::main(&options),
        Command::Bench(options) => bench::main(&options),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            telemetry::complain(&format!("{error:#}"));
            if is_disk_full(&error) {
                telemetry::hint("the same command goes on where it stopped once there is room");
            }
            ExitCode::from(if is_usage(&error) { WRONG_USAGE } else { FAILED })
        }
    }
}

/// What clap says, and where the server comes from if that is what is missing.
fn tell_usage(error: &clap::Error) -> ExitCode {
    // Nobody is left to tell if stderr is closed.
    drop(error.print());
    let missing = match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::MissingRequiredArgument, Some(ContextValue::Strings(missing))) => &missing[..],
        _ => &[],
    };
    if missing.iter().any(|argument| argument.starts_with("--nats-url")) {
        telemetry::hint(
            "the NATS server can also be given as FLOTILLA_NATS_URL; `make up` starts one at \
             nats://127.0.0.1:4222",
        );
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(WRONG_USAGE))
}

fn is_disk_full(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    kinds.map(std::io::Error::kind).any(|kind| {
        matches!(kind, std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
    })
}

fn is_usage(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(producer::Error::Config(_))) || error.is::<cli::Usage>()
}
