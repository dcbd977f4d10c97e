//! The elements of a JSON array of any size, one at a time.
//!
//! Not a parser: it tracks strings, escapes and brackets to find where an element ends, so that a
//! malformed element is one report and the elements after it still come. Parsing an element is
//! the caller's. An element whose own end can't be found (a bracket or a quote is missing) is
//! given up, and reading goes on at the next place that looks like the start of one.
//!
//! Bare values, one after another without brackets and commas, are scanned in the same way: an
//! object ends with its bracket, anything else with its line.

use std::io::{self, Read};

use memchr::{memchr_iter, memchr3, memrchr};

use crate::lines::too_long;

use super::records::Record;

const CHUNK_BYTES: usize = 64 << 10;

/// What came last in the array.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Start,
    Comma,
    Element,
}

/// How the scan of one element ended.
enum End {
    /// Before this offset in the buffer.
    At(usize),
    /// It is longer than the limit, and was passed over.
    TooLong,
    /// Its end can't be found.
    Broken(&'static str),
}

/// Finds the elements of an array; memory is bounded by the longest element allowed.
pub(super) struct ArrayScanner<R> {
    reader: R,
    max_bytes: usize,
    /// What was read; the bytes before `start` are done with, `at` is the next to look at.
    buffer: Vec<u8>,
    start: usize,
    at: usize,
    /// The line of `buffer[start]`.
    line: u64,
    /// Number of spaces before `buffer[start]` on its line, if there is nothing else.
    indent: Option<usize>,
    last: Last,
    /// Whether an element was given up: a `]` may then be a piece of it.
    resumed: bool,
    /// Whether there are no brackets round the elements and no commas between them.
    bare: bool,
    /// Elements that may still be given up. Each costs a scan of up to `max_bytes`, which must not
    /// be had for a few bytes by whoever sends them.
    num_to_give_up: u32,
    done: bool,
}

impl<R: Read> ArrayScanner<R> {
    /// Reads on after the opening bracket, which is on `line`.
    pub(super) fn new(reader: R, line: u64, max_bytes: usize) -> Self {
        Self {
            reader,
            max_bytes,
            buffer: Vec::new(),
            start: 0,
            at: 0,
            line,
            indent: None,
            last: Last::Start,
            resumed: false,
            bare: false,
            num_to_give_up: u32::MAX,
            done: false,
        }
    }

    /// Gives up after this many elements whose end can't be found.
    pub(super) fn giving_up_at_most(self, num_to_give_up: u32) -> Self {
        Self { num_to_give_up, ..self }
    }

    /// Reads values without an array round them, from `line` on.
    pub(super) fn bare(reader: R, line: u64, max_bytes: usize) -> Self {
        Self { bare: true, ..Self::new(reader, line, max_bytes) }
    }

    /// Whether the next element ends in what was read so far.
    pub(super) fn is_ready(&self) -> bool {
        let rest = &self.buffer[self.at..];
        let between = |byte: &u8| byte.is_ascii_whitespace() || *byte == b',';
        let Some(start) = rest.iter().position(|byte| !between(byte)) else {
            return false;
        };
        let mut nesting = Nesting { bare: self.bare, ..Nesting::default() };
        nesting.scan(&rest[start..], self.max_bytes).1.is_some()
    }

    /// The line that reading has come to.
    pub(super) fn line(&self) -> u64 {
        self.line
    }

    /// The next element; `None` after the last.
    pub(super) fn next(&mut self) -> io::Result<Option<Record<'_>>> {
        while !self.done {
            let byte = self.skip_space()?;
            self.advance_start();
            let reason = match byte {
                None if self.bare => {
                    self.done = true;
                    continue;
                }
                Some(_) if self.bare => return self.element().map(Some),
                None => {
                    self.done = true;
                    "expected `]` at the end of the array, given the end of the file"
                }
                Some(b']') => match self.close()? {
                    Some(reason) => reason,
                    None => continue,
                },
                Some(b',') => {
                    self.at += 1;
                    if std::mem::replace(&mut self.last, Last::Comma) == Last::Element {
                        continue;
                    }
                    "expected an object before the comma, given none"
                }
                Some(_) => return self.element().map(Some),
            };
            return Ok(Some(Record { line: self.line, content: Err(reason.to_owned()) }));
        }
        Ok(None)
    }

    /// Takes the bracket that closes the array, and says what is wrong with it. Comes to the line
    /// of what is wrong.
    fn close(&mut self) -> io::Result<Option<&'static str>> {
        if self.last == Last::Comma && !self.resumed {
            self.last = Last::Element;
            return Ok(Some("expected an object after the comma, given the end of the array"));
        }
        self.at += 1;
        let follows = self.skip_space()?;
        if self.resumed && matches!(follows, Some(b',' | b'}' | b']')) {
            return Ok(None);
        }
        self.advance_start();
        self.done = true;
        Ok(follows.map(|_| "expected the end of the file after the array, given more text"))
    }

    /// Scans the element that starts here.
    fn element(&mut self) -> io::Result<Record<'_>> {
        // Bare values start lines, even where this one doesn't.
        let (line, indent) = (self.line, self.indent.or(self.bare.then_some(0)));
        self.last = Last::Element;
        let content = match self.scan(indent)? {
            End::At(end) => Ok(self.start..end),
            End::TooLong => Err(too_long(self.max_bytes)),
            End::Broken(_) if self.num_to_give_up == 0 => {
                self.done = true;
                Err("expected whole objects, given too many without an end".to_owned())
            }
            End::Broken(reason) => {
                self.num_to_give_up -= 1;
                self.resume(indent)?;
                Err(format!("expected an object, given {reason}"))
            }
        };
        Ok(Record { line, content: content.map(|range| self.buffer[range].trim_ascii_end()) })
    }

    fn scan(&mut self, indent: Option<usize>) -> io::Result<End> {
        let mut nesting = Nesting { bare: self.bare, ..Nesting::default() };
        let mut too_long = false;
        loop {
            let (used, verdict) = nesting.scan(&self.buffer[self.at..], self.max_bytes);
            self.at += used;
            let over = self.at - self.start > self.max_bytes;
            match verdict {
                Some(Verdict::Broken(reason)) => return Ok(End::Broken(reason)),
                Some(Verdict::End) if over || too_long => return Ok(End::TooLong),
                Some(Verdict::End) => return Ok(End::At(self.at)),
                None => {}
            }
            if over && !too_long {
                // Perhaps nothing but a lost bracket: elements that follow show it.
                let mut search = Resume::new(indent);
                let rest = &self.buffer[self.start + 1..self.at];
                if indent.is_some() && rest.iter().any(|&byte| search.found(byte)) {
                    return Ok(End::Broken(LOST_BRACKET));
                }
                too_long = true;
            }
            if too_long {
                self.advance_start();
            }
            if !self.fill()? {
                return Ok(match nesting.is_closed() {
                    true if too_long => End::TooLong,
                    true => End::At(self.at),
                    false => End::Broken("one that the end of the file cuts off"),
                });
            }
        }
    }

    /// Goes to the next place after `start` that looks like the start of an element.
    fn resume(&mut self, indent: Option<usize>) -> io::Result<()> {
        self.resumed = true;
        self.last = Last::Comma;
        let mut search = Resume::new(indent);
        self.at = (self.start + 1).min(self.buffer.len());
        loop {
            let rest = &self.buffer[self.at..];
            if let Some(found) = rest.iter().position(|&byte| search.found(byte)) {
                self.at += found;
                return Ok(());
            }
            self.at = self.buffer.len();
            self.advance_start();
            if !self.fill()? {
                self.done = true;
                return Ok(());
            }
        }
    }

    /// The next byte that isn't space, not taken; `None` at the end of the file.
    fn skip_space(&mut self) -> io::Result<Option<u8>> {
        loop {
            let rest = &self.buffer[self.at..];
            if let Some(space) = rest.iter().position(|byte| !byte.is_ascii_whitespace()) {
                self.at += space;
                return Ok(Some(self.buffer[self.at]));
            }
            self.at = self.buffer.len();
            self.advance_start();
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Is done with everything before `at`.
    fn advance_start(&mut self) {
        let passed = &self.buffer[self.start..self.at];
        self.line += memchr_iter(b'\n', passed).count() as u64;
        let newline = memrchr(b'\n', passed);
        let tail = &passed[newline.map_or(0, |at| at + 1)..];
        let before = if newline.is_some() { Some(0) } else { self.indent };
        self.indent = before
            .filter(|_| tail.iter().all(u8::is_ascii_whitespace))
            .map(|spaces| spaces + tail.len());
        self.start = self.at;
    }

    /// Reads more behind what is there; false at the end of the file.
    fn fill(&mut self) -> io::Result<bool> {
        self.buffer.drain(..self.start);
        self.at -= self.start;
        self.start = 0;
        let len = self.buffer.len();
        self.buffer.resize(len + CHUNK_BYTES, 0);
        let read = loop {
            match self.reader.read(&mut self.buffer[len..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        self.buffer.truncate(len + read.as_ref().map_or(0, |&num_bytes| num_bytes));
        read.map(|num_bytes| num_bytes > 0)
    }
}

const LOST_BRACKET: &str = "one whose closing bracket is missing";

/// What the bytes of an element say.
enum Verdict {
    /// The element ends before this byte.
    End,
    /// No JSON continues like this.
    Broken(&'static str),
}

/// The strings and brackets that are open in an element.
#[derive(Default)]
struct Nesting {
    brackets: Vec<u8>,
    in_string: bool,
    escaped: bool,
    /// Whether a bracket was opened and closed again.
    complete: bool,
    /// Whether that is the element's end: no comma follows.
    bare: bool,
}

impl Nesting {
    fn is_closed(&self) -> bool {
        self.brackets.is_empty() && !self.in_string
    }

    /// Looks at bytes in turn: how many belong to the element, and what ended the look if not
    /// their end.
    fn scan(&mut self, bytes: &[u8], max_depth: usize) -> (usize, Option<Verdict>) {
        let mut at = 0;
        while at < bytes.len() {
            if self.bare && self.is_closed() && (self.complete || bytes[at] == b'\n') {
                return (at, Some(Verdict::End));
            }
            if self.in_string {
                match self.scan_string(&bytes[at..]) {
                    Ok(used) => at += used,
                    Err(used) => {
                        let reason = "one with a line break inside a string";
                        return (at + used, Some(Verdict::Broken(reason)));
                    }
                }
                continue;
            }
            let verdict = match (bytes[at], self.brackets.last()) {
                (b'"', _) => {
                    self.in_string = true;
                    None
                }
                (b'{', None) if self.complete => Some(Verdict::End),
                (b',' | b']', None) if !self.bare => Some(Verdict::End),
                (b'{' | b'[', _) if self.brackets.len() >= max_depth => {
                    Some(Verdict::Broken("one that is nested too deep"))
                }
                (open @ (b'{' | b'['), _) => {
                    self.brackets.push(open);
                    None
                }
                (b'}', Some(b'{')) | (b']', Some(b'[')) => {
                    self.brackets.pop();
                    self.complete |= self.brackets.is_empty();
                    None
                }
                (b'}' | b']', Some(_)) => Some(Verdict::Broken(LOST_BRACKET)),
                _ => None,
            };
            if verdict.is_some() {
                return (at, verdict);
            }
            at += 1;
        }
        let ends = self.bare && self.complete && self.is_closed();
        (at, ends.then_some(Verdict::End))
    }

    /// Goes to the end of a string, or of `bytes`; an error at a line break.
    fn scan_string(&mut self, bytes: &[u8]) -> Result<usize, usize> {
        let mut at = 0;
        while at < bytes.len() {
            if std::mem::take(&mut self.escaped) {
                if bytes[at] == b'\n' {
                    return Err(at);
                }
                at += 1;
                continue;
            }
            let Some(found) = memchr3(b'"', b'\\', b'\n', &bytes[at..]) else {
                return Ok(bytes.len());
            };
            at += found;
            match bytes[at] {
                b'\n' => return Err(at),
                b'\\' => self.escaped = true,
                _ => {
                    self.in_string = false;
                    return Ok(at + 1);
                }
            }
            at += 1;
        }
        Ok(at)
    }
}

/// Looks for the start of an element where the end of the one before can't be found: a `{` that
/// starts a line, indented as that one was; or, where that one didn't start a line, the `{` of
/// `}, {`.
enum Resume {
    LineStart { indent: usize, spaces: Option<usize> },
    AfterObject { closed: bool, comma: bool },
}

impl Resume {
    fn new(indent: Option<usize>) -> Self {
        match indent {
            Some(indent) => Self::LineStart { indent, spaces: None },
            None => Self::AfterObject { closed: false, comma: false },
        }
    }

    /// Whether an element starts at this byte, the next one.
    fn found(&mut self, byte: u8) -> bool {
        match self {
            Self::LineStart { indent, spaces } => match byte {
                b'\n' => *spaces = Some(0),
                b'{' if *spaces == Some(*indent) => return true,
                b' ' | b'\t' => *spaces = spaces.map(|spaces| spaces + 1),
                _ => *spaces = None,
            },
            Self::AfterObject { closed, comma } => match byte {
                b'{' if *comma => return true,
                b'}' => (*closed, *comma) = (true, false),
                b',' => (*closed, *comma) = (false, *closed),
                _ if byte.is_ascii_whitespace() => {}
                _ => (*closed, *comma) = (false, false),
            },
        }
        false
    }
}

#[cfg(test)]
mod tests;
