//! What the roles need of real servers, without the program: the queue on NATS JetStream, the
//! collector's index in Redis, and the servers under test themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step is a failed test")]

mod dedup;
mod harness;
mod queue;
