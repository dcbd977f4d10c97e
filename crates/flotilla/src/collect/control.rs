//! Requests of other commands to a running collector: taking failed lines out of the output.

use std::collections::HashSet;

use collector::Control;
use futures_util::StreamExt;
use shared::queue::nats::Fleet;
use shared::status::{Reply, Request};
use shared::{IdDigest, JobId, RunId};
use tokio::sync::{mpsc, oneshot};

use super::tally::Tally;

/// Passes requests on to the collector, for ever. Without them nothing else suffers, so what goes
/// wrong here is a warning.
pub(super) async fn serve(
    fleet: &Fleet,
    run: &RunId,
    (collector, tally): (mpsc::Sender<Control>, &Tally),
) {
    let requests = match fleet.serve_control(run).await {
        Ok(requests) => requests,
        Err(error) => {
            tracing::warn!(run = run.0, %error, "flotilla retry cannot reach this collector");
            return std::future::pending().await;
        }
    };
    let mut requests = std::pin::pin!(requests);
    while let Some(request) = requests.next().await {
        let (reply, answer) = oneshot::channel();
        let (control, removes) = control(&request.request, reply);
        let asked = collector.send(control).await;
        let reply = match (asked, answer.await) {
            (Ok(()), Ok(Ok(removed))) if removes => {
                tracing::info!(run = run.0, removed, "failed lines taken out for a retry");
                tally.removed(removed);
                Reply::Removed(removed)
            }
            (Ok(()), Ok(Ok(found))) => Reply::Found(found),
            (Ok(()), Ok(Err(error))) => Reply::Refused(error),
            _ => Reply::Refused("the collector is ending".to_owned()),
        };
        if let Err(error) = request.answer(&reply).await {
            tracing::debug!(%error, "whoever asked is gone");
        }
    }
    // The stream ends with the connection.
    std::future::pending::<()>().await;
}

/// What the collector is asked, and whether lines leave the output.
fn control(request: &Request, reply: oneshot::Sender<Result<u64, String>>) -> (Control, bool) {
    let digests = |ids: &[JobId]| ids.iter().map(JobId::digest).collect::<HashSet<IdDigest>>();
    match request {
        Request::RemoveFailed { ids } => (Control::RemoveFailed { ids: digests(ids), reply }, true),
        Request::BadInput { ids, remove } => {
            (Control::BadInput { ids: digests(ids), remove: *remove, reply }, *remove)
        }
    }
}
