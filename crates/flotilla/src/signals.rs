//! SIGINT and SIGTERM: the first asks for an orderly end, the second ends the process at once.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::INTERRUPTED;

/// Cancelled by the first SIGINT or SIGTERM; the second ends the process at once. Nothing is lost by
/// that: what is written is synced, a torn last line is repaired by the next start, and deliveries
/// that nobody settles come again.
pub(crate) fn interruption() -> anyhow::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let token = CancellationToken::new();
    let first = token.clone();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        };
        next().await;
        first.cancel();
        next().await;
        std::process::exit(i32::from(INTERRUPTED));
    });
    Ok(token)
}
