//! Any text as one token of a queue's subject, key or name, and back.
//!
//! Names of models and runs are the user's: they may hold dots, wildcards, spaces, anything. Not for
//! ids of jobs, which never become part of a subject.

use std::fmt::Write as _;

/// Stands before the two hexadecimal digits of a byte, and alone for the empty text.
const ESCAPE: char = '=';

/// `text` with every byte but letters, digits, `-` and `_` written as `=` and two digits.
pub fn encode(text: &str) -> String {
    if text.is_empty() {
        return ESCAPE.to_string();
    }
    let mut token = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            token.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _written = write!(token, "{ESCAPE}{byte:02X}");
        }
    }
    token
}

/// The text that [`encode`] made `token` of; `None` if it made no such token.
pub fn decode(token: &str) -> Option<String> {
    if token.len() == 1 && token.starts_with(ESCAPE) {
        return Some(String::new());
    }
    let mut bytes = Vec::with_capacity(token.len());
    let mut rest = token.bytes();
    while let Some(byte) = rest.next() {
        if byte == ESCAPE as u8 {
            let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
            let (high, low) = (digit(rest.next())?, digit(rest.next())?);
            bytes.push(u8::try_from(high << 4 | low).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    let text = String::from_utf8(bytes).ok()?;
    // One spelling a text: what others write differently is none of ours.
    (encode(&text) == token).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_comes_back_from_a_plain_token() {
        let texts =
            ["", "run-1_b", "a.b", "*", ">", "two words", "línea\n", "=", "=3D", "日本", "\0"];
        for text in texts {
            let token = encode(text);
            assert!(!token.is_empty());
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_=".contains(c);
            assert!(token.chars().all(plain), "{token}");
            assert_eq!(decode(&token).as_deref(), Some(text));
        }
        assert_eq!(encode("flotilla-reader"), "flotilla-reader");
        assert_eq!(encode("a.b"), "a=2Eb");
    }

    #[test]
    fn foreign_tokens_are_no_text() {
        for token in ["", "=2", "=2e", "=ZZ", "=41", "=FF", "a b"] {
            assert_eq!(decode(token), None, "{token}");
        }
    }
}
