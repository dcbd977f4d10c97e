//! The detokenizer: an answer's text, token by token.
//!
//! Characters of several tokens are held back until they are complete, and special tokens are left out, so
//! that the text so far never changes. It also finds the stop strings, wherever the tokens' borders are.
//! The cost of a token does not depend on the length of the answer. One lives for each running sequence.

mod clean_up;

use std::sync::Arc;

use clean_up::CleanUp;

use crate::Error;
use crate::step::TokenId;
use crate::tokenizer::{Piece, Tokenizer};

/// Tokens that may wait for a character to be complete. Four bytes are enough for a character; more are waited
/// for because decoders judge a run of byte tokens as a whole.
const MAX_HELD_BACK: usize = 32;

/// Room for a token's text.
const BYTES_PER_TOKEN: usize = 4;

/// What a token was found to be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Special,
    Byte,
    Text,
}

/// Decodes one answer.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    stop: Vec<String>,
    /// Tokens before which no stop string ends the text.
    min_tokens: usize,
    num_tokens: usize,
    text: String,
    /// The tokens that are not in `text` yet.
    held_back: Vec<TokenId>,
    /// Their text.
    piece: String,
    /// Takes blanks out of the text, for tokenizers that want it.
    clean_up: Option<CleanUp>,
    /// Whether tokens have become text.
    has_begun: bool,
}

impl Detokenizer {
    /// A detokenizer that looks for these stop strings.
    pub fn new(tokenizer: Arc<Tokenizer>, stop: Vec<String>) -> Self {
        let clean_up = tokenizer.cleans_up().then(CleanUp::default);
        Self {
            tokenizer,
            stop,
            min_tokens: 0,
            num_tokens: 0,
            text: String::new(),
            held_back: Vec::new(),
            piece: String::new(),
            clean_up,
            has_begun: false,
        }
    }

    /// Leaves alone the stop strings that the first tokens, fewer than `min_tokens`, complete.
    pub fn with_min_tokens(self, min_tokens: usize) -> Self {
        Self { min_tokens, ..self }
    }

    /// Makes room for the text of so many tokens.
    pub(crate) fn reserve(&mut self, num_tokens: usize) {
        self.text.reserve(num_tokens * BYTES_PER_TOKEN);
        self.held_back.reserve(BYTES_PER_TOKEN);
        self.piece.reserve(MAX_HELD_BACK);
    }

    /// Takes a token; `true` if the text has come to a stop string, behind which it ends.
    pub fn push(&mut self, token: TokenId) -> Result<bool, Error> {
        self.num_tokens += 1;
        self.piece.clear();
        let piece = &mut self.piece;
        let found = self.tokenizer.with_piece(token, |found| match found {
            Piece::Special => Found::Special,
            Piece::Byte => Found::Byte,
            Piece::Text(text) => {
                piece.push_str(text);
                Found::Text
            }
        })?;
        if found == Found::Special {
            return Ok(false);
        }
        self.held_back.push(token);
        let may_wait = self.held_back.len() < MAX_HELD_BACK;
        if may_wait && found == Found::Byte {
            return Ok(false);
        }
        // A token alone, in the middle of the text, is its piece.
        if !self.has_begun || self.held_back.len() > 1 || found == Found::Byte {
            self.piece = self.decode_held_back()?;
        }
        let is_open = self.piece.ends_with(char::REPLACEMENT_CHARACTER);
        // Where waiting was in vain, a character that has just begun gets the rest of its bytes all the same.
        if (may_wait && (is_open || self.piece.is_empty()))
            || (is_open && self.held_back.len() < MAX_HELD_BACK + 4)
        {
            return Ok(false);
        }
        self.has_begun |= !self.piece.is_empty();
        if let Some(clean_up) = &mut self.clean_up {
            self.piece = clean_up.push(&self.piece);
        }
        Ok(self.accept())
    }

    /// Ends the text: what is held back becomes part of it, incomplete characters as U+FFFD. `true` if that
    /// brought a stop string.
    pub fn finish(&mut self) -> Result<bool, Error> {
        self.piece = self.decode_held_back()?;
        if let Some(clean_up) = &mut self.clean_up {
            self.piece = clean_up.finish(&self.piece);
        }
        Ok(self.accept())
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
        if !self.has_begun {
            return self.tokenizer.decode_raw(&self.held_back);
        }
        self.tokenizer.decode_inside(&self.held_back)
    }

    /// Appends the piece and cuts the text at the first stop string that it completes.
    fn accept(&mut self) -> bool {
        self.held_back.clear();
        let old = self.text.len();
        self.text.push_str(&self.piece);
        if self.num_tokens < self.min_tokens {
            return false;
        }
        let find = |stop: &String| {
            let start = self.text.ceil_char_boundary((old + 1).saturating_sub(stop.len()));
            Some(start + self.text[start..].find(stop.as_str())?)
        };
        let found = self.stop.iter().filter_map(find).min();
        if let Some(at) = found {
            self.text.truncate(at);
        }
        found.is_some()
    }
}
