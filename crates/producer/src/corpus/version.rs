//! Versions of packages, and which of two is newer.

use std::cmp::Ordering;
use std::fmt;

/// A version as its package writes it, ordered by age.
///
/// Numbers count as numbers, missing parts as zero (`1.2` is `1.2.0`), a leading `v` as nothing;
/// `dev`, `alpha`, `beta` and `rc` come before the release, `post` after it.
#[derive(Clone, Debug)]
pub struct Version {
    text: String,
    parts: Vec<Part>,
}

/// Ordered by age; a missing part counts as zero.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Dev,
    Alpha,
    Beta,
    Candidate,
    Other(String),
    Zero,
    Post,
    /// Of 1 or more.
    Number(u64),
}

impl Version {
    /// Reads any text.
    pub fn new(text: &str) -> Self {
        let text = text.trim().to_owned();
        let lower = text.to_lowercase();
        let lower = lower.strip_prefix('v').unwrap_or(&lower);
        let mut parts = Vec::new();
        let mut rest = lower;
        if lower.starts_with(|c: char| !c.is_alphanumeric()) {
            // Such as `>=1.2`, which is no version and equals none.
            parts.push(Part::Other(lower.to_owned()));
            rest = "";
        }
        while let Some(first) = rest.chars().next() {
            let same = |c: char| {
                c.is_ascii_digit() == first.is_ascii_digit()
                    && c.is_alphanumeric() == first.is_alphanumeric()
            };
            let end = rest.find(|c| !same(c)).unwrap_or(rest.len());
            let (part, after) = rest.split_at(end);
            rest = after;
            if first.is_alphanumeric() {
                parts.push(Self::part(part));
            }
        }
        while parts.last() == Some(&Part::Zero) {
            parts.pop();
        }
        Self { text, parts }
    }

    fn part(text: &str) -> Part {
        match text {
            "dev" => Part::Dev,
            "a" | "alpha" => Part::Alpha,
            "b" | "beta" => Part::Beta,
            "rc" | "c" | "pre" | "preview" => Part::Candidate,
            "post" | "r" | "rev" => Part::Post,
            _ => match text.parse() {
                Ok(0) => Part::Zero,
                Ok(number) => Part::Number(number),
                Err(_) => Part::Other(text.to_owned()),
            },
        }
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        let len = self.parts.len().max(other.parts.len());
        (0..len)
            .map(|k| {
                let part = |version: &Self| version.parts.get(k).cloned().unwrap_or(Part::Zero);
                part(self).cmp(&part(other))
            })
            .find(|ordering| ordering.is_ne())
            .unwrap_or(Ordering::Equal)
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Version {}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_age() {
        let ordered = [
            "latest",
            "0.9",
            "1.0.dev1",
            "1.0a1",
            "1.0b2",
            "1.0rc1",
            "1.0",
            "1.0.post1",
            "1.0.1",
            "1.9",
            "1.10",
            "1.16.6",
            "2",
        ];
        for pair in ordered.windows(2) {
            let (older, newer) = (Version::new(pair[0]), Version::new(pair[1]));
            assert!(older < newer, "{older} {newer}");
        }
    }

    #[test]
    fn the_same_version_can_be_written_in_several_ways() {
        for (a, b) in [("1.2", "1.2.0"), ("v1.2", "1.2"), ("1.0rc1", "1.0-RC.1")] {
            assert_eq!(Version::new(a), Version::new(b));
        }
        assert_ne!(Version::new("1.2"), Version::new("1.20"));
        assert_ne!(Version::new(">=1.2"), Version::new("1.2"));
    }
}
