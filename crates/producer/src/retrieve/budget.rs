//! Puts documents into a context until its budget of tokens is spent.

use shared::DocumentRef;

use crate::corpus::SEPARATOR;
use crate::error::IndexError;
use crate::tokens::TokenCounter;

use super::{Found, Retriever};

/// A context's text, and what is in it.
#[derive(Default)]
pub(super) struct Assembled {
    pub(super) text: String,
    pub(super) documents: Vec<DocumentRef>,
}

impl Retriever {
    /// Takes documents whole while they fit; the first that doesn't is cut and the last.
    pub(super) fn assemble(&self, found: &[Found]) -> Result<Assembled, IndexError> {
        let mut assembled = Assembled::default();
        let mut left = self.max_tokens;
        for &(document, score) in found {
            let is_first = assembled.documents.is_empty();
            let separator = if is_first { 0 } else { self.counter.separator_tokens() };
            let Some(room) = left.checked_sub(separator) else {
                break;
            };
            let num_tokens = self.index.catalog.num_tokens(document);
            let fits = num_tokens <= room;
            if !fits && room == 0 {
                break;
            }
            let text = self.index.text(document)?;
            let kept =
                if fits { Some(text.as_str()) } else { cut(&self.counter, &text, room, is_first) };
            if let Some(kept) = kept {
                if !is_first {
                    assembled.text.push_str(SEPARATOR);
                }
                assembled.text.push_str(kept);
                assembled.documents.push(self.reference((document, score)));
            }
            if !fits {
                break;
            }
            left = room - num_tokens;
        }
        Ok(assembled)
    }
}

/// The longest start of a document that ends with a line and has at most `max_tokens` tokens;
/// `None` if that is no more than its heading.
///
/// The only document of a context is cut between words where its first line alone is too long:
/// a part of it is better than nothing.
fn cut<'t>(
    counter: &TokenCounter,
    text: &'t str,
    max_tokens: usize,
    between_words: bool,
) -> Option<&'t str> {
    let heading = text.find('\n').unwrap_or(text.len());
    let prefix = counter.prefix(text, max_tokens);
    let fits = |kept: &str| counter.count(kept) <= max_tokens;
    let whole_line = text[prefix.len()..].starts_with('\n').then_some(prefix.len());
    let line_ends = whole_line.into_iter().chain(prefix.rmatch_indices('\n').map(|(end, _)| end));
    let word_ends =
        prefix.rmatch_indices(char::is_whitespace).map(|(end, _)| end).filter(|_| between_words);
    let longest = |ends: &mut dyn Iterator<Item = usize>| {
        ends.map(|end| text[..end].trim_end())
            .take_while(|kept| kept.len() > heading)
            .find(|kept| fits(kept))
    };
    longest(&mut line_ends.into_iter()).or_else(|| longest(&mut word_ends.into_iter()))
}
