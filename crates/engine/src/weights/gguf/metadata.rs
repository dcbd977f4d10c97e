//! The settings in a GGUF file's header: names with values of several types.
//!
//! A value stays where it is in the file; what is kept is its type and place. Errors are texts that follow
//! the file's name.

use std::collections::HashMap;
use std::ops::Range;

/// A name is no longer.
const MAX_NAME_LEN: usize = 1 << 16;

/// A position in a file's bytes.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    all: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(all: &'a [u8]) -> Self {
        Self { all, position: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], String> {
        let found = self.all[self.position..].get(..len).ok_or_else(|| {
            format!(
                "expected {len} more bytes at byte {}: the file is cut short or damaged",
                self.position
            )
        })?;
        self.position += len;
        Ok(found)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let bytes = self.bytes(N)?;
        Ok(*bytes.first_chunk().expect("as many bytes as asked for"))
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn text_bytes(&mut self) -> Result<&'a [u8], String> {
        let at = self.position;
        let len = self.u64()?;
        let len =
            usize::try_from(len).map_err(|_| format!("a text of {len} bytes at byte {at}"))?;
        self.bytes(len)
    }

    /// A name.
    pub(super) fn text(&mut self) -> Result<&'a str, String> {
        let at = self.position;
        let bytes = self.text_bytes()?;
        if bytes.len() >= MAX_NAME_LEN {
            return Err(format!("a name of {} bytes at byte {at}", bytes.len()));
        }
        std::str::from_utf8(bytes).map_err(|_| format!("a name that is not UTF-8 at byte {at}"))
    }
}

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Unsigned(usize),
    Signed(usize),
    F32,
    F64,
    Boolean,
    Text,
}

impl Kind {
    fn of(id: u32) -> Result<Self, String> {
        Ok(match id {
            0 => Self::Unsigned(1),
            1 => Self::Signed(1),
            2 => Self::Unsigned(2),
            3 => Self::Signed(2),
            4 => Self::Unsigned(4),
            5 => Self::Signed(4),
            6 => Self::F32,
            7 => Self::Boolean,
            8 => Self::Text,
            10 => Self::Unsigned(8),
            11 => Self::Signed(8),
            12 => Self::F64,
            _ => return Err(format!("a value of the unknown type {id}")),
        })
    }

    /// Bytes of a value; `None` for texts.
    fn width(self) -> Option<usize> {
        match self {
            Self::Unsigned(width) | Self::Signed(width) => Some(width),
            Self::F32 => Some(4),
            Self::F64 => Some(8),
            Self::Boolean => Some(1),
            Self::Text => None,
        }
    }
}

/// The number that `array` has as its type.
const ARRAY: u32 = 9;

/// Where a value lies.
#[derive(Clone, Debug)]
struct Place {
    kind: Kind,
    /// Number of values; `None` for one that isn't in an array.
    count: Option<u64>,
    bytes: Range<usize>,
}

/// The settings by their names.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    places: HashMap<String, Place>,
}

impl Metadata {
    pub(super) fn read(reader: &mut Reader<'_>, count: u64) -> Result<Self, String> {
        let mut places = HashMap::new();
        for number in 0..count {
            let key = reader.text().map_err(|what| format!("setting {number}: {what}"))?;
            let place = read_place(reader).map_err(|what| format!("the setting {key}: {what}"))?;
            if places.insert(key.to_owned(), place).is_some() {
                return Err(format!("the setting {key} comes twice"));
            }
        }
        Ok(Self { places })
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.places.contains_key(key)
    }

    /// A number that is not negative.
    pub(super) fn unsigned(&self, all: &[u8], key: &str) -> Result<Option<u64>, String> {
        let Some(number) = self.number(all, key)? else { return Ok(None) };
        // Numbers in settings are far below where doubles have gaps.
        if number.fract() != 0.0 || !(0.0..=2f64.powi(53)).contains(&number) {
            return Err(format!("has {number} as {key}, expected a whole number"));
        }
        Ok(Some(number as u64))
    }

    /// A finite number.
    pub(super) fn float(&self, all: &[u8], key: &str) -> Result<Option<f64>, String> {
        match self.number(all, key)? {
            Some(number) if !number.is_finite() => {
                Err(format!("has {number} as {key}, expected a finite number"))
            }
            other => Ok(other),
        }
    }

    pub(super) fn boolean(&self, all: &[u8], key: &str) -> Result<Option<bool>, String> {
        let Some(place) = self.places.get(key) else { return Ok(None) };
        match (place.kind, place.count) {
            (Kind::Boolean, None) => Ok(Some(all[place.bytes.start] != 0)),
            _ => Err(format!("has {key} in another type than true or false")),
        }
    }

    pub(super) fn text<'a>(&self, all: &'a [u8], key: &str) -> Result<Option<&'a str>, String> {
        let Some(place) = self.places.get(key) else { return Ok(None) };
        match (place.kind, place.count) {
            (Kind::Text, None) => utf8(&all[place.bytes.clone()], key).map(Some),
            _ => Err(format!("has {key} in another type than text")),
        }
    }

    pub(super) fn texts<'a>(
        &self,
        all: &'a [u8],
        key: &str,
    ) -> Result<Option<Vec<&'a str>>, String> {
        let Some(place) = self.places.get(key) else { return Ok(None) };
        let (Kind::Text, Some(count)) = (place.kind, place.count) else {
            return Err(format!("has {key} in another type than a list of texts"));
        };
        let mut reader = Reader::new(&all[place.bytes.clone()]);
        let texts = (0..count).map(|_| utf8(reader.text_bytes()?, key));
        texts.collect::<Result<_, _>>().map(Some)
    }

    /// The numbers of a list; of a single number, a list with it.
    pub(super) fn numbers(&self, all: &[u8], key: &str) -> Result<Option<Vec<f64>>, String> {
        let Some(place) = self.places.get(key) else { return Ok(None) };
        let Some(width) = place.kind.width() else {
            return Err(format!("has {key} in another type than a list of numbers"));
        };
        let values = all[place.bytes.clone()].chunks_exact(width);
        Ok(Some(values.map(|bytes| number(place.kind, bytes)).collect()))
    }

    fn number(&self, all: &[u8], key: &str) -> Result<Option<f64>, String> {
        let Some(place) = self.places.get(key) else { return Ok(None) };
        if place.count.is_some() || matches!(place.kind, Kind::Text | Kind::Boolean) {
            return Err(format!("has {key} in another type than a number"));
        }
        Ok(Some(number(place.kind, &all[place.bytes.clone()])))
    }
}

/// Finds the end of a value and skips it.
fn read_place(reader: &mut Reader<'_>) -> Result<Place, String> {
    let id = reader.u32()?;
    let (kind, count) = if id == ARRAY {
        let id = reader.u32()?;
        if id == ARRAY {
            return Err("lists of lists are not read".into());
        }
        (Kind::of(id)?, Some(reader.u64()?))
    } else {
        (Kind::of(id)?, None)
    };
    let start = reader.position;
    let Some(width) = kind.width() else {
        let Some(count) = count else {
            let text = reader.text_bytes()?;
            return Ok(Place { kind, count, bytes: reader.position - text.len()..reader.position });
        };
        // Each has at least the bytes of its length, so that this ends where the file does.
        for _ in 0..count {
            reader.text_bytes()?;
        }
        return Ok(Place { kind, count: Some(count), bytes: start..reader.position });
    };
    let len = usize::try_from(count.unwrap_or(1)).ok().and_then(|count| count.checked_mul(width));
    reader.bytes(len.ok_or("a list that is longer than any file")?)?;
    Ok(Place { kind, count, bytes: start..reader.position })
}

fn utf8<'a>(bytes: &'a [u8], key: &str) -> Result<&'a str, String> {
    std::str::from_utf8(bytes).map_err(|_| format!("has {key} that is not UTF-8"))
}

/// A number of up to 8 bytes in little-endian order.
fn number(kind: Kind, bytes: &[u8]) -> f64 {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let raw = u64::from_le_bytes(wide);
    match kind {
        Kind::F32 => f64::from(f32::from_bits(raw as u32)),
        Kind::F64 => f64::from_bits(raw),
        Kind::Signed(width) => {
            let unused = 64 - 8 * width as u32;
            ((raw << unused) as i64 >> unused) as f64
        }
        Kind::Unsigned(_) | Kind::Boolean | Kind::Text => raw as f64,
    }
}
