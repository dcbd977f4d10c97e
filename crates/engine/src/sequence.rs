//! A sequence: one prompt with what has been generated for it, and where its keys and values lie.
//!
//! Plain data. The scheduler moves it between waiting and running, the block manager hands it blocks.

use crate::block_manager::BlockHash;
use crate::step::{BLOCK_SIZE, BlockId, TokenId};

/// One prompt's state in the engine.
#[derive(Clone, Debug)]
pub struct Sequence {
    id: u64,
    /// The prompt, then the generated tokens.
    token_ids: Vec<TokenId>,
    num_prompt_tokens: usize,
    /// Tokens whose keys and values are in `block_table`.
    pub(crate) num_computed_tokens: usize,
    /// Prompt tokens that prefix caching spared at the first admission; `None` before it.
    pub(crate) num_cached_tokens: Option<usize>,
    /// The blocks that hold its keys and values, in order.
    pub(crate) block_table: Vec<BlockId>,
    /// Chained hashes of its full blocks; grows with the tokens.
    block_hashes: Vec<BlockHash>,
    /// Length beyond which all its keys are rotated otherwise ([`crate::ModelConfig::long_context_beyond`]).
    long_beyond: Option<usize>,
    /// Whether it has grown beyond that since its keys were computed.
    pub(crate) is_outgrown: bool,
}

impl Sequence {
    /// A sequence that has nothing but its prompt.
    pub fn new(id: u64, prompt: Vec<TokenId>) -> Self {
        let mut sequence = Self {
            id,
            num_prompt_tokens: prompt.len(),
            token_ids: prompt,
            num_computed_tokens: 0,
            num_cached_tokens: None,
            block_table: Vec::new(),
            block_hashes: Vec::new(),
            long_beyond: None,
            is_outgrown: false,
        };
        sequence.extend_hashes();
        sequence
    }

    /// A sequence, still without blocks, of a model that rotates all keys otherwise once it has more tokens.
    pub(crate) fn with_long_context_beyond(mut self, num_tokens: Option<usize>) -> Self {
        self.long_beyond = num_tokens;
        self.block_hashes.clear();
        self.extend_hashes();
        self
    }

    /// Makes room for so many tokens more.
    pub(crate) fn with_room_for(mut self, num_tokens: usize) -> Self {
        self.token_ids.reserve(num_tokens);
        let num_blocks = (self.token_ids.len() + num_tokens) / BLOCK_SIZE;
        self.block_hashes.reserve(num_blocks.saturating_sub(self.block_hashes.len()));
        self
    }

    /// Whether it has more tokens than [`crate::ModelConfig::long_context_beyond`].
    pub(crate) fn is_long(&self) -> bool {
        self.long_beyond.is_some_and(|beyond| self.token_ids.len() > beyond)
    }

    /// The caller's name for it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Prompt and generated tokens.
    pub fn token_ids(&self) -> &[TokenId] {
        &self.token_ids
    }

    /// Generated tokens.
    pub fn generated(&self) -> &[TokenId] {
        &self.token_ids[self.num_prompt_tokens..]
    }

    /// Number of tokens of the prompt.
    pub fn num_prompt_tokens(&self) -> usize {
        self.num_prompt_tokens
    }

    /// Number of tokens, generated ones included.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Tokens that are still to be computed; 1 while it decodes.
    pub fn num_remaining_tokens(&self) -> usize {
        self.token_ids.len() - self.num_computed_tokens
    }

    /// Prompt tokens that prefix caching spared.
    pub fn num_cached_tokens(&self) -> usize {
        self.num_cached_tokens.unwrap_or(0)
    }

    /// Appends a generated token.
    pub fn push(&mut self, token: TokenId) {
        let was_long = self.is_long();
        self.token_ids.push(token);
        if self.is_long() && !was_long {
            self.is_outgrown = true;
            self.block_hashes.clear();
        }
        self.extend_hashes();
    }

    /// Hashes of its full blocks.
    pub(crate) fn block_hashes(&self) -> &[BlockHash] {
        &self.block_hashes
    }

    /// Hashes of the blocks that another sequence's may stand in for: full, and not holding its last token,
    /// which must be computed for its logits.
    pub(crate) fn shareable_hashes(&self) -> &[BlockHash] {
        let num_blocks = self.token_ids.len().saturating_sub(1) / BLOCK_SIZE;
        &self.block_hashes[..num_blocks]
    }

    fn extend_hashes(&mut self) {
        let num_full = self.token_ids.len() / BLOCK_SIZE;
        for index in self.block_hashes.len()..num_full {
            let tokens = &self.token_ids[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE];
            // The same tokens have other keys in a long sequence.
            let root = self.is_long().then_some(&BlockHash::LONG);
            let hash = BlockHash::new(self.block_hashes.last().or(root), tokens);
            self.block_hashes.push(hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_token_is_never_shareable() {
        let sequence = Sequence::new(1, (0..32).collect());
        assert_eq!(sequence.block_hashes().len(), 2);
        assert_eq!(sequence.shareable_hashes().len(), 1);
        let sequence = Sequence::new(1, (0..33).collect());
        assert_eq!(sequence.shareable_hashes().len(), 2);
    }

    #[test]
    fn hashes_grow_with_the_tokens_as_if_computed_at_once() {
        let mut grown = Sequence::new(1, (0..5).collect());
        for token in 5..40 {
            grown.push(token);
        }
        let whole = Sequence::new(2, (0..40).collect());
        assert_eq!(grown.block_hashes(), whole.block_hashes());
        assert_eq!(grown.generated().len(), 35);
    }

    #[test]
    fn a_long_sequence_shares_no_block_with_short_ones() {
        let sequence =
            |len| Sequence::new(1, (0..len).collect()).with_long_context_beyond(Some(40));
        let mut grown = sequence(40);
        assert_eq!(grown.block_hashes(), Sequence::new(2, (0..40).collect()).block_hashes());
        grown.push(40);
        assert!(grown.is_outgrown && grown.is_long());
        assert_eq!(grown.block_hashes(), sequence(41).block_hashes());
        assert_ne!(grown.block_hashes()[0], sequence(40).block_hashes()[0]);
    }
}
