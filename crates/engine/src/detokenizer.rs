//! The detokenizer: an answer's text, token by token.
//!
//! Characters of several tokens are held back until they are complete, and special tokens are left out, so
//! that the text so far never changes. It also finds the stop strings, wherever the tokens' borders are.
//! The cost of a token does not depend on the length of the answer. One lives for each running sequence.

use std::sync::Arc;

use crate::Error;
use crate::step::TokenId;
use crate::tokenizer::Tokenizer;

/// Tokens that may wait for a character to be complete. Four bytes are enough for a character; more are waited
/// for because decoders judge a run of byte tokens as a whole.
const MAX_HELD_BACK: usize = 32;

/// Decodes one answer.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    stop: Vec<String>,
    text: String,
    /// The tokens that are not in `text` yet.
    held_back: Vec<TokenId>,
}

impl Detokenizer {
    /// A detokenizer that looks for these stop strings.
    pub fn new(tokenizer: Arc<Tokenizer>, stop: Vec<String>) -> Self {
        Self { tokenizer, stop, text: String::new(), held_back: Vec::new() }
    }

    /// Takes a token; `true` if the text has come to a stop string, behind which it ends.
    pub fn push(&mut self, token: TokenId) -> Result<bool, Error> {
        if self.tokenizer.is_special(token) {
            return Ok(false);
        }
        self.held_back.push(token);
        let may_wait = self.held_back.len() < MAX_HELD_BACK;
        if may_wait && self.tokenizer.is_byte_fallback(token) {
            return Ok(false);
        }
        let piece = self.decode_held_back()?;
        let is_open = piece.ends_with(char::REPLACEMENT_CHARACTER);
        // Where waiting was in vain, a character that has just begun gets the rest of its bytes all the same.
        if (may_wait && (is_open || piece.is_empty()))
            || (is_open && self.held_back.len() < MAX_HELD_BACK + 4)
        {
            return Ok(false);
        }
        Ok(self.accept(&piece))
    }

    /// Ends the text: what is held back becomes part of it, incomplete characters as U+FFFD. `true` if that
    /// brought a stop string.
    pub fn finish(&mut self) -> Result<bool, Error> {
        let piece = self.decode_held_back()?;
        Ok(self.accept(&piece))
    }

    /// The text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The text.
    pub fn into_text(self) -> String {
        self.text
    }

    /// Text of the tokens held back, as it is behind the text so far.
    fn decode_held_back(&self) -> Result<String, Error> {
        let anchor = self.tokenizer.anchor();
        if self.text.is_empty() || anchor.is_empty() {
            return self.tokenizer.decode(&self.held_back);
        }
        let before = self.tokenizer.decode(anchor)?;
        let whole = self.tokenizer.decode(&[anchor, &self.held_back].concat())?;
        Ok(whole.strip_prefix(&before).unwrap_or(&whole).to_owned())
    }

    /// Appends a piece and cuts the text at the first stop string.
    fn accept(&mut self, piece: &str) -> bool {
        self.held_back.clear();
        let longest = self.stop.iter().map(String::len).max().unwrap_or(0);
        // A stop string in the new text begins at most this far in the old.
        let start = self.text.floor_char_boundary(self.text.len().saturating_sub(longest));
        self.text.push_str(piece);
        let found =
            self.stop.iter().filter_map(|stop| self.text[start..].find(stop.as_str())).min();
        if let Some(at) = found {
            self.text.truncate(start + at);
        }
        found.is_some()
    }
}
