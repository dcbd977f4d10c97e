//! The records of a file, whichever of the two shapes it has: one on each line, or the elements
//! of one array. What a record means is [`super::query`]'s and [`super::context_line`]'s.

use std::io::{self, BufRead, BufReader, Read};

use crate::lines::{Lines, MAX_RECORD_BYTES, too_long};

use super::array::ArrayScanner;
use super::input::Division;

const BOM: &[u8] = b"\xef\xbb\xbf";

/// One record, not yet parsed.
pub(super) struct Record<'b> {
    /// Line it starts on, from 1.
    pub(super) line: u64,
    /// Its bytes, or why it can't be told from its neighbours.
    pub(super) content: Result<&'b [u8], String>,
}

/// Reads a file's records one at a time, in memory that doesn't grow with the file.
pub(super) enum Records<R> {
    /// One on each line.
    Lines(LineRecords<R>),
    /// The elements of an array.
    Array(ArrayScanner<R>),
    /// Values one after another.
    Values(ArrayScanner<R>),
}

impl<R: BufRead> Records<R> {
    /// Looks at the first byte that isn't space or a byte order mark: `[` opens an array.
    pub(super) fn open(mut reader: R, division: Division) -> io::Result<Self> {
        let mut line = 1;
        skip_bom(&mut reader)?;
        loop {
            let chunk = reader.fill_buf()?;
            let blank = chunk.iter().take_while(|b| b.is_ascii_whitespace()).count();
            line += memchr::memchr_iter(b'\n', &chunk[..blank]).count() as u64;
            let first = chunk.get(blank).copied();
            let at_end = chunk.is_empty();
            reader.consume(blank);
            match first {
                Some(b'[') => {
                    reader.consume(1);
                    let scanner = ArrayScanner::new(reader, line, MAX_RECORD_BYTES);
                    return Ok(Self::Array(scanner.giving_up_at_most(division.patience())));
                }
                None if !at_end => {}
                _ if division == Division::Values => {
                    let scanner = ArrayScanner::bare(reader, line, MAX_RECORD_BYTES);
                    return Ok(Self::Values(scanner.giving_up_at_most(division.patience())));
                }
                _ => {
                    return Ok(Self::Lines(LineRecords {
                        lines: Lines::new(reader, line, MAX_RECORD_BYTES),
                        in_spread: false,
                    }));
                }
            }
        }
    }

    /// The next record; `None` at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<Record<'_>>> {
        match self {
            Self::Lines(records) => records.next(),
            Self::Array(scanner) | Self::Values(scanner) => scanner.next(),
        }
    }

    /// The line that reading has come to.
    pub(super) fn line(&self) -> u64 {
        match self {
            Self::Lines(records) => records.lines.number(),
            Self::Array(scanner) | Self::Values(scanner) => scanner.line(),
        }
    }
}

impl<R: Read> Records<BufReader<R>> {
    /// Whether the next record can be told without waiting for more of the text.
    pub(super) fn is_ready(&self) -> bool {
        match self {
            Self::Lines(records) => {
                // Blank lines are no records.
                let text = records.lines.reader().buffer().trim_ascii_start();
                memchr::memchr(b'\n', text).is_some()
            }
            Self::Array(scanner) | Self::Values(scanner) => scanner.is_ready(),
        }
    }
}

fn skip_bom<R: BufRead>(reader: &mut R) -> io::Result<()> {
    // Files and tests alike hand out three bytes at once; a reader that doesn't keeps its mark,
    // and its first record is reported.
    if reader.fill_buf()?.starts_with(BOM) {
        reader.consume(BOM.len());
    }
    Ok(())
}

/// Records that take a line each.
pub(super) struct LineRecords<R> {
    lines: Lines<R>,
    /// Whether the lines of an object that is spread over several are being passed over.
    in_spread: bool,
}

impl<R: BufRead> LineRecords<R> {
    fn next(&mut self) -> io::Result<Option<Record<'_>>> {
        // The borrow checker wants the line looked at here and handed out below.
        let number = loop {
            let Some(line) = self.lines.next()? else {
                return Ok(None);
            };
            let number = line.number;
            let shape = line.content.map(Shape::of);
            match shape {
                Ok(Shape::Blank) => continue,
                Ok(Shape::Spread) => {
                    self.in_spread = true;
                    return Ok(Some(Record { line: number, content: Err(SPREAD.to_owned()) }));
                }
                Ok(shape) if self.in_spread && shape != Shape::Object => {
                    self.in_spread = shape != Shape::Close;
                }
                Err(_) => {
                    self.in_spread = false;
                    return Ok(Some(Record {
                        line: number,
                        content: Err(too_long(MAX_RECORD_BYTES)),
                    }));
                }
                Ok(_) => {
                    self.in_spread = false;
                    break number;
                }
            }
        };
        Ok(Some(Record { line: number, content: Ok(self.lines.current()) }))
    }
}

const SPREAD: &str = "expected one JSON object on each line, or an array of objects, given an \
                      object spread over several lines; put each on one line, for example with \
                      `jq -c .`";

/// What the ends of a line say about it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Blank,
    /// Starts an object that can't end on this line.
    Spread,
    /// Starts with `{` in the first column.
    Object,
    /// Ends an object that was spread over several lines.
    Close,
    Other,
}

impl Shape {
    fn of(line: &[u8]) -> Self {
        let trimmed = line.trim_ascii();
        match (trimmed.first(), trimmed.last()) {
            (None, _) | (_, None) => Self::Blank,
            (Some(b'{'), Some(b'{' | b'[' | b',')) if line.starts_with(b"{") => Self::Spread,
            (Some(b'{'), _) if line.starts_with(b"{") => Self::Object,
            (Some(b'}'), _) if line.starts_with(b"}") => Self::Close,
            _ => Self::Other,
        }
    }
}
