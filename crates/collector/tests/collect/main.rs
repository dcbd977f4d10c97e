//! The collector against real files and disks that crash: every id once, whatever comes twice,
//! tears, is foreign, or goes down.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod crashes;
mod fixture;
mod locks;
mod output;
mod remove;
mod serve;
