//! Asking a run's collector which jobs have their line. Plain requests: nothing of it is kept.
//!
//! A subject of its own and not that of the other requests, so that who may ask need not be allowed to take lines out. A
//! request is digests one after another, 16 bytes each, from 1 to [`MAX_ASKED`] of them. The reply is the number of
//! the output's lines, 8 bytes, big endian, and then a bit for each digest, the first the highest of its byte, 1
//! where it has its line. A reply without a byte is a refusal.

use std::time::Duration;

use async_nats::Message as NatsMessage;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};

use super::control::untold;
use super::{Fleet, FleetError};
use crate::message::{IdDigest, RunId};
use crate::status::Known;
use crate::token;

/// Most ids that may be asked about at once.
pub const MAX_ASKED: usize = 1024;

const DIGEST_BYTES: usize = size_of::<IdDigest>();
const COUNT_BYTES: usize = size_of::<u64>();

/// A question to a collector. Whoever asked waits for the reply.
pub struct KnownRequest {
    /// The jobs that are asked about.
    pub ids: Vec<IdDigest>,
    fleet: Fleet,
    message: NatsMessage,
}

impl KnownRequest {
    /// Replies; a refusal without what is known.
    pub async fn reply(self, known: Option<&Known>) -> Result<(), FleetError> {
        reply(&self.fleet, self.message, known.map(encode).unwrap_or_default()).await
    }
}

async fn reply(fleet: &Fleet, message: NatsMessage, bytes: Bytes) -> Result<(), FleetError> {
    // Whoever wants no reply gets none.
    let Some(to) = message.reply else { return Ok(()) };
    let published = fleet.shared.client.publish(to, bytes).await;
    published.map_err(|error| FleetError::server("take a reply", error))
}

fn subject(run: &RunId) -> String {
    format!("flotilla.known.{}", token::encode(&run.0))
}

impl Fleet {
    /// The questions to this run's collector, for as long as the stream is kept. What is none is
    /// refused here.
    pub async fn serve_known(
        &self,
        run: &RunId,
    ) -> Result<impl Stream<Item = KnownRequest> + Send + use<>, FleetError> {
        let questions = self.requests(subject(run)).await?;
        let fleet = self.clone();
        Ok(questions.filter_map(move |message| {
            let fleet = fleet.clone();
            async move {
                match decode_request(&message.payload) {
                    Some(ids) => Some(KnownRequest { ids, fleet, message }),
                    None => {
                        tracing::debug!(bytes = message.payload.len(), "refused a question");
                        drop(reply(&fleet, message, Bytes::new()).await);
                        None
                    }
                }
            }
        }))
    }

    /// Asks this run's collector which of `ids`, at most [`MAX_ASKED`], have their line.
    pub async fn request_known(
        &self,
        run: &RunId,
        ids: &[IdDigest],
        timeout: Duration,
    ) -> Result<Known, FleetError> {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.0).collect();
        let reply = self.ask_collector(run, subject(run), bytes.into(), timeout).await?;
        decode_reply(&reply, ids.len())
            .ok_or_else(|| untold(run, "it refused, or cannot be understood"))
    }
}

fn decode_request(bytes: &[u8]) -> Option<Vec<IdDigest>> {
    let (digests, rest) = bytes.as_chunks::<DIGEST_BYTES>();
    let is_one = rest.is_empty() && (1..=MAX_ASKED).contains(&digests.len());
    is_one.then(|| digests.iter().copied().map(IdDigest).collect())
}

fn encode(known: &Known) -> Bytes {
    let bits = known.written.chunks(8).map(|eight| {
        let bit = |(at, is_written): (usize, &bool)| u8::from(*is_written) << (7 - at);
        eight.iter().enumerate().map(bit).sum::<u8>()
    });
    known.num_lines.to_be_bytes().into_iter().chain(bits).collect()
}

/// The reply to a question about `num_ids`; `None` unless it is exactly as long as that.
fn decode_reply(bytes: &[u8], num_ids: usize) -> Option<Known> {
    let (count, bits) = bytes.split_first_chunk::<COUNT_BYTES>()?;
    let written = (0..num_ids).map(|at| bits.get(at / 8).map(|byte| byte >> (7 - at % 8) & 1 == 1));
    let written = written.collect::<Option<Vec<bool>>>()?;
    let is_whole = bits.len() == num_ids.div_ceil(8);
    is_whole.then(|| Known { num_lines: u64::from_be_bytes(*count), written })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::JobId;

    #[test]
    fn what_is_encoded_is_decoded() {
        for num_ids in [1, 7, 8, 9, 64, MAX_ASKED] {
            let written: Vec<bool> = (0..num_ids).map(|at| at % 3 == 0 || at % 5 == 1).collect();
            let known = Known { num_lines: 1 << 40 | 7, written };
            let bytes = encode(&known);
            assert_eq!(decode_reply(&bytes, num_ids), Some(known));
            assert_eq!(decode_reply(&bytes[..bytes.len() - 1], num_ids), None);
            assert_eq!(decode_reply(&[&bytes[..], b"x"].concat(), num_ids), None);
            let ids: Vec<IdDigest> =
                (0..num_ids).map(|at| JobId(at.to_string()).digest()).collect();
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.0).collect();
            assert_eq!(decode_request(&bytes), Some(ids));
        }
    }

    #[test]
    fn garbage_is_neither_question_nor_reply() {
        for bytes in [&b""[..], b"garbage", &[0; 17], &[0; DIGEST_BYTES * (MAX_ASKED + 1)]] {
            assert_eq!(decode_request(bytes), None);
            assert_eq!(decode_reply(bytes, 8), None);
        }
    }
}
