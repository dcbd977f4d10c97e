//! How much of the machine other processes use: a measurement beside a busy one is none.

/// CPU time in the system's ticks, at one moment.
pub(super) struct CpuTime {
    /// Of everything that ran.
    busy: u64,
    /// Of this process.
    own: u64,
    /// Idle time included: of all CPUs together.
    all: u64,
    num_cpus: u64,
}

impl CpuTime {
    /// Up to now; `None` where the system doesn't tell.
    pub(super) fn now() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/stat").ok()?;
        let own = std::fs::read_to_string("/proc/self/stat").ok()?;
        Self::read(&stat, &own)
    }

    /// Reads the system's two files.
    fn read(stat: &str, own: &str) -> Option<Self> {
        let total = stat.lines().next()?.strip_prefix("cpu ")?;
        // user, nice, system, idle, iowait, irq, softirq, steal; guests are in user already.
        let ticks: Vec<u64> =
            total.split_whitespace().take(8).map_while(|text| text.parse().ok()).collect();
        let all: u64 = ticks.iter().sum();
        let idle = ticks.get(3)? + ticks.get(4)?;
        // The name of the program, which may hold anything, ends at the last parenthesis.
        let fields: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |index: usize| fields.get(index)?.parse::<u64>().ok();
        Some(Self {
            busy: all - idle,
            own: field(11)? + field(12)?,
            all,
            num_cpus: stat.lines().skip(1).take_while(|line| line.starts_with("cpu")).count()
                as u64,
        })
    }

    /// CPUs that other processes used since then, on the average.
    pub(super) fn used_by_others(&self) -> Option<f64> {
        self.others_until(&Self::now()?)
    }

    fn others_until(&self, now: &Self) -> Option<f64> {
        let all = now.all.checked_sub(self.all).filter(|all| *all > 0)?;
        let busy = now.busy.saturating_sub(self.busy);
        let own = now.own.saturating_sub(self.own);
        Some(busy.saturating_sub(own) as f64 / all as f64 * self.num_cpus as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_process_used_is_not_of_others() {
        let stat = |user: u64, idle: u64| {
            format!("cpu  {user} 0 10 {idle} 5 0 0 3 0 0\ncpu0 1 2\ncpu1 1 2\nintr 1\n")
        };
        let own = |user: u64| format!("1 (a) b) S 1 1 1 0 -1 4 1 0 0 0 {user} 7 0 0 20 0\n");
        let before = CpuTime::read(&stat(100, 1000), &own(50)).unwrap();
        let after = CpuTime::read(&stat(250, 1050), &own(100)).unwrap();
        // 200 ticks of two CPUs: 150 busy, 50 of them its own.
        assert_eq!(before.others_until(&after), Some(1.0));
        assert_eq!(before.others_until(&before), None);
    }
}
