//! GET /metrics and /healthz of a role: a small HTTP server beside it, never in its way.
//!
//! The roles count for themselves; a page is made from their counts when it is asked for. [`text`]
//! writes the format.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

pub(crate) mod queues;
pub(crate) mod text;

pub(crate) use text::Page;

/// Longest time that a page may take.
const PAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// What Prometheus calls its text format.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whether the role is up: written by the role, read by /healthz.
#[derive(Clone, Debug, Default)]
pub(crate) struct Health(Arc<AtomicBool>);

impl Health {
    /// From now on, the role is up or isn't.
    pub(crate) fn set(&self, up: bool) {
        self.0.store(up, Ordering::Relaxed);
    }
}

/// Serves `make_page` and `health` at `addr` until the runtime ends; nothing without an address.
pub(crate) async fn serve<M, F>(
    addr: Option<SocketAddr>,
    health: Health,
    make_page: M,
) -> anyhow::Result<()>
where
    M: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = Page> + Send + 'static,
{
    let Some(addr) = addr else { return Ok(()) };
    let listener =
        TcpListener::bind(addr).await.with_context(|| format!("cannot serve metrics at {addr}"))?;
    let addr = listener.local_addr().context("cannot serve metrics")?;
    tracing::info!("metrics at http://{addr}/metrics");
    let make_page = Arc::new(make_page);
    let metrics = get(move || {
        let make_page = Arc::clone(&make_page);
        async move { page(tokio::time::timeout(PAGE_TIMEOUT, make_page()).await.ok()) }
    });
    let router =
        Router::new().route("/metrics", metrics).route("/healthz", get(is_up)).with_state(health);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::warn!(%error, "metrics are no longer served");
        }
    });
    Ok(())
}

fn page(page: Option<Page>) -> Response {
    match page {
        Some(page) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], page.into_text()).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "timed out\n").into_response(),
    }
}

async fn is_up(State(health): State<Health>) -> (StatusCode, &'static str) {
    if health.0.load(Ordering::Relaxed) {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting\n")
    }
}
