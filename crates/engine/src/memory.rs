//! How much memory can be had: what the system has free, and what the control groups of this process (those of
//! a container, say) leave of it.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// Memory that can be had without swapping and without the process being ended for it, where the system
/// tells.
pub fn available_memory() -> Option<u64> {
    available_below(Path::new("/"))
}

/// The same, of the system whose files are below `root`.
fn available_below(root: &Path) -> Option<u64> {
    let groups = read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let rooms = groups.lines().flat_map(|line| group_rooms(root, line));
    rooms.chain(system_room(root)).min()
}

fn system_room(root: &Path) -> Option<u64> {
    let text = read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// What the files of a version of control groups are called.
struct Files {
    mount: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// In `memory.stat`: pages of files that go when they are in the way.
    reclaimable: &'static str,
}

const VERSION_1: Files = Files {
    mount: "sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file ",
};
const VERSION_2: Files = Files {
    mount: "sys/fs/cgroup",
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: "inactive_file ",
};

/// What a line of `/proc/self/cgroup` (`number:controllers:path`) leaves: the group and those that it is in.
fn group_rooms(root: &Path, line: &str) -> Vec<u64> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { return Vec::new() };
    let files = match controllers {
        "" => VERSION_2,
        _ if controllers.split(',').any(|name| name == "memory") => VERSION_1,
        _ => return Vec::new(),
    };
    // In a container the path may be that outside of it; the group is then what is mounted.
    let path = PathBuf::from(path.trim_start_matches('/'));
    let mount = root.join(files.mount);
    path.ancestors().filter_map(|group| group_room(&mount.join(group), &files)).collect()
}

/// What one group leaves; `None` if it has no limit.
fn group_room(group: &Path, files: &Files) -> Option<u64> {
    let number = |file: &str| read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
    let (limit, usage) = (number(files.limit)?, number(files.usage)?);
    let stat = read_to_string(group.join("memory.stat")).unwrap_or_default();
    let reclaimable =
        stat.lines().find_map(|line| line.strip_prefix(files.reclaimable)?.parse().ok());
    let used = usage.saturating_sub(reclaimable.unwrap_or(0));
    Some(limit.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\nSwapFree: 1 kB\n");

    #[test]
    fn the_system_has_what_it_says_where_no_group_is_limited() {
        let none = system(&[]);
        assert_eq!(available_below(none.path()), None);
        let alone = system(&[MEMINFO]);
        assert_eq!(available_below(alone.path()), Some(8000 << 10));
        let unlimited = system(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/user\n"),
            ("sys/fs/cgroup/user/memory.max", "max\n"),
            ("sys/fs/cgroup/user/memory.current", "1000\n"),
        ]);
        assert_eq!(available_below(unlimited.path()), Some(8000 << 10));
        assert!(available_memory().is_none_or(|bytes| bytes > 0));
    }

    #[test]
    fn the_narrowest_group_counts() {
        let second = system(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/pod/container\n"),
            ("sys/fs/cgroup/pod/memory.max", "500000\n"),
            ("sys/fs/cgroup/pod/memory.current", "300000\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 100000\n"),
            ("sys/fs/cgroup/pod/container/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/container/memory.current", "1\n"),
        ]);
        assert_eq!(available_below(second.path()), Some(300_000));
        let first = system(&[
            MEMINFO,
            ("proc/self/cgroup", "9:cpu:/c\n4:hugetlb,memory:/docker/outside\n0::/\n"),
            // The container's own group is what is mounted.
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "70000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "90000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 5\ntotal_inactive_file 30000\n"),
        ]);
        assert_eq!(available_below(first.path()), Some(10_000));
    }
}
