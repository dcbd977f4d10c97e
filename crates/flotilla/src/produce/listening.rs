//! Queries over HTTP, until a signal.

use std::process::ExitCode;
use std::sync::Arc;

use producer::{JobTemplate, ListenConfig, ListenError, Retriever, Server};

use super::asking::{Asking, Manner};
use super::said::{Said, about};
use super::{publisher, start, tell};
use crate::cli::fleet::ProduceOptions;
use crate::signals;

/// Listens, publishes what comes, and ends well at a signal: that is its only end.
pub(super) async fn listen(
    options: &ProduceOptions,
    config: ListenConfig,
    template: JobTemplate,
    retriever: Option<Arc<Retriever>>,
) -> anyhow::Result<ExitCode> {
    let interruption = signals::interruption()?;
    let server = Server::bind(config).await.map_err(usage)?;
    let Some((fleet, stats)) = start(options, &interruption).await? else {
        return Ok(ExitCode::SUCCESS);
    };
    tracing::info!("listening at http://{}/v1/queries", server.local_addr());
    let input = format!("http://{}", server.local_addr());
    let said = Said::start(&fleet, about(&template.run, &options.jobs.model.model, input), &stats);
    let asking = Asking::new(&fleet, &template.run, Manner::REQUESTS, &stats);
    let publisher = publisher(options, &fleet, template, &stats);
    let published = server.leaving_out(asking).run(publisher, retriever, &interruption).await;
    // Nobody knows whether more would have come, but from here nothing more does.
    said.end(published.is_ok()).await;
    tell(&published?, &stats, None);
    Ok(ExitCode::SUCCESS)
}

/// Settings that can't be meant stay recognisable as such.
fn usage(error: ListenError) -> anyhow::Error {
    match error {
        ListenError::Config(error) => error.into(),
        other => other.into(),
    }
}
