//! GGUF files, versions 2 and 3: one file that holds a model's tensors, settings and tokenizer.
//!
//! A file comes from anywhere: every count and offset is checked against the bytes that are there before it is
//! used, and arrays stay in the map until they are read. `metadata` is the header's reader, `tensors` tells tensors
//! by transformers' names, `config` and `tokenizer` write the texts that a folder would have.

mod config;
mod metadata;
mod tensors;
mod tokenizer;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde_json::Value as Json;

use super::{Format, map};
use crate::Error;
use crate::quant::BlockFormat;
use metadata::{Metadata, Reader};

pub(crate) use tensors::GgufTensors;

const MAGIC: &[u8] = b"GGUF";
/// Where the data of tensors begins unless the file says otherwise: a multiple of this.
const DEFAULT_ALIGNMENT: u64 = 32;
/// A tensor has no more dimensions.
const MAX_DIMENSIONS: u32 = 4;
/// More files than a model is cut into.
const MAX_SPLITS: u64 = 4096;

/// A model's GGUF file, or the files that it was cut into.
#[derive(Debug)]
pub(crate) struct Gguf {
    files: Vec<GgufFile>,
}

#[derive(Debug)]
struct GgufFile {
    path: PathBuf,
    memory: Mmap,
    metadata: Metadata,
    tensors: HashMap<String, TensorInfo>,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct TensorInfo {
    /// The slowest dimension first, as transformers has it; in the file it is last.
    shape: Vec<usize>,
    type_id: u32,
    /// Its first byte in the file.
    start: usize,
    /// Bytes to the end of the file; how many are the tensor's depends on its type.
    available: usize,
}

impl Gguf {
    /// Opens a file, and the other parts of the model if it is the first of several.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let first = GgufFile::open(path)?;
        let num_splits = Settings { file: &first }.unsigned("split.count")?.unwrap_or(1);
        if num_splits > MAX_SPLITS {
            return Err(first.wrong(&format!("says that it is one of {num_splits} files")));
        }
        let mut files = vec![first];
        for number in 2..=num_splits {
            let other = split_path(path, number, num_splits).ok_or_else(|| {
                files[0].wrong(&format!(
                    "is one of {num_splits} files: give the path of the first, which ends in \
                     -00001-of-{num_splits:05}.gguf"
                ))
            })?;
            files.push(GgufFile::open(&other)?);
        }
        Ok(Self { files })
    }

    /// The settings: those of the first file.
    fn settings(&self) -> Settings<'_> {
        Settings { file: &self.files[0] }
    }

    fn tensor(&self, name: &str) -> Option<(&GgufFile, &TensorInfo)> {
        self.files.iter().find_map(|file| Some((file, file.tensors.get(name)?)))
    }

    /// The numbers of a small tensor of `f32`.
    fn vector(&self, name: &str) -> Result<Option<Vec<f32>>, Error> {
        let Some((file, info)) = self.tensor(name) else { return Ok(None) };
        let (format, bytes) = file.bytes(name, info)?;
        if format != Format::F32 {
            return Err(file.wrong(&format!("has {name} in another type than F32")));
        }
        let mut numbers = vec![0.0; info.shape.iter().product()];
        format.decode(bytes, &mut numbers);
        Ok(Some(numbers))
    }
}

/// The text that a model's folder would have under this name.
pub(crate) fn text(gguf: &Gguf, name: &str) -> Result<Option<String>, Error> {
    let json = match name {
        "config.json" => config::config(gguf)?,
        "generation_config.json" => tokenizer::generation_config(&gguf.settings())?,
        "tokenizer.json" => tokenizer::tokenizer(&gguf.settings())?,
        "tokenizer_config.json" => tokenizer::tokenizer_config(&gguf.settings())?,
        _ => return Ok(None),
    };
    Ok(Some(Json::to_string(&json)))
}

/// `x-00001-of-00003.gguf` → `x-00002-of-00003.gguf`; `None` if the path isn't of this kind.
fn split_path(first: &Path, number: u64, count: u64) -> Option<PathBuf> {
    let name = first.file_name()?.to_str()?;
    let stem = name.strip_suffix(&format!("-00001-of-{count:05}.gguf"))?;
    Some(first.with_file_name(format!("{stem}-{number:05}-of-{count:05}.gguf")))
}

impl GgufFile {
    fn open(path: &Path) -> Result<Self, Error> {
        let memory = map(path)?;
        let parsed = parse(&memory);
        let (metadata, tensors) = parsed.map_err(|what| {
            let is_part = path.extension().is_some_and(|ending| ending == "safetensors");
            let hint =
                if is_part { "; of a checkpoint in safetensors, give the folder" } else { "" };
            let len = memory.len();
            Error::Model(format!("{}: {what} (it has {len} bytes){hint}", path.display()))
        })?;
        Ok(Self { path: path.to_owned(), memory, metadata, tensors })
    }

    fn wrong(&self, what: &str) -> Error {
        Error::Model(format!("{} {what}", self.path.display()))
    }

    /// A tensor's type and bytes.
    fn bytes(&self, name: &str, info: &TensorInfo) -> Result<(Format, &[u8]), Error> {
        let wrong = |what: String| self.wrong(&format!("has the tensor {name} {what}"));
        let format = format(info.type_id)
            .map_err(|known| wrong(format!("in {known}, which is not read")))?;
        let num_elements =
            info.shape.iter().try_fold(1usize, |product, len| product.checked_mul(*len));
        let row_len = info.shape.last().copied().unwrap_or(1);
        if !row_len.is_multiple_of(format.block_len()) {
            return Err(wrong(format!(
                "of shape {:?} in {format}, whose rows are multiples of {}",
                info.shape,
                format.block_len()
            )));
        }
        let len = num_elements
            .and_then(|number| number.checked_mul(4).map(|_| format.num_bytes(number)))
            .filter(|len| *len <= info.available)
            .ok_or_else(|| {
                wrong(format!(
                    "of shape {:?} at byte {}, behind its end: the file is cut short or damaged",
                    info.shape, info.start
                ))
            })?;
        Ok((format, &self.memory[info.start..][..len]))
    }
}

/// How numbers of a GGUF type are written; the type's name if it isn't read.
fn format(type_id: u32) -> Result<Format, String> {
    let name = match type_id {
        0 => return Ok(Format::F32),
        1 => return Ok(Format::F16),
        2 => return Ok(Format::Block(BlockFormat::Q4_0)),
        3 => return Ok(Format::Block(BlockFormat::Q4_1)),
        6 => return Ok(Format::Block(BlockFormat::Q5_0)),
        7 => return Ok(Format::Block(BlockFormat::Q5_1)),
        8 => return Ok(Format::Block(BlockFormat::Q8_0)),
        10 => return Ok(Format::Block(BlockFormat::Q2K)),
        11 => return Ok(Format::Block(BlockFormat::Q3K)),
        12 => return Ok(Format::Block(BlockFormat::Q4K)),
        13 => return Ok(Format::Block(BlockFormat::Q5K)),
        14 => return Ok(Format::Block(BlockFormat::Q6K)),
        30 => return Ok(Format::Bf16),
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        other => return Err(format!("the unknown type {other}")),
    };
    Err(name.to_owned())
}

/// Reads a file's header: its settings, and where its tensors lie. Errors say what was expected where.
fn parse(bytes: &[u8]) -> Result<(Metadata, HashMap<String, TensorInfo>), String> {
    let mut reader = Reader::new(bytes);
    if reader.bytes(MAGIC.len()).ok() != Some(MAGIC) {
        return Err("no GGUF file: expected the letters GGUF at its beginning".into());
    }
    let version = reader.u32()?;
    match version {
        2 | 3 => {}
        _ if matches!(version.swap_bytes(), 2 | 3) => {
            return Err("a GGUF file for big-endian machines, expected little-endian".into());
        }
        _ => return Err(format!("version {version} of GGUF, expected 2 or 3")),
    }
    let (num_tensors, num_settings) = (reader.u64()?, reader.u64()?);
    let metadata = Metadata::read(&mut reader, num_settings)?;
    let infos = read_infos(&mut reader, num_tensors)?;
    let alignment = metadata.unsigned(bytes, "general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > 1 << 30 {
        return Err(format!("general.alignment is {alignment}, expected a power of two"));
    }
    let data_start = (reader.position() as u64).next_multiple_of(alignment);
    let mut tensors = HashMap::new();
    for (name, shape, type_id, offset) in infos {
        let start = data_start.checked_add(offset).and_then(|start| usize::try_from(start).ok());
        let start = start.filter(|start| *start <= bytes.len()).ok_or_else(|| {
            format!(
                "the tensor {name} begins at byte {offset} of the data, behind the end of the file"
            )
        })?;
        if offset % alignment != 0 {
            return Err(format!(
                "the tensor {name} begins at byte {offset}, expected a multiple of {alignment}"
            ));
        }
        let info = TensorInfo { shape, type_id, start, available: bytes.len() - start };
        if tensors.insert(name.clone(), info).is_some() {
            return Err(format!("the tensor {name} comes twice"));
        }
    }
    Ok((metadata, tensors))
}

type Info = (String, Vec<usize>, u32, u64);

/// Name, shape, type and offset of each tensor.
fn read_infos(reader: &mut Reader<'_>, num_tensors: u64) -> Result<Vec<Info>, String> {
    let mut infos = Vec::new();
    for number in 0..num_tensors {
        let name = reader.text().map_err(|what| format!("tensor {number}: {what}"))?.to_owned();
        let at = |what: String| format!("the tensor {name}: {what}");
        let num_dimensions = reader.u32().map_err(at)?;
        if !(1..=MAX_DIMENSIONS).contains(&num_dimensions) {
            return Err(at(format!("{num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")));
        }
        let mut shape = Vec::new();
        for _ in 0..num_dimensions {
            let len = reader.u64().map_err(at)?;
            let len = usize::try_from(len).ok().filter(|len| *len > 0);
            shape.push(len.ok_or_else(|| at("a dimension of no length".into()))?);
        }
        shape.reverse();
        let (type_id, offset) = (reader.u32().map_err(at)?, reader.u64().map_err(at)?);
        infos.push((name, shape, type_id, offset));
    }
    Ok(infos)
}

/// The settings of a file, each read with its check.
#[derive(Clone, Copy, Debug)]
struct Settings<'a> {
    file: &'a GgufFile,
}

impl<'a> Settings<'a> {
    fn wrong(&self, what: &str) -> Error {
        self.file.wrong(what)
    }

    fn has(&self, key: &str) -> bool {
        self.file.metadata.has(key)
    }

    fn unsigned(&self, key: &str) -> Result<Option<u64>, Error> {
        let found = self.file.metadata.unsigned(&self.file.memory, key);
        found.map_err(|error| self.wrong(&error))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, Error> {
        let found = self.file.metadata.float(&self.file.memory, key);
        found.map_err(|error| self.wrong(&error))
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        let found = self.file.metadata.boolean(&self.file.memory, key);
        found.map_err(|error| self.wrong(&error))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        let found = self.file.metadata.text(&self.file.memory, key);
        found.map_err(|error| self.wrong(&error))
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, Error> {
        let found = self.file.metadata.texts(&self.file.memory, key);
        found.map_err(|error| self.wrong(&error))
    }

    fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        let found = self.file.metadata.numbers(&self.file.memory, key);
        found.map_err(|error| self.wrong(&error))
    }

    fn missing(&self, key: &str) -> Error {
        self.wrong(&format!("lacks the setting {key}"))
    }
}
