//! Logs on stderr, kept apart from the progress bar that is drawn there too.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;

use indicatif::ProgressBar;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// The bar on the terminal, if there is one: written by `progress`, read by every log line.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Starts logging: warnings and what `FLOTILLA_LOG` asks for, every job with `verbose`.
pub(crate) fn init(verbose: bool) {
    let level = if verbose { "debug" } else { "info" };
    // Matches all of our crates by their common prefix.
    let default = format!("warn,tantivy=error,flotilla={level}");
    let filter = EnvFilter::builder()
        .with_env_var("FLOTILLA_LOG")
        .try_from_env()
        .unwrap_or_else(|_unset| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
}

/// Makes log lines go above `bar` while it is drawn, or nowhere special with `None`.
pub(crate) fn set_bar(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = bar;
}

/// Says on stderr why the program ends.
pub(crate) fn complain(text: &str) {
    // Nobody is left to tell if stderr is closed.
    drop(writeln!(Stderr, "error: {text}"));
}

/// Says on stderr what may help.
pub(crate) fn hint(text: &str) {
    drop(writeln!(Stderr, "\nhint: {text}"));
}

/// Writes result text to stdout, ignoring a reader that went away.
pub(crate) fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Writes result text to stdout at once; whether anybody still reads it.
pub(crate) fn print_live(text: &str) -> io::Result<bool> {
    let mut stdout = io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        other => other.map(|()| true),
    }
}

#[derive(Clone, Copy)]
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bar = BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        match bar {
            Some(bar) => bar.suspend(|| io::stderr().write(bytes)),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl MakeWriter<'_> for Stderr {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}
