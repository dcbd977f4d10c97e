//! The texts of single tokens, remembered: an answer is decoded without asking the tokenizer again for a token
//! that came before.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use crate::Error;
use crate::step::TokenId;

/// What tokens are in the middle of a text; shared by all answers.
#[derive(Debug, Default)]
pub(super) struct Pieces(RwLock<HashMap<TokenId, Piece>>);

/// What a token is in the middle of a text.
#[derive(Clone, Debug)]
pub(crate) enum Piece {
    /// Nothing: it is special.
    Special,
    /// One byte of a character.
    Byte,
    /// A text, or a part of a character, which ends with U+FFFD.
    Text(Box<str>),
}

impl Pieces {
    /// Calls `take` with the token's piece, which `make` makes the first time.
    pub(super) fn with<R>(
        &self,
        token: TokenId,
        make: impl FnOnce() -> Result<Piece, Error>,
        take: impl FnOnce(&Piece) -> R,
    ) -> Result<R, Error> {
        // A panic of another thread leaves whole pieces.
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(piece) = known.get(&token) {
            return Ok(take(piece));
        }
        drop(known);
        let piece = make()?;
        let taken = take(&piece);
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(token, piece);
        Ok(taken)
    }
}
