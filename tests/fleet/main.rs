//! The fleet end to end: the real program in all its roles, with real servers, killed and cut off.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod again;
mod chaos;
mod cluster;
mod deaths;
mod docs;
mod faults;
mod happy_path;
mod harness;
mod limits;
mod listening;
mod observing;
mod outputs;
mod producers;
mod retrying;
mod telling;
mod usage;
