//! Counting tokens: what a context may cost. Not for inference; the engine has its own tokenizer.

use tokenizers::{ModelWrapper, Tokenizer};

use crate::error::Error;
use crate::index::fingerprint::hex_sha256;

/// Characters that count as one token where there is no tokenizer.
const CHARS_PER_TOKEN: usize = 4;
/// Words whose tokens are remembered, in each thread that counts.
const WORD_CACHE_CAPACITY: usize = 4096;

/// Counts the tokens of a text: with a model's own tokenizer, or by an estimate of one token for
/// every four characters, begun ones included.
pub struct TokenCounter {
    tokenizer: Option<Tokenizer>,
    identity: String,
    separator_tokens: usize,
}

impl TokenCounter {
    /// Counts by the estimate.
    pub fn estimate() -> Self {
        Self::new(None, format!("chars/{CHARS_PER_TOKEN}"))
    }

    /// Counts with the tokenizer of this `tokenizer.json`, special tokens left out.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let mut tokenizer =
            Tokenizer::from_bytes(text).map_err(|error| Error::Tokenizer(error.to_string()))?;
        // A file may carry the cut and the padding of its training.
        tokenizer.with_padding(None);
        // The model inside can't be changed in place.
        if matches!(tokenizer.get_model(), ModelWrapper::BPE(_) | ModelWrapper::Unigram(_)) {
            let mut model = tokenizer.get_model().clone();
            model.resize_cache(WORD_CACHE_CAPACITY);
            tokenizer.with_model(model);
        }
        if tokenizer.with_truncation(None).is_err() {
            tracing::warn!("the tokenizer keeps its truncation, long documents count as short");
        }
        Ok(Self::new(Some(tokenizer), hex_sha256(text.as_bytes())))
    }

    fn new(tokenizer: Option<Tokenizer>, identity: String) -> Self {
        let mut counter = Self { tokenizer, identity, separator_tokens: 0 };
        // Between two texts it can be more tokens than alone.
        let separator = crate::corpus::SEPARATOR;
        let between = counter.count(&format!("a{separator}#"));
        let around = counter.count("a") + counter.count("#");
        counter.separator_tokens = between.saturating_sub(around).max(counter.count(separator));
        counter
    }

    /// Tells two counters apart that count differently.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Tokens of what stands between two documents.
    pub(crate) fn separator_tokens(&self) -> usize {
        self.separator_tokens
    }

    /// Number of tokens in `text`.
    pub fn count(&self, text: &str) -> usize {
        self.tokenizer
            .as_ref()
            .and_then(|tokenizer| tokenizer.encode_fast(text, false).ok())
            .map_or_else(
                || text.chars().count().div_ceil(CHARS_PER_TOKEN),
                |encoding| encoding.len(),
            )
    }

    /// The longest start of `text`, cut between characters, that has at most `max_tokens` tokens,
    /// or a little more: cutting can change how the end is tokenised, so count what you keep.
    pub(crate) fn prefix<'t>(&self, text: &'t str, max_tokens: usize) -> &'t str {
        let encoding =
            self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.encode(text, false).ok());
        let end = match encoding {
            Some(encoding) if encoding.len() <= max_tokens => text.len(),
            Some(encoding) => {
                encoding.get_offsets().get(max_tokens).map_or(text.len(), |offsets| offsets.0)
            }
            None => text
                .char_indices()
                .nth(max_tokens.saturating_mul(CHARS_PER_TOKEN))
                .map_or(text.len(), |(at, _)| at),
        };
        &text[..text.floor_char_boundary(end)]
    }
}
