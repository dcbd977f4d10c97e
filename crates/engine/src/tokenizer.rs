//! The model's tokenizer: text to tokens and back.
//!
//! A wrapper of `tokenizers` that knows which tokens end an answer, and that can keep text of a user from
//! becoming a control token (see [`Tokenizer::neutralise`]). Whole prompts are made in `prompt`, answers are
//! decoded token by token in `detokenizer`.

mod pieces;
mod special_tokens;

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use serde_json::Value;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::{
    Model, ModelWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    TokenizerImpl,
};

use crate::Error;
use crate::model_files::ModelFiles;
use crate::step::TokenId;

pub(crate) use pieces::Piece;
use pieces::Pieces;
pub(crate) use special_tokens::named_tokens;

/// How often a text is searched again for control tokens that appear once others are broken up.
const MAX_NEUTRALISE_PASSES: usize = 16;
/// Words whose tokens are remembered, in each thread that tokenises. Most of a text is made of far
/// fewer; the default of `tokenizers` takes megabytes a thread.
const WORD_CACHE_CAPACITY: usize = 4096;

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos: BTreeSet<TokenId>,
    /// Left out when decoding.
    special: HashSet<TokenId>,
    /// Added tokens that text of a user must not become.
    control: HashSet<TokenId>,
    /// Tokens of a single byte, `<0x00>` to `<0xFF>`.
    byte_fallback: HashSet<TokenId>,
    /// Whether control tokens are looked for in normalised text.
    normalizes_control: bool,
    /// Tokens of an ordinary letter. Behind them tokens decode as they do in the middle of a text: decoders
    /// treat the beginning of a text differently.
    anchor: Vec<TokenId>,
    /// Whether decoded text loses blanks before punctuation.
    cleans_up: bool,
    /// What tokens were found to be.
    pieces: Pieces,
}

impl Tokenizer {
    /// Loads the tokenizer of a model, of its folder or of its GGUF file: `tokenizer.json` is what counts, and
    /// the tokens that `tokenizer_config.json` names beside it are added, as transformers does.
    pub fn load(model_path: &Path) -> Result<Self, Error> {
        let files = ModelFiles::open(model_path)?;
        let text = files.text("tokenizer.json")?.ok_or_else(|| no_tokenizer(model_path))?;
        let wrong = |error| {
            let name = files.name("tokenizer.json");
            Error::Model(format!("{name} is not a tokenizer: {error}"))
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(text).map_err(wrong)?;
        let config = files.json("tokenizer_config.json")?.unwrap_or_default();
        let map = files.json("special_tokens_map.json")?.unwrap_or_default();
        special_tokens::add_configured(&mut inner, &config, &map).map_err(wrong)?;
        let mut tokenizer = Self::new(inner)?;
        // As in transformers: words of byte-pair vocabularies bring their blanks along.
        tokenizer.cleans_up = config["clean_up_tokenization_spaces"] == true
            && !matches!(tokenizer.inner.get_model(), ModelWrapper::BPE(_));
        // The most particular file that names a token which ends an answer is the one that counts.
        for name in ["generation_config.json", "config.json"] {
            if tokenizer.eos.is_empty()
                && let Some(config) = files.json(name)?
            {
                tokenizer.add_eos(&config);
            }
        }
        if tokenizer.eos.is_empty() {
            tokenizer.add_eos(&config);
        }
        Ok(tokenizer)
    }

    /// Wraps a tokenizer; no token ends an answer yet.
    pub fn new(mut inner: tokenizers::Tokenizer) -> Result<Self, Error> {
        inner.with_truncation(None).map_err(|error| Error::Model(error.to_string()))?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(false);
        bound_word_cache(&mut inner);
        let added = inner.get_added_tokens_decoder();
        let control: HashSet<TokenId> = added
            .iter()
            .filter(|(_, token)| is_control(&token.content))
            .map(|(id, _)| *id)
            .collect();
        let mut tokenizer = Self {
            eos: BTreeSet::new(),
            special: added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect(),
            normalizes_control: control.iter().any(|id| added[id].normalized),
            control,
            byte_fallback: (0..=u8::MAX)
                .filter_map(|byte| inner.token_to_id(&format!("<0x{byte:02X}>")))
                .collect(),
            anchor: Vec::new(),
            cleans_up: false,
            pieces: Pieces::default(),
            inner,
        };
        tokenizer.anchor = tokenizer.find_anchor();
        Ok(tokenizer)
    }

    /// Tokens of a text in which control tokens are recognised.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, Error> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(cannot_encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Number of tokens of a text.
    pub fn count(&self, text: &str) -> Result<usize, Error> {
        Ok(self.encode(text, false)?.len())
    }

    /// Text of tokens, without special ones.
    pub fn decode(&self, token_ids: &[TokenId]) -> Result<String, Error> {
        let text = self.decode_raw(token_ids)?;
        Ok(if self.cleans_up { clean_up(&text) } else { text })
    }

    /// Text of tokens, without special ones, before blanks are cleaned up.
    pub(crate) fn decode_raw(&self, token_ids: &[TokenId]) -> Result<String, Error> {
        self.inner
            .decode(token_ids, true)
            .map_err(|error| Error::Input(format!("the tokens cannot be decoded: {error}")))
    }

    /// Text of tokens, without special ones, as it is in the middle of a text, before blanks are cleaned
    /// up.
    pub(crate) fn decode_inside(&self, token_ids: &[TokenId]) -> Result<String, Error> {
        let before = self.decode_raw(&self.anchor)?;
        let whole = self.decode_raw(&[&self.anchor, token_ids].concat())?;
        Ok(whole.strip_prefix(&before).unwrap_or(&whole).to_owned())
    }

    /// Text of one token as it is in the middle of a text; that of a special token is its name.
    pub fn token_text(&self, token: TokenId) -> String {
        let text = if self.is_special(token) {
            self.token(token)
        } else {
            self.decode_inside(&[token]).ok()
        };
        text.unwrap_or_default()
    }

    /// Whether the token ends an answer.
    pub fn is_eos(&self, token: TokenId) -> bool {
        self.eos.contains(&token)
    }

    /// The tokens that end an answer.
    pub fn eos_token_ids(&self) -> impl Iterator<Item = TokenId> + '_ {
        self.eos.iter().copied()
    }

    /// A token as the vocabulary writes it; `None` if there is none of this id.
    pub fn token(&self, id: TokenId) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether decoding leaves the token out: special ones, and those of ids that a model has and its vocabulary
    /// lacks.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.special.contains(&token) || self.token(token).is_none()
    }

    /// Whether decoded text goes through [`clean_up`].
    pub(crate) fn cleans_up(&self) -> bool {
        self.cleans_up
    }

    /// Calls `take` with what the token is in the middle of a text.
    pub(crate) fn with_piece<R>(
        &self,
        token: TokenId,
        take: impl FnOnce(&Piece) -> R,
    ) -> Result<R, Error> {
        let make = || {
            Ok(if self.is_special(token) {
                Piece::Special
            } else if self.byte_fallback.contains(&token) {
                Piece::Byte
            } else {
                Piece::Text(self.decode_inside(&[token])?.into())
            })
        };
        self.pieces.with(token, make, take)
    }

    /// The text with marks inside everything that would become a control token, so that it no longer does.
    /// [`Self::encode_marked`] leaves the marks out again.
    pub(crate) fn neutralise(&self, text: &str, mark: char) -> Result<String, Error> {
        let mut marked = text.to_owned();
        for _ in 0..MAX_NEUTRALISE_PASSES {
            let found = self.find_control(&marked);
            if found.is_empty() {
                return Ok(marked);
            }
            let mut broken = String::with_capacity(marked.len() + 16);
            let mut end = 0;
            for (_, range) in found {
                broken.push_str(&marked[end..range.0]);
                for character in marked[range.0..range.1].chars() {
                    broken.push(character);
                    broken.push(mark);
                }
                end = range.1;
            }
            broken.push_str(&marked[end..]);
            marked = broken;
        }
        Err(Error::Reject(
            "the text contains what only a control token of the model may say".into(),
        ))
    }

    /// The control tokens that a text becomes.
    pub(crate) fn control_tokens(&self, text: &str) -> Vec<TokenId> {
        self.find_control(text).into_iter().map(|(id, _)| id).collect()
    }

    /// Tokens of a text with marks: control tokens are recognised where no mark is in the way, everything
    /// else is tokenised as if there were no marks. Without marks this is [`Self::encode`].
    pub(crate) fn encode_marked(
        &self,
        text: &str,
        mark: char,
        add_special_tokens: bool,
    ) -> Result<Vec<TokenId>, Error> {
        if !text.contains(mark) {
            return self.encode(text, add_special_tokens);
        }
        // The stages of `encode`, with one more: the marks go once the control tokens are found.
        let inner: &TokenizerImpl<_, _, _, _, _> = &self.inner;
        let mut pieces =
            inner.get_added_vocabulary().extract_and_normalize(inner.get_normalizer(), text);
        let unmark = |_, mut piece: tokenizers::NormalizedString| {
            if piece.get().chars().all(|character| character == mark) {
                return Ok(Vec::new());
            }
            piece.filter(|character| character != mark);
            Ok(vec![piece])
        };
        pieces.split(unmark).map_err(cannot_encode)?;
        if let Some(pre_tokenizer) = inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(cannot_encode)?;
        }
        let model = inner.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get())).map_err(cannot_encode)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(cannot_encode)?;
        let encoding =
            inner.post_process(encoding, None, add_special_tokens).map_err(cannot_encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Control tokens in a text, with the bytes they come from.
    fn find_control(&self, text: &str) -> Vec<(TokenId, (usize, usize))> {
        let vocabulary = self.inner.get_added_vocabulary();
        let normalizer: Option<&NormalizerWrapper> =
            self.inner.get_normalizer().filter(|_| self.normalizes_control);
        let pieces: PreTokenizedString = vocabulary.extract_and_normalize(normalizer, text);
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let tokens = splits.into_iter().filter_map(|(_, range, tokens)| {
            let id = tokens.as_ref()?.first()?.id;
            self.control.contains(&id).then_some((id, range))
        });
        tokens.collect()
    }

    /// Adds the end-of-sequence tokens that a configuration file names, by id or by text.
    fn add_eos(&mut self, config: &Value) {
        let ids = &config["eos_token_id"];
        let one = std::slice::from_ref(ids);
        let ids = ids.as_array().map_or(one, Vec::as_slice);
        self.eos.extend(ids.iter().filter_map(|id| TokenId::try_from(id.as_u64()?).ok()));
        if let Some(content) = special_tokens::content(&config["eos_token"]) {
            self.eos.extend(self.inner.token_to_id(content));
        }
    }

    fn find_anchor(&self) -> Vec<TokenId> {
        let anchor = self.encode("a", false).unwrap_or_default();
        let text = self.decode_raw(&anchor).unwrap_or_default();
        let twice = self.decode_raw(&[anchor.clone(), anchor.clone()].concat()).unwrap_or_default();
        if text.trim() == "a" && twice.starts_with(&text) { anchor } else { Vec::new() }
    }
}

/// The text without blanks before punctuation and contractions, as transformers cleans it up.
pub(crate) fn clean_up(text: &str) -> String {
    const UNWANTED: [&str; 10] =
        [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"];
    UNWANTED.iter().fold(text.to_owned(), |text, unwanted| {
        if text.contains(unwanted) { text.replace(unwanted, unwanted.trim()) } else { text }
    })
}

/// Why a folder without `tokenizer.json` can't be used.
fn no_tokenizer(model_path: &Path) -> Error {
    let others = ["tokenizer.model", "vocab.json", "tekken.json", "vocab.txt"];
    let found = others.into_iter().find(|name| model_path.join(name).is_file());
    let found = found.map_or_else(String::new, |name| {
        format!(", only {name}; AutoTokenizer.from_pretrained and save_pretrained write it")
    });
    Error::Model(format!("{} has no tokenizer.json{found}", model_path.display()))
}

/// Makes the word cache small. The model inside can't be changed in place, so this copies it once.
fn bound_word_cache(tokenizer: &mut tokenizers::Tokenizer) {
    if matches!(tokenizer.get_model(), ModelWrapper::BPE(_) | ModelWrapper::Unigram(_)) {
        let mut model = tokenizer.get_model().clone();
        model.resize_cache(WORD_CACHE_CAPACITY);
        tokenizer.with_model(model);
    }
}

/// Whether text of a user must not become this added token. Runs of white space and single characters are
/// text like any other; models are trained with them inside of text.
fn is_control(content: &str) -> bool {
    let is_blank = |character: char| character.is_whitespace() || character == '\u{2581}';
    content.chars().count() > 1 && !content.chars().all(is_blank)
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err takes")]
fn cannot_encode(error: tokenizers::Error) -> Error {
    Error::Reject(format!("the text cannot be tokenised: {error}"))
}
