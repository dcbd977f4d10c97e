//! What opening does about the end of an output that a crash left behind.
//!
//! Only the end is looked at: a huge output whose index is whole is opened without reading it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{CHUNK_BYTES, Identified, MAX_LINE_BYTES, beside, foreign, name};
use crate::Error;

/// Cuts what follows the last whole line, keeping it in a file beside the output; the length of
/// what stays.
///
/// A file that isn't flotilla's is never cut: both its first and its last line must be
/// recognised, and the tail must be what a crash can leave.
pub(super) fn cut_torn_tail(path: &Path, mut file: &File) -> Result<u64, Error> {
    let io = |action| move |source| Error::Io { action, path: name(path), source };
    let length = file.metadata().map_err(io("cannot stat"))?.len();
    let whole = whole_lines(path, file, length)?;
    if length == whole {
        return Ok(whole);
    }
    let torn_path = beside(path, &format!("torn-{whole}"));
    file.seek(SeekFrom::Start(whole)).map_err(io("cannot seek in"))?;
    let copy = File::create(&torn_path).and_then(|mut torn| {
        std::io::copy(&mut file, &mut torn)?;
        torn.sync_all()
    });
    copy.map_err(|source| Error::Io { action: "cannot write", path: name(&torn_path), source })?;
    let cut = file.set_len(whole).and_then(|()| file.sync_all());
    cut.map_err(io("cannot cut the torn last line of"))?;
    tracing::warn!(
        output = %path.display(),
        bytes = length - whole,
        kept_in = %torn_path.display(),
        "cut a torn last line that an earlier run left behind; its job is answered again"
    );
    Ok(whole)
}

/// Length of the file up to the end of its last whole line of ours.
fn whole_lines(path: &Path, file: &File, length: u64) -> Result<u64, Error> {
    let io = |source| Error::Io { action: "cannot read", path: name(path), source };
    let mut end = length;
    loop {
        let start = start_of_last_line(path, file, end)?;
        let mut line = vec![0; usize::try_from(end - start).unwrap_or(MAX_LINE_BYTES)];
        file.read_exact_at(&mut line, start).map_err(io)?;
        if line.is_empty() {
            return Ok(end);
        }
        // Our lines hold no zero bytes, but a file system may have put some where a write was lost.
        let is_whole = line.last() == Some(&b'\n');
        let is_torn = if is_whole { line.contains(&0) } else { may_be_torn(&line) };
        if is_torn {
            end = start;
            continue;
        }
        if !is_whole {
            let reason = "found the start of another".to_owned();
            return Err(foreign(path, number_of_line(file, start).map_err(io)?, reason));
        }
        Identified::read(&line).or_else(|reason| {
            Err(foreign(path, number_of_line(file, start).map_err(io)?, reason))
        })?;
        if start > 0 && end < length {
            check_first_line(path, file)?;
        }
        return Ok(end);
    }
}

/// Where the line starts that ends at `end`, with a newline or without.
fn start_of_last_line(path: &Path, file: &File, end: u64) -> Result<u64, Error> {
    let io = |source| Error::Io { action: "cannot read", path: name(path), source };
    let mut block = vec![0; CHUNK_BYTES];
    // The last byte belongs to the line, whatever it is.
    let mut searched = end.saturating_sub(1);
    while searched > 0 {
        let size = searched.min(CHUNK_BYTES as u64);
        let block = &mut block[..size as usize];
        file.read_exact_at(block, searched - size).map_err(io)?;
        if let Some(newline) = block.iter().rposition(|&byte| byte == b'\n') {
            return Ok(searched - size + newline as u64 + 1);
        }
        searched -= size;
        if end - searched > MAX_LINE_BYTES as u64 {
            let reason = "found one of over a gibibyte".to_owned();
            return Err(foreign(path, number_of_line(file, searched).map_err(io)?, reason));
        }
    }
    Ok(0)
}

/// Whether a crash can have left this at the end of one of our files: the beginning of a line, or
/// zeros that a file system had made room with.
fn may_be_torn(tail: &[u8]) -> bool {
    const START: &[u8] = b"{\"id\":\"";
    let common = tail.len().min(START.len());
    tail[..common] == START[..common] || tail.iter().all(|&byte| byte == 0)
}

fn check_first_line(path: &Path, file: &File) -> Result<(), Error> {
    let io = |source| Error::Io { action: "cannot read", path: name(path), source };
    let mut line = Vec::new();
    let mut block = vec![0; CHUNK_BYTES];
    while line.len() <= MAX_LINE_BYTES {
        let read = file.read_at(&mut block, line.len() as u64).map_err(io)?;
        let newline = block[..read].iter().position(|&byte| byte == b'\n');
        line.extend_from_slice(&block[..newline.unwrap_or(read)]);
        if newline.is_some() || read == 0 {
            break;
        }
    }
    Identified::read(&line).map(drop).map_err(|reason| foreign(path, 1, reason))
}

/// Number, from 1, of the line that starts at `offset`. Reads the file up to there: for errors.
fn number_of_line(mut file: &File, offset: u64) -> std::io::Result<u64> {
    file.seek(SeekFrom::Start(0))?;
    let mut before = file.take(offset);
    let mut block = vec![0; CHUNK_BYTES];
    let mut number = 1;
    loop {
        let read = before.read(&mut block)?;
        if read == 0 {
            return Ok(number);
        }
        number += block[..read].iter().filter(|&&byte| byte == b'\n').count() as u64;
    }
}
