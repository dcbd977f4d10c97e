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
use crate::tokenizer::Tokenizer;

/// Tokens that may wait for a character to be complete. Four bytes are enough for a character; more are waited
/// for because decoders judge a run of byte tokens as a whole.
const MAX_HELD_BACK: usize = 32;

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
            clean_up,
            has_begun: false,
        }
    }

    /// Leaves alone the stop strings that the first tokens, fewer than `min_tokens`, complete.
    pub fn with_min_tokens(self, min_tokens: usize) -> Self {
        Self { min_tokens, ..self }
    }

    /// Takes a token; `true` if the text has come to a stop string, behind which it ends.
    pub fn push(&mut self, token: TokenId) -> Result<bool, Error> {
        self.num_tokens += 1;
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
        self.has_begun |= !piece.is_empty();
        let piece = match &mut self.clean_up {
            Some(clean_up) => clean_up.push(&piece),
            None => piece,
        };
        Ok(self.accept(&piece))
    }

    /// Ends the text: what is held back becomes part of it, incomplete characters as U+FFFD. `true` if that
    /// brought a stop string.
    pub fn finish(&mut self) -> Result<bool, Error> {
        let mut piece = self.decode_held_back()?;
        if let Some(clean_up) = &mut self.clean_up {
            piece = clean_up.finish(&piece);
        }
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
        if !self.has_begun {
            return self.tokenizer.decode_raw(&self.held_back);
        }
        self.tokenizer.decode_inside(&self.held_back)
    }

    /// Appends a piece and cuts the text at the first stop string that it completes.
    fn accept(&mut self, piece: &str) -> bool {
        self.held_back.clear();
        let old = self.text.len();
        self.text.push_str(piece);
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
