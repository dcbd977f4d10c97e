//! Requests of other commands to a running collector: taking failed lines out of the output.

use collector::Control;
use futures_util::StreamExt;
use shared::queue::nats::Fleet;
use shared::status::{Reply, Request};
use shared::{JobId, RunId};
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
        let reply = match &request.request {
            Request::RemoveFailed { ids } => {
                let (reply, answer) = oneshot::channel();
                let ids = ids.iter().map(JobId::digest).collect();
                let asked = collector.send(Control::RemoveFailed { ids, reply }).await;
                match (asked, answer.await) {
                    (Ok(()), Ok(Ok(removed))) => {
                        tracing::info!(run = run.0, removed, "failed lines taken out for a retry");
                        tally.removed(removed);
                        Reply::Removed(removed)
                    }
                    (Ok(()), Ok(Err(error))) => Reply::Refused(error),
                    _ => Reply::Refused("the collector is ending".to_owned()),
                }
            }
        };
        if let Err(error) = request.answer(&reply).await {
            tracing::debug!(%error, "whoever asked is gone");
        }
    }
    // The stream ends with the connection.
    std::future::pending::<()>().await;
}
