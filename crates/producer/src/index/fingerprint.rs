//! What tells one corpus from another: the content of its files.
//!
//! Hashes are kept with the size and the times of each file, so that files that haven't changed
//! aren't read again. A file too young for its times to be trusted is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::corpus::Release;
use crate::error::Error;

/// Age from which a change must show in a file's times.
const MIN_AGE: Duration = Duration::from_secs(2);

/// SHA-256 in hexadecimal.
pub(crate) fn hex_sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of a file in hexadecimal, with its length.
pub(crate) fn hash_file(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut len = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((len, hex(&hasher.finalize()))),
            Ok(read) => {
                len += read as u64;
                hasher.update(&buffer[..read]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// What the file system says of a file; another content has another stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Serialize, Deserialize)]
struct Known {
    stamp: Stamp,
    sha256: String,
}

/// Hashes of files as they were when last read, by path.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct KnownFiles(BTreeMap<String, Known>);

impl KnownFiles {
    /// Reads what was kept; nothing, where that is missing or damaged.
    pub(crate) fn read(path: &Path) -> Self {
        std::fs::read(path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    /// The content hash of every release's file, in their order, and what to keep for next time.
    pub(crate) fn hashes(&self, releases: &[Release]) -> Result<(Vec<String>, Self), Error> {
        let known: Vec<(Known, bool)> = releases
            .par_iter()
            .map(|release| self.hash(&release.file).map_err(Error::corpus(&release.file)))
            .collect::<Result<_, _>>()?;
        let hashes = known.iter().map(|(known, _)| known.sha256.clone()).collect();
        let keep = releases
            .iter()
            .zip(known)
            .filter(|(_, (_, settled))| *settled)
            .map(|(release, (known, _))| (release.file.to_string_lossy().into_owned(), known));
        Ok((hashes, Self(keep.collect())))
    }

    /// Hash of one file, and whether its stamp can be trusted next time.
    fn hash(&self, file: &Path) -> io::Result<(Known, bool)> {
        let metadata = file.metadata()?;
        let stamp = Stamp {
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        };
        let kept = self.0.get(file.to_string_lossy().as_ref());
        let sha256 = match kept.filter(|known| known.stamp == stamp) {
            Some(known) => known.sha256.clone(),
            None => hash_file(file)?.1,
        };
        let youngest = stamp.modified.0.max(stamp.changed.0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let settled = u64::try_from(youngest)
            .is_ok_and(|youngest| Duration::from_secs(youngest) + MIN_AGE < now);
        Ok((Known { stamp, sha256 }, settled))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::Version;

    #[test]
    fn only_files_whose_stamp_has_changed_are_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("1.jsonl");
        std::fs::write(&file, "text").unwrap();
        let release =
            Release { package: "a".into(), version: Version::new("1"), file: file.clone() };
        let releases = [release];
        let (hashes, keep) = KnownFiles::default().hashes(&releases).unwrap();
        assert_eq!(hashes, [hex_sha256(b"text")]);
        assert!(keep.0.is_empty(), "a file this young can't be trusted");

        let metadata = file.metadata().unwrap();
        let mut stamp = Stamp {
            size: 4,
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        };
        let known = |stamp| {
            let sha256 = "kept".to_owned();
            let name = file.to_string_lossy().into_owned();
            KnownFiles([(name, Known { stamp, sha256 })].into())
        };
        assert_eq!(known(stamp).hashes(&releases).unwrap().0, ["kept"]);
        stamp.modified.1 += 1;
        assert_eq!(known(stamp).hashes(&releases).unwrap().0, hashes);
    }
}
