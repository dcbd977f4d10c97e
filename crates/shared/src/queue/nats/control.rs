//! Asking a run's collector for something while it runs. Plain requests: nothing of it is kept.

use std::time::Duration;

use async_nats::client::{Request as NatsRequest, RequestErrorKind};
use async_nats::{Message as NatsMessage, Subscriber};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};

use super::error::Source;
use super::{Fleet, FleetError};
use crate::message::RunId;
use crate::status::{Reply, Request};
use crate::token;

/// Something that a collector is asked for. Whoever asked waits for the answer.
pub struct ControlRequest {
    /// What is asked.
    pub request: Request,
    fleet: Fleet,
    message: NatsMessage,
}

impl ControlRequest {
    /// Answers.
    pub async fn answer(self, reply: &Reply) -> Result<(), FleetError> {
        answer(&self.fleet, &self.message, reply).await
    }
}

async fn answer(fleet: &Fleet, message: &NatsMessage, reply: &Reply) -> Result<(), FleetError> {
    // Whoever wants no answer gets none.
    let Some(to) = message.reply.clone() else { return Ok(()) };
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        FleetError::server("take an answer", error)
    };
    let text = serde_json::to_vec(reply).map_err(|error| failed(error.into()))?;
    let client = &fleet.shared.client;
    client.publish(to, text.into()).await.map_err(|error| failed(error.into()))?;
    client.flush().await.map_err(|error| failed(error.into()))
}

fn subject(run: &RunId) -> String {
    format!("flotilla.control.{}", token::encode(&run.0))
}

impl Fleet {
    /// What this run's collector is asked for, for as long as the stream is kept.
    pub async fn serve_control(
        &self,
        run: &RunId,
    ) -> Result<impl Stream<Item = ControlRequest> + Send + use<>, FleetError> {
        let requests = self.requests(subject(run)).await?;
        let fleet = self.clone();
        Ok(requests.filter_map(move |message| {
            let fleet = fleet.clone();
            async move {
                match serde_json::from_slice(&message.payload) {
                    Ok(request) => Some(ControlRequest { request, fleet, message }),
                    Err(error) => {
                        let reply = Reply::Refused(format!("cannot read the request: {error}"));
                        drop(answer(&fleet, &message, &reply).await);
                        None
                    }
                }
            }
        }))
    }

    /// Asks this run's collector, which must run.
    pub async fn request_control(
        &self,
        run: &RunId,
        request: &Request,
        timeout: Duration,
    ) -> Result<Reply, FleetError> {
        let unread = |error| FleetError::server("pass a request on", error);
        let text = serde_json::to_vec(request).map_err(unread)?;
        let answer = self.ask_collector(run, subject(run), text.into(), timeout).await?;
        serde_json::from_slice(&answer).map_err(|error| untold(run, error))
    }

    /// What comes to a subject.
    pub(super) async fn requests(&self, subject: String) -> Result<Subscriber, FleetError> {
        let failed = |error: Source| FleetError::server("take requests", error);
        let subscriber = self.shared.client.subscribe(subject).await;
        let subscriber = subscriber.map_err(|error| failed(error.into()))?;
        // Known to the server before anybody is told that the collector runs.
        let flushed = self.shared.client.flush().await;
        flushed.map_err(|error| failed(error.into()))?;
        Ok(subscriber)
    }

    /// What this run's collector answers to a request.
    pub(super) async fn ask_collector(
        &self,
        run: &RunId,
        subject: String,
        request: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, FleetError> {
        let request = NatsRequest::new().payload(request).timeout(Some(timeout));
        match self.shared.client.send_request(subject, request).await {
            Ok(answer) => Ok(answer.payload),
            Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                Err(FleetError::NoCollector { run: run.0.clone() })
            }
            Err(error) => Err(untold(run, error)),
        }
    }
}

/// No answer of this run's collector, or none that can be understood.
pub(super) fn untold(run: &RunId, error: impl Into<Source>) -> FleetError {
    FleetError::server(format!("bring the answer of the collector of run '{}'", run.0), error)
}
