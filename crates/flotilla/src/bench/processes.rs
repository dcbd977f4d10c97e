//! The processes of a benchmark: what each role's used, as the kernel counts. All are killed when
//! dropped.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::process::{Child, Command};

/// The unit of the kernel's times, the same on all of Linux' common architectures.
const TICKS_PER_SECOND: u64 = 100;

/// What a process is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The queue's server.
    Nats,
    /// The index' server.
    Redis,
    /// Queries in.
    Producer,
    /// Jobs in, outcomes out.
    Worker,
    /// Outcomes in, lines out.
    Collector,
}

impl Role {
    /// Its name in reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nats => "nats-server",
            Self::Redis => "redis-server",
            Self::Producer => "producer",
            Self::Worker => "worker",
            Self::Collector => "collector",
        }
    }
}

/// What a process used so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    pub(super) role: Role,
    pub(super) cpu: Duration,
    pub(super) peak_memory_bytes: u64,
}

/// The processes.
#[derive(Debug, Default)]
pub(super) struct Processes(Vec<(Child, Usage)>);

impl Processes {
    /// Starts one.
    pub(super) fn start(
        &mut self,
        role: Role,
        command: &mut Command,
    ) -> anyhow::Result<&mut Child> {
        command.stdout(Stdio::null()).kill_on_drop(true);
        if matches!(role, Role::Nats) {
            // It tells everything there, the roles only what matters.
            command.stderr(Stdio::null());
        }
        let child = command.spawn().with_context(|| format!("cannot start the {}", role.name()))?;
        let usage = Usage { role, cpu: Duration::ZERO, peak_memory_bytes: 0 };
        self.0.push((child, usage));
        let last = self.0.last_mut().context("it was just put there")?;
        Ok(&mut last.0)
    }

    /// Notes what each uses by now. The last look before a process ends is what is known of it.
    pub(super) fn look(&mut self) {
        for (child, usage) in &mut self.0 {
            let Some(pid) = child.id() else { continue };
            usage.cpu = cpu_time(pid).unwrap_or(usage.cpu).max(usage.cpu);
            usage.peak_memory_bytes =
                usage.peak_memory_bytes.max(crate::statistics::peak_memory_bytes_of(pid));
        }
    }

    /// Whether the process of this role has ended, as it should; any that failed is an error.
    pub(super) fn has_ended(&mut self, role: Role) -> anyhow::Result<bool> {
        let mut has_ended = false;
        for (child, usage) in &mut self.0 {
            if let Some(status) = child.try_wait()? {
                if !status.success() {
                    bail!("the {} ended with {status}", usage.role.name());
                }
                has_ended |= usage.role == role;
            }
        }
        Ok(has_ended)
    }

    /// What each used.
    pub(super) fn usage(&self) -> Vec<Usage> {
        self.0.iter().map(|(_, usage)| *usage).collect()
    }
}

/// User and system time of a process, from `/proc/<pid>/stat`.
fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 1_000 / TICKS_PER_SECOND))
}
