//! Questions of producers to a running collector: which jobs have their line.

use collector::Control;
use futures_util::StreamExt;
use shared::RunId;
use shared::queue::nats::{Fleet, KnownRequest};
use tokio::sync::{mpsc, oneshot};

/// Questions that wait for the collector at a time; the others wait for these.
const MAX_WAITING: usize = 4;

/// Passes questions on to the collector, for ever. Only a collector that holds the output is asked
/// here, and it answers for itself: see [`collector::Collector::known`]. What goes wrong costs work, so it
/// is a warning.
pub(super) async fn serve(fleet: &Fleet, run: &RunId, collector: mpsc::Sender<Control>) {
    match fleet.serve_known(run).await {
        Ok(requests) => {
            let answer = |mut request: KnownRequest| {
                let collector = collector.clone();
                async move {
                    let (reply, answer) = oneshot::channel();
                    let ids = std::mem::take(&mut request.ids);
                    // One that is ending answers nothing: that is a refusal.
                    let _ending = collector.send(Control::Known { ids, reply }).await;
                    if let Err(error) = request.reply(answer.await.ok().as_ref()).await {
                        tracing::debug!(%error, "whoever asked is gone");
                    }
                }
            };
            requests.for_each_concurrent(MAX_WAITING, answer).await;
        }
        Err(error) => tracing::warn!(
            run = run.0,
            %error,
            "producers cannot ask this collector: they publish what has its line already"
        ),
    }
    // The stream ends with the connection.
    std::future::pending::<()>().await;
}
