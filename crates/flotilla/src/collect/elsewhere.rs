//! Whether a run is, or was, collected into another output than the one that is asked for: two outputs
//! would each get a part of it.
//!
//! Known from what the run's last collector said of itself, so only as true as its last words: the claim
//! in the index decides, and tells whoever lost it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use shared::RunId;
use shared::queue::nats::Fleet;
use shared::status::{Role, RunStatus, unix_now};

use crate::fleet;

/// How long its words are waited for; without them the collector goes on.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What a collector says of its output: the path with links followed, and the inode's number.
pub(super) fn identity(output: &Path) -> (PathBuf, Option<u64>) {
    let path = output.canonicalize().or_else(|_missing| std::path::absolute(output));
    let inode = output.metadata().ok().map(|metadata| metadata.ino());
    (path.unwrap_or_else(|_unnamed| output.to_owned()), inode)
}

/// What others are told of a collector of this output.
pub(crate) fn holder(output: &Path) -> String {
    format!("{} on {}", identity(output).0.display(), fleet::host())
}

/// The last words of the run's collector, if they are about another output than this one.
pub(super) async fn of_another_output(
    fleet: &Fleet,
    run: &RunId,
    output: &Path,
) -> Option<RunStatus> {
    let said = match tokio::time::timeout(TIMEOUT, fleet.run(run)).await {
        Ok(Ok(said)) => said,
        Ok(Err(error)) => {
            tracing::debug!(run = run.0, %error, "cannot see who collects the run");
            return None;
        }
        Err(_late) => return None,
    };
    said.into_iter().find(|status| status.role == Role::Collector && is_another(status, output))
}

/// Whether these words are about another file. On one disk the inode tells; on two the same number is
/// chance, and hardly under the same name.
fn is_another(status: &RunStatus, output: &Path) -> bool {
    let (path, inode) = identity(output);
    // Words that don't say which file they are about prove nothing.
    let (Some(other), Some(_)) = (&status.output, status.output_inode) else { return false };
    status.output_inode != inode || Path::new(other).file_name() != path.file_name()
}

/// Refuses a run that a live collector writes to another output.
pub(super) fn refuse_if_live(other: &RunStatus, output: &Path) -> anyhow::Result<()> {
    let now = unix_now();
    // One that can't write it keeps nobody else from it.
    if other.is_gone(now) || other.error.is_some() {
        return Ok(());
    }
    bail!(
        "run '{}' is being collected into {}: end that collector first, or collect into its output \
         too; {} would get the rest of the run only",
        other.run.0,
        place(other),
        output.display()
    )
}

/// Says which lines are not in this output, where the other had more. A copy has them all.
pub(super) fn warn_of_lines(other: &RunStatus, output: &Path, lines: u64) {
    if lines < other.done {
        tracing::warn!(
            run = other.run.0,
            "the run was collected into {} so far: {} lines there, {lines} in {}; the others are not \
             computed again. To have all in one file, end this, move that file here or collect into it",
            place(other),
            other.done,
            output.display()
        );
    }
}

fn place(status: &RunStatus) -> String {
    format!("{} on {}", status.output.as_deref().unwrap_or("an unknown output"), status.host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_the_same_under_its_links_and_after_being_moved_and_no_other_file_is() {
        let dir = tempfile::tempdir().unwrap();
        let (file, other) = (dir.path().join("a.jsonl"), dir.path().join("b.jsonl"));
        std::fs::write(&file, "").unwrap();
        std::fs::write(&other, "").unwrap();
        let (path, output_inode) = identity(&file);
        let output = Some(path.display().to_string());
        let said = RunStatus { output, output_inode, ..RunStatus::default() };
        assert!(!is_another(&said, &file));
        assert!(is_another(&said, &other));
        assert!(is_another(&said, &dir.path().join("missing.jsonl")));
        let link = dir.path().join("link.jsonl");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(!is_another(&said, &link));
        let folder = dir.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        let moved = folder.join("a.jsonl");
        std::fs::rename(&file, &moved).unwrap();
        assert!(!is_another(&said, &moved));
        assert!(!is_another(&RunStatus::default(), &moved));
    }

    #[test]
    fn only_a_live_collector_that_can_write_keeps_a_run() {
        let live = RunStatus { seen_at: unix_now(), ..RunStatus::default() };
        let output = Path::new("here.jsonl");
        assert!(refuse_if_live(&live, output).is_err());
        let gone = RunStatus { ended: true, ..live.clone() };
        assert!(refuse_if_live(&gone, output).is_ok());
        let stuck = RunStatus { error: Some("no room".to_owned()), ..live };
        assert!(refuse_if_live(&stuck, output).is_ok());
    }
}
