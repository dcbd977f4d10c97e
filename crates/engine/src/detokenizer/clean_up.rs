//! Blanks taken out of an answer piece by piece, as [`clean_up`] takes them out of the whole.

use crate::tokenizer::clean_up;

/// Text that may still lose a blank.
#[derive(Debug, Default)]
pub(super) struct CleanUp {
    pending: String,
}

impl CleanUp {
    /// Takes a piece; gives back what no later one changes.
    pub(super) fn push(&mut self, piece: &str) -> String {
        self.pending.push_str(piece);
        let rest = self.pending.split_off(self.settled());
        clean_up(&std::mem::replace(&mut self.pending, rest))
    }

    /// Takes the last piece; gives back the rest.
    pub(super) fn finish(&mut self, piece: &str) -> String {
        self.pending.push_str(piece);
        clean_up(&std::mem::take(&mut self.pending))
    }

    /// Where the text can be cut: before a blank, since what is taken out begins with one. An apostrophe at
    /// either side belongs together with both.
    fn settled(&self) -> usize {
        let bytes = self.pending.as_bytes();
        let is_border = |at: &usize| {
            let (before, behind) = (bytes[at - 1], bytes.get(at + 1));
            bytes[*at] == b' ' && before != b'\'' && behind.is_some_and(|byte| *byte != b'\'')
        };
        (1..bytes.len()).rev().find(is_border).unwrap_or(0)
    }
}
