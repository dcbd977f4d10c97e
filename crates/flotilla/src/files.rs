//! Which file is which: what must hold of a command's input and output before either is touched.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// Checks that the input is there. `-` is standard input.
pub(crate) fn check_input(input: &Path) -> anyhow::Result<()> {
    if input.as_os_str() != "-" {
        input.metadata().with_context(|| format!("cannot read {}", input.display()))?;
    }
    Ok(())
}

/// Checks that the input is there and that the output isn't the input.
pub(crate) fn check(input: &Path, output: &Path) -> anyhow::Result<()> {
    check_input(input)?;
    // A pipe has no real path, and is no output either.
    let real = input.canonicalize().ok();
    if real.is_some_and(|real| output.canonicalize().is_ok_and(|output| output == real)) {
        bail!("{} is both the input and the output", input.display());
    }
    Ok(())
}

/// `name` → `name<suffix>`.
pub(crate) fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
