//! The worker over queues in memory and an engine that does what each job says. Time is paused.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod faulty;
mod leases;
mod pulling;
mod quarantine;
mod script;
mod settling;
mod shutdown;
