//! What an index consists of, written when it is complete: every file with its length and hash.
//! An index without a seal, or that doesn't match it, is not used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::error::IndexError;

use super::fingerprint::hash_file;

const SEAL_FILE: &str = "seal.json";

type Seal = BTreeMap<String, (u64, String)>;

/// Seals a complete index: all its files are on disk, then its seal.
pub(super) fn write(dir: &Path) -> Result<(), IndexError> {
    let mut files = Vec::new();
    list(dir, dir, &mut files)?;
    let seal: Seal = files
        .into_par_iter()
        .map(|name| {
            let path = dir.join(&name);
            File::open(&path)?.sync_all()?;
            let name = name.to_string_lossy().into_owned();
            Ok((name, hash_file(&path)?))
        })
        .collect::<Result<_, IndexError>>()?;
    let text = serde_json::to_vec(&seal).map_err(|error| IndexError::Io(error.into()))?;
    let path = dir.join(SEAL_FILE);
    fs::write(&path, text)?;
    File::open(&path)?.sync_all()?;
    Ok(())
}

/// Checks that every file is as it was sealed.
pub(super) fn check(dir: &Path) -> Result<(), IndexError> {
    let damaged = |reason: String| IndexError::Damaged(reason);
    let text = fs::read(dir.join(SEAL_FILE))?;
    let seal: Seal =
        serde_json::from_slice(&text).map_err(|error| damaged(format!("its seal: {error}")))?;
    seal.into_par_iter().try_for_each(|(name, sealed)| {
        if hash_file(&dir.join(&name))? == sealed {
            Ok(())
        } else {
            Err(damaged(format!("its file {name} has changed")))
        }
    })
}

/// The files below `dir`, by their names from `root`. Lock files are no part of an index.
fn list(root: &Path, dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), IndexError> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            list(root, &path, files)?;
        } else if path.extension().is_none_or(|extension| extension != "lock")
            && let Ok(name) = path.strip_prefix(root)
        {
            files.push(name.to_owned());
        }
    }
    Ok(())
}
