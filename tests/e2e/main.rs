//! End-to-end tests: the real program over real files, as a user runs it.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod bad_input;
mod bench;
mod crash;
mod generation;
mod happy_path;
mod hub;
mod memory;
mod models;
mod shutdown;
