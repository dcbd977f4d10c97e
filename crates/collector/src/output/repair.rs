//! What opening does about the end of an output that a crash left behind.
//!
//! Only the end is looked at: a huge output whose index is whole is opened without reading it.
//! What isn't a whole line there is cut off; the last whole lines are written and synced again.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::{CHUNK_BYTES, Identified, MAX_LINE_BYTES, beside, foreign, name};
use crate::Error;
use crate::serve::MAX_BATCH;

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

/// Writes the last batch's lines again, the same bytes in the same place, and syncs them; `end` is the
/// file's length.
///
/// Whoever appended them may have been killed before their sync, or the sync may have failed: then
/// the kernel shows them to every reader, takes them for written, and no later sync tries them again, though they may
/// never have reached the disk. Nothing is appended before what is there has been synced, so that no
/// other lines can be meant. A crash in the middle of it changes nothing.
pub(super) fn write_end_again(path: &Path, file: &File, end: u64) -> Result<(), Error> {
    let io = |action| move |source| Error::Io { action, path: name(path), source };
    if end == 0 {
        return Ok(());
    }
    let start = start_of_last_lines(file, end, MAX_BATCH).map_err(io("cannot read"))?;
    rewrite(file, start, end).map_err(io("cannot write the end again of"))?;
    file.sync_all().map_err(io("cannot sync"))
}

/// Where the last `num_lines` lines start; the file ends with a newline at `end`.
fn start_of_last_lines(file: &File, end: u64, num_lines: usize) -> std::io::Result<u64> {
    let mut block = vec![0; CHUNK_BYTES];
    let (mut start, mut newlines_left) = (end, num_lines + 1);
    while start > 0 {
        let size = start.min(CHUNK_BYTES as u64);
        start -= size;
        let block = &mut block[..size as usize];
        file.read_exact_at(block, start)?;
        for newline in block.iter().rev().enumerate().filter(|(_, byte)| **byte == b'\n') {
            newlines_left -= 1;
            if newlines_left == 0 {
                return Ok(start + size - newline.0 as u64);
            }
        }
    }
    Ok(0)
}

/// Writes what is in the file from `start` to `end` to where it is.
fn rewrite(file: &File, start: u64, end: u64) -> std::io::Result<()> {
    // A file open for appending would put it at its end.
    let flags = fcntl_getfl(file)?;
    fcntl_setfl(file, flags - OFlags::APPEND)?;
    let mut block = vec![0; CHUNK_BYTES];
    let mut at = start;
    let mut rewritten = Ok(());
    while at < end && rewritten.is_ok() {
        let size = (end - at).min(CHUNK_BYTES as u64);
        let block = &mut block[..size as usize];
        rewritten = file.read_exact_at(block, at).and_then(|()| file.write_all_at(block, at));
        at += size;
    }
    fcntl_setfl(file, flags)?;
    rewritten
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn last_lines_are_found_and_rewritten_across_chunks() {
        let mut file = tempfile::tempfile().unwrap();
        // Lines of many lengths, some longer than a chunk, as far as three chunks and more.
        let lengths = [1, 7, CHUNK_BYTES, 500, CHUNK_BYTES + 1, 3, CHUNK_BYTES - 1, 90, 1];
        let mut starts = vec![0];
        for (number, length) in lengths.iter().enumerate() {
            let line = [vec![b'a' + number as u8; length - 1], vec![b'\n']].concat();
            file.write_all(&line).unwrap();
            starts.push(starts[number] + *length as u64);
        }
        let end = starts[lengths.len()];
        for num_lines in 1..=lengths.len() + 2 {
            let expected = starts[lengths.len().saturating_sub(num_lines)];
            let start = start_of_last_lines(&file, end, num_lines).unwrap();
            assert_eq!(start, expected, "{num_lines} lines");
        }
        let content = || {
            let mut content = vec![0; end as usize];
            file.read_exact_at(&mut content, 0).unwrap();
            content
        };
        let before = content();
        rewrite(&file, starts[2], end).unwrap();
        assert_eq!(content(), before);
        assert_eq!(file.metadata().unwrap().len(), end);
    }
}
