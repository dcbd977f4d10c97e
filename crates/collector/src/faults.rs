//! Where a collector can be made to die, for tests: after each step that leaves a trace.
//!
//! A probe sees every step as it is done. In a process under test it aborts, which no destructor
//! survives; in a test's own process it makes the collector return, its state dropped unsaved.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// A step of the collector, done. A crash right after each of them must cost nothing but work
/// done twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// (a) A batch of outcomes is held.
    Pulled,
    /// (b) The index has told which ids it knows.
    Checked,
    /// (c) Known ids and repeats are left out.
    Picked,
    /// (d) The new lines are in the file.
    Written,
    /// (e) They are on disk.
    Synced,
    /// (f) The index knows them.
    Marked,
    /// (g) All are acked.
    Acked,
    /// Removing failed lines: they are safe in the file beside the output.
    Kept,
    /// Removing failed lines: the output without them is complete, under another name.
    Rewritten,
    /// Removing failed lines: it has taken the output's name.
    Replaced,
    /// Removing failed lines: the index has forgotten their ids.
    Forgotten,
}

impl Step {
    /// Every step, in order: first a batch's, then those of removing failed lines.
    pub const ALL: [Self; 11] = [
        Self::Pulled,
        Self::Checked,
        Self::Picked,
        Self::Written,
        Self::Synced,
        Self::Marked,
        Self::Acked,
        Self::Kept,
        Self::Rewritten,
        Self::Replaced,
        Self::Forgotten,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Pulled => "pulled",
            Self::Checked => "checked",
            Self::Picked => "picked",
            Self::Written => "written",
            Self::Synced => "synced",
            Self::Marked => "marked",
            Self::Acked => "acked",
            Self::Kept => "kept",
            Self::Rewritten => "rewritten",
            Self::Replaced => "replaced",
            Self::Forgotten => "forgotten",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|step| step.name() == text);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("expected one of {names}, found '{text}'")
        })
    }
}

/// Where a process under test dies.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Aborts the process when this step is done for the n-th time, counted from 1.
    pub abort_at: Option<(Step, u64)>,
}

/// Sees every step; what it answers decides whether the collector crashes there.
#[derive(Default)]
pub struct Probe(Option<Box<dyn FnMut(Step) -> bool + Send>>);

impl Probe {
    /// A probe that crashes the collector where `crash` says so: it returns [`Error::Stopped`],
    /// and whoever runs it must drop it.
    pub fn new(crash: impl FnMut(Step) -> bool + Send + 'static) -> Self {
        Self(Some(Box::new(crash)))
    }

    /// Tells that `step` is done.
    pub fn reached(&mut self, step: Step) -> Result<(), Error> {
        let crashes = self.0.as_mut().is_some_and(|crash| crash(step));
        if crashes { Err(Error::Stopped(step)) } else { Ok(()) }
    }
}

impl From<Faults> for Probe {
    fn from(faults: Faults) -> Self {
        let Some((at, nth)) = faults.abort_at else { return Self::default() };
        let mut times = 0;
        Self::new(move |step| {
            times += u64::from(step == at);
            if step == at && times == nth {
                std::process::abort();
            }
            false
        })
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Probe").field(&self.0.is_some()).finish()
    }
}
