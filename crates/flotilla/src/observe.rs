//! GET /metrics and /healthz of a role: a small HTTP server beside it, never in its way.
//!
//! The roles count for themselves; a page is made from their counts when it is asked for. [`text`]
//! writes the format.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
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

/// Whether the role does all of its work: written by the role, read by /healthz.
#[derive(Clone, Debug)]
pub(crate) struct Health(Arc<Mutex<Result<(), String>>>);

impl Default for Health {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Err("starting".to_owned()))))
    }
}

impl Health {
    /// From now on, the role does its work, or for this reason doesn't.
    pub(crate) fn set(&self, health: Result<(), String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = health;
    }

    fn get(&self) -> Result<(), String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

async fn is_up(State(health): State<Health>) -> (StatusCode, String) {
    match health.get() {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason + "\n"),
    }
}
