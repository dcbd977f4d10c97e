//! Messages that a consumer believes it is done with and that are still in their stream.
//!
//! A server that was killed, or whose disk was full, can come back with a consumer's state newer than
//! its stream's: an ack is known, the removal that follows it is lost, or a stream has lost its end
//! and numbers new messages as old ones. Nobody is given such a message ever again, and whoever waits
//! for the stream to be empty waits for ever. Whether it was acked can't be told any more, so it is
//! delivered once more: the collector knows what it has.

use std::collections::HashMap;

use async_nats::jetstream::consumer::Info;
use serde::Deserialize;

use super::error::ApiError;
use super::streams::{Nothing, code};
use super::{Fleet, FleetError, JOBS, RESULTS};

/// The server's answer to a removal.
#[derive(Deserialize)]
struct Removed {}

impl Fleet {
    /// Has messages delivered again that their consumer has forgotten; how many there were.
    pub async fn redeliver_forgotten(&self) -> Result<u64, FleetError> {
        let jobs = self.redeliver_from(JOBS, "flotilla.jobs.*.*").await?;
        Ok(jobs + self.redeliver_from(RESULTS, "flotilla.results.*").await?)
    }

    async fn redeliver_from(&self, stream: &str, subjects: &str) -> Result<u64, FleetError> {
        let before = self.consumer_infos(stream).await?;
        let counts = self.count(stream, subjects).await?;
        if counts.is_empty() {
            return Ok(0);
        }
        let mut num_forgotten = 0;
        for now in self.consumer_infos(stream).await? {
            let count = count_of(&now.config.filter_subject, &counts);
            let was_idle = before.iter().any(|then| is_idle_since(then, &now));
            if count > 0 && was_idle {
                self.remove_consumer(stream, &now.name).await?;
                num_forgotten += count;
            }
        }
        Ok(num_forgotten)
    }

    /// The next pull makes it anew, and a new one begins with the first message.
    async fn remove_consumer(&self, stream: &str, name: &str) -> Result<(), FleetError> {
        let path = format!("CONSUMER.DELETE.{stream}.{name}");
        match self.shared.api::<Removed>(path, &Nothing {}).await {
            Ok(Removed {}) => Ok(()),
            Err(error @ ApiError::Answered(_))
                if error.code() == Some(code::CONSUMER_NOT_FOUND) =>
            {
                Ok(())
            }
            Err(error) => Err(FleetError::server(format!("remove consumer {name}"), error)),
        }
    }
}

/// Whether the consumer had nothing to deliver and nothing out at `then` and at `now`, and delivered
/// nothing between. What was in the stream between the two looks is then none of its business.
fn is_idle_since(then: &Info, now: &Info) -> bool {
    let is_idle = |info: &Info| info.num_pending == 0 && info.num_ack_pending == 0;
    then.name == now.name
        && then.created == now.created
        && is_idle(then)
        && is_idle(now)
        && then.delivered.consumer_sequence == now.delivered.consumer_sequence
}

/// Messages of the subjects that a consumer takes.
fn count_of(filter: &str, counts: &HashMap<String, u64>) -> u64 {
    let is_taken = |subject: &str| match filter.strip_suffix('*') {
        Some(prefix) => subject.starts_with(prefix),
        None => subject == filter,
    };
    counts.iter().filter(|(subject, _)| is_taken(subject)).map(|(_, count)| count).sum()
}
