//! Lines of a file of any size, one at a time, none longer than a limit.
//!
//! Read by JSONL sources and by the corpus. What a line means is theirs.

use std::io::{self, BufRead};

use memchr::memchr;

/// Longest record that is read; a longer one is passed over and reported.
pub(crate) const MAX_RECORD_BYTES: usize = 16 << 20;

/// One line.
pub(crate) struct Line<'b> {
    /// Number of the line, from 1.
    pub(crate) number: u64,
    /// The line without its end (LF or CRLF), or its length where that is over the limit.
    pub(crate) content: Result<&'b [u8], u64>,
}

/// Reads lines; memory is bounded by the limit.
pub(crate) struct Lines<R> {
    reader: R,
    number: u64,
    max_bytes: usize,
    buffer: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// Reads on from a reader, whose next line has the number `first`.
    pub(crate) fn new(reader: R, first: u64, max_bytes: usize) -> Self {
        Self { reader, number: first, max_bytes, buffer: Vec::new() }
    }

    /// Number of the line that [`Lines::next`] reads next.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The next line, blank ones included; `None` at the end.
    pub(crate) fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        self.buffer.clear();
        let mut num_bytes = 0_u64;
        let mut ended = false;
        while !ended {
            let chunk = match self.reader.fill_buf() {
                Ok(chunk) => chunk,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if chunk.is_empty() {
                if num_bytes == 0 {
                    return Ok(None);
                }
                break;
            }
            let newline = memchr(b'\n', chunk);
            ended = newline.is_some();
            let used = newline.map_or(chunk.len(), |at| at + 1);
            num_bytes += used as u64;
            // The one byte above the limit tells a line of just that length from a longer one.
            let room = (self.max_bytes + 2).saturating_sub(self.buffer.len());
            self.buffer.extend_from_slice(&chunk[..used.min(room)]);
            self.reader.consume(used);
        }
        for end in [b'\n', b'\r'] {
            if self.buffer.last() == Some(&end) {
                self.buffer.pop();
            }
        }
        let number = self.number;
        self.number += 1;
        let content = if self.buffer.len() > self.max_bytes {
            Err(num_bytes)
        } else {
            Ok(self.buffer.as_slice())
        };
        Ok(Some(Line { number, content }))
    }

    /// The reader, at the start of the next line.
    pub(crate) fn reader(&self) -> &R {
        &self.reader
    }

    /// The line that was read last, if it was not over the limit.
    pub(crate) fn current(&self) -> &[u8] {
        &self.buffer
    }
}

/// What to say of a record over the limit.
pub(crate) fn too_long(max_bytes: usize) -> String {
    format!("expected a record of at most {max_bytes} bytes, given a longer one")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufReader;

    fn read(text: &[u8], max_bytes: usize, chunk: usize) -> Vec<(u64, Result<String, u64>)> {
        let mut lines = Lines::new(BufReader::with_capacity(chunk, text), 1, max_bytes);
        let mut all = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            let content = line.content.map(|bytes| String::from_utf8(bytes.to_vec()).unwrap());
            all.push((line.number, content));
        }
        all
    }

    #[test]
    fn line_ends_are_taken_off_and_a_missing_last_one_is_no_loss() {
        for chunk in [1, 2, 3, 64] {
            let lines = read(b"a\r\n\nbc\nd", 10, chunk);
            let expected = ["a", "", "bc", "d"].map(|text| Ok(text.to_owned()));
            assert_eq!(lines, (1..).zip(expected).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_line_over_the_limit_is_passed_over_and_the_next_one_read() {
        for chunk in [1, 3, 64] {
            let lines = read(b"12345\r\n123456\n123456789\nok\n", 5, chunk);
            assert_eq!(
                lines,
                [(1, Ok("12345".to_owned())), (2, Err(7)), (3, Err(10)), (4, Ok("ok".to_owned()))]
            );
        }
    }

    #[test]
    fn a_long_line_takes_no_more_memory_than_the_limit() {
        let mut text = vec![b'x'; 1 << 20];
        text.push(b'\n');
        let mut lines = Lines::new(BufReader::new(text.as_slice()), 1, 1000);
        assert!(lines.next().unwrap().unwrap().content.is_err());
        assert!(lines.buffer.capacity() < 4000);
    }
}
