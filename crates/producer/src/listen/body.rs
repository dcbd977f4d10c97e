//! The body of a request: from the network, in pieces, to the thread that reads its records.
//!
//! What is limited is limited here: its length, and how long the client may keep the server
//! waiting. Time that the client waits for the server isn't the client's.

use std::io::{self, Read};
use std::time::Duration;

use axum::body::{BodyDataStream, Bytes};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

/// Pieces between the network and the reading thread.
const MAX_PIECES: usize = 4;
/// Slower than this, over all of its body, no client is waited for.
const MIN_BYTES_PER_SECOND: f64 = 4096.0;
/// How long what nobody wants is read, so that the client reads the answer.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);

/// What a body may be.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_bytes: u64,
    pub(super) read_timeout: Duration,
}

/// Why the rest of a body isn't taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    TooLarge,
    TooSlow,
    /// The client or the network broke it off, or its encoding is wrong.
    Broken,
}

pub(super) enum Piece {
    Bytes(Bytes),
    /// The body is whole.
    End,
}

/// Both ends of a body.
pub(super) fn channel() -> (mpsc::Sender<Piece>, BodyReader) {
    let (feed, pieces) = mpsc::channel(MAX_PIECES);
    (feed, BodyReader { pieces, rest: Bytes::new(), whole: false })
}

/// Passes a body on until its end. Without it, the reader knows that the body broke off.
pub(super) async fn pump(
    body: &mut BodyDataStream,
    feed: mpsc::Sender<Piece>,
    limits: Limits,
) -> Result<(), Refusal> {
    let (mut received, mut waited) = (0_u64, Duration::ZERO);
    loop {
        let earned = Duration::from_secs_f64(received as f64 / MIN_BYTES_PER_SECOND);
        let left = (limits.read_timeout + earned).saturating_sub(waited);
        let asked = Instant::now();
        let next = timeout(left.min(limits.read_timeout), body.next()).await;
        waited += asked.elapsed();
        let piece = match next {
            Err(_late) => return Err(Refusal::TooSlow),
            Ok(Some(Err(_))) => return Err(Refusal::Broken),
            Ok(Some(Ok(bytes))) => {
                received += bytes.len() as u64;
                if received > limits.max_bytes {
                    return Err(Refusal::TooLarge);
                }
                Piece::Bytes(bytes)
            }
            Ok(None) => Piece::End,
        };
        let is_end = matches!(piece, Piece::End);
        // A reader that is gone has found that there is nothing more to read.
        if feed.send(piece).await.is_err() || is_end {
            return Ok(());
        }
    }
}

/// Reads a body that is refused to its end, if that comes soon: closing the connection on a
/// client that still sends would take its answer away.
pub(super) async fn discard(body: &mut BodyDataStream, max_bytes: u64) {
    let discarding = async {
        let mut left = max_bytes;
        while let Some(Ok(bytes)) = body.next().await {
            left = left.saturating_sub(bytes.len() as u64);
            if left == 0 {
                break;
            }
        }
    };
    // Late or not, the answer is sent.
    let _late = timeout(DISCARD_TIMEOUT, discarding).await;
}

/// The body as the thread reads it, which waits for it.
pub(super) struct BodyReader {
    pieces: mpsc::Receiver<Piece>,
    rest: Bytes,
    whole: bool,
}

impl Read for BodyReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() && !self.whole {
            match self.pieces.blocking_recv() {
                Some(Piece::Bytes(bytes)) => self.rest = bytes,
                Some(Piece::End) => self.whole = true,
                None => return Err(io::Error::other("the body broke off")),
            }
        }
        let num_bytes = self.rest.len().min(buffer.len());
        buffer[..num_bytes].copy_from_slice(&self.rest.split_to(num_bytes));
        Ok(num_bytes)
    }
}
