//! How documentation and questions about code are split into the terms that are searched.
//!
//! `np.sortArray_by` gives the whole name, its parts between the dots, and the pieces of those
//! between underscores and capitals, all in lower case; a plural `s` is taken off a piece. A
//! question finds `numpy.argsort` by its full name as by `argsort` alone. No query syntax: every
//! sign that is no letter or digit only separates.

use tantivy::tokenizer::{Token, TokenStream, Tokenizer};

/// Longest term in bytes; a longer one is data, not a word.
const MAX_TERM_BYTES: usize = 128;

/// Words that say nothing about what a question is about.
const STOP_WORDS: [&str; 71] = [
    "a", "about", "all", "am", "an", "and", "any", "are", "as", "at", "be", "been", "but", "by",
    "can", "could", "did", "do", "does", "doing", "explain", "for", "from", "had", "has", "have",
    "how", "i", "if", "in", "into", "is", "it", "its", "me", "my", "of", "on", "or", "our",
    "please", "should", "so", "some", "such", "tell", "than", "that", "the", "their", "them",
    "then", "there", "these", "they", "this", "those", "to", "was", "we", "were", "what", "when",
    "where", "which", "who", "why", "will", "with", "would", "you",
];

/// The analyser, in the form the full-text index takes it.
#[derive(Clone, Default)]
pub(crate) struct CodeTokenizer {
    token: Token,
    spans: Vec<Span>,
}

/// A term's place in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: usize,
    end: usize,
    /// Whether it is a single word, whose plural is taken off.
    is_word: bool,
}

impl Tokenizer for CodeTokenizer {
    type TokenStream<'a> = CodeTokenStream<'a>;

    fn token_stream<'a>(&'a mut self, text: &'a str) -> CodeTokenStream<'a> {
        self.token.reset();
        self.spans.clear();
        split(text, &mut self.spans);
        CodeTokenStream { text, token: &mut self.token, spans: self.spans.iter() }
    }
}

/// The terms of one text.
pub(crate) struct CodeTokenStream<'a> {
    text: &'a str,
    token: &'a mut Token,
    spans: std::slice::Iter<'a, Span>,
}

impl TokenStream for CodeTokenStream<'_> {
    fn advance(&mut self) -> bool {
        let Some(span) = self.spans.next() else {
            return false;
        };
        self.token.position = self.token.position.wrapping_add(1);
        self.token.offset_from = span.start;
        self.token.offset_to = span.end;
        self.token.text.clear();
        normalise(&self.text[span.start..span.end], span.is_word, &mut self.token.text);
        true
    }

    fn token(&self) -> &Token {
        self.token
    }

    fn token_mut(&mut self) -> &mut Token {
        self.token
    }
}

/// The terms of a question, each once, in its order; words like "what" and "does" only where it
/// has no others.
pub(crate) fn query_terms(text: &str, max_terms: usize) -> Vec<String> {
    let mut spans = Vec::new();
    split(text, &mut spans);
    let mut seen = std::collections::HashSet::new();
    let (mut terms, mut stop_words) = (Vec::new(), Vec::new());
    for span in spans {
        let mut term = String::new();
        let word = &text[span.start..span.end];
        normalise(word, span.is_word, &mut term);
        if !seen.insert(term.clone()) {
            continue;
        }
        let lower = word.to_lowercase();
        if STOP_WORDS.binary_search(&lower.as_str()).is_ok() {
            stop_words.push(term);
        } else {
            terms.push(term);
        }
    }
    let mut chosen = if terms.is_empty() { stop_words } else { terms };
    chosen.truncate(max_terms);
    chosen
}

fn normalise(text: &str, is_word: bool, term: &mut String) {
    for c in text.chars() {
        if c.is_ascii() {
            term.push(c.to_ascii_lowercase());
        } else {
            term.extend(c.to_lowercase());
        }
    }
    let is_plural = is_word
        && term.len() > 3
        && term.ends_with('s')
        && !["ss", "us", "is"].iter().any(|end| term.ends_with(end));
    if is_plural {
        term.pop();
    }
}

fn split(text: &str, spans: &mut Vec<Span>) {
    let mut word_start = None;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let ideograph = is_ideograph(c);
        let joins = (c == '.' || c == '_' || c.is_alphanumeric()) && !ideograph;
        if joins && word_start.is_none() && c != '.' {
            word_start = Some(at);
        }
        let next = chars.peek();
        let goes_on = joins
            && next.is_some_and(|&(_, next)| {
                let name = next == '_' || next.is_alphanumeric();
                (name && !is_ideograph(next)) || (next == '.' && c != '.')
            });
        if !goes_on && let Some(start) = word_start.take() {
            let end = if joins { at + c.len_utf8() } else { at };
            split_name(text, start, end, spans);
        }
        if ideograph {
            push(at, at + c.len_utf8(), true, spans);
        }
    }
}

/// Scripts without spaces between the words: each sign is a term.
fn is_ideograph(c: char) -> bool {
    matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

/// A name such as `np.random.default_rng`, whole and in parts.
fn split_name(text: &str, start: usize, end: usize, spans: &mut Vec<Span>) {
    let end = start + text[start..end].trim_end_matches('.').len();
    let name = &text[start..end];
    if name.contains('.') {
        push(start, end, false, spans);
    }
    let mut at = start;
    for part in name.split('.') {
        let before = spans.len();
        split_part(text, at, at + part.len(), spans);
        let is_whole = matches!(spans[before..], [Span { start, end, .. }]
            if (start, end) == (at, at + part.len()));
        if !is_whole {
            push(at, at + part.len(), false, spans);
        }
        at += part.len() + 1;
    }
}

/// The pieces of a name between underscores and capitals.
fn split_part(text: &str, start: usize, end: usize, spans: &mut Vec<Span>) {
    let mut piece = start;
    let mut before: Option<char> = None;
    let mut chars = text[start..end].char_indices().peekable();
    while let Some((offset, c)) = chars.next() {
        let at = start + offset;
        let capital = c.is_uppercase()
            && before.is_some_and(|before| {
                let next_is_small = chars.peek().is_some_and(|(_, next)| next.is_lowercase());
                !before.is_uppercase() || next_is_small
            });
        if c == '_' || capital {
            push(piece, at, true, spans);
            piece = if c == '_' { at + 1 } else { at };
        }
        before = (c != '_').then_some(c);
    }
    push(piece, end, true, spans);
}

fn push(start: usize, end: usize, is_word: bool, spans: &mut Vec<Span>) {
    if start < end && end - start <= MAX_TERM_BYTES {
        spans.push(Span { start, end, is_word });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(text: &str) -> Vec<String> {
        let mut tokenizer = CodeTokenizer::default();
        let mut stream = tokenizer.token_stream(text);
        let mut terms = Vec::new();
        while stream.advance() {
            terms.push(stream.token().text.clone());
        }
        terms
    }

    #[test]
    fn names_are_kept_whole_and_split() {
        assert_eq!(terms("argsort"), ["argsort"]);
        assert_eq!(
            terms("np.default_rng"),
            ["np.default_rng", "np", "default", "rng", "default_rng"]
        );
        assert_eq!(terms("pd.DataFrame"), ["pd.dataframe", "pd", "data", "frame", "dataframe"]);
        assert_eq!(terms("HTTPServer2Go"), ["http", "server2", "go", "httpserver2go"]);
        assert_eq!(terms("__init__"), ["init", "__init__"]);
        assert_eq!(terms("float32"), ["float32"]);
    }

    #[test]
    fn signs_only_separate() {
        assert_eq!(
            terms("Use `a.b(x, y)`. +path:\"z\"~2 AND (q..."),
            ["use", "a.b", "a", "b", "x", "y", "path", "z", "2", "and", "q"]
        );
        assert_eq!(terms("... ._. é.Ü"), ["_", "é.ü", "é", "ü"]);
    }

    #[test]
    fn plurals_of_words_meet_their_singulars() {
        assert_eq!(
            terms("arrays array axis class status"),
            ["array", "array", "axis", "class", "status"]
        );
    }

    #[test]
    fn scripts_without_spaces_give_a_term_a_sign() {
        assert_eq!(terms("数组sort"), ["数", "组", "sort"]);
    }

    #[test]
    fn questions_lose_their_empty_words_unless_they_have_no_others() {
        assert!(STOP_WORDS.is_sorted());
        assert_eq!(
            query_terms("What does numpy.argsort do? argsort", 9),
            ["numpy.argsort", "numpy", "argsort"]
        );
        assert_eq!(query_terms("What is this?", 9), ["what", "is", "this"]);
        assert_eq!(query_terms("alpha beta gamma", 2), ["alpha", "beta"]);
    }
}
