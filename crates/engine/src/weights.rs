//! A checkpoint's tensors: safetensors files, whole or in shards, mapped into memory while they are packed.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};

use crate::Error;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// The files of a checkpoint.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    files: Vec<CheckpointFile>,
}

#[derive(Debug)]
struct CheckpointFile {
    path: PathBuf,
    memory: Mmap,
    metadata: Metadata,
    data_start: usize,
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens the checkpoint in a model's folder.
    pub(crate) fn open(model_path: &Path) -> Result<Self, Error> {
        let single = model_path.join(SINGLE_FILE);
        let index = model_path.join(INDEX_FILE);
        let paths = if single.is_file() {
            vec![single]
        } else if index.is_file() {
            shards(model_path, index)?
        } else {
            return Err(Error::Model(format!(
                "{} has neither {SINGLE_FILE} nor {INDEX_FILE}",
                model_path.display()
            )));
        };
        let files = paths.into_iter().map(CheckpointFile::open).collect::<Result<_, _>>()?;
        Ok(Self { files })
    }

    /// A tensor, which must have this shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, Error> {
        let found = self.files.iter().find_map(|file| Some((file, file.metadata.info(name)?)));
        let Some((file, info)) = found else {
            let files: Vec<_> =
                self.files.iter().map(|file| file.path.display().to_string()).collect();
            return Err(Error::Model(format!(
                "the tensor {name} of shape {shape:?} is in none of {}",
                files.join(", ")
            )));
        };
        let wrong = |what: String| {
            Error::Model(format!("the tensor {name} in {} {what}", file.path.display()))
        };
        if info.shape != shape {
            return Err(wrong(format!("has shape {:?}, expected {shape:?}", info.shape)));
        }
        let format = match info.dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::Bf16,
            other => {
                return Err(wrong(format!("has dtype {other:?}, expected F32, F16 or BF16")));
            }
        };
        let (start, end) = info.data_offsets;
        let bytes = file
            .memory
            .get(file.data_start + start..file.data_start + end)
            .filter(|bytes| bytes.len() == shape.iter().product::<usize>() * format.bytes())
            .ok_or_else(|| wrong("doesn't have the bytes its header promises".into()))?;
        Ok(Tensor { bytes, format, row_len: shape[shape.len() - 1] })
    }

    /// Whether there is such a tensor.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file.metadata.info(name).is_some())
    }
}

impl CheckpointFile {
    #[expect(unsafe_code, reason = "mapping a file into memory")]
    fn open(path: PathBuf) -> Result<Self, Error> {
        // SAFETY: weights are only copied out of the map, as bytes, while loading; a file that is changed
        // meanwhile gives wrong numbers, and one that is cut ends the process: loading needs it left alone.
        let mapped = File::open(&path).and_then(|file| unsafe { Mmap::map(&file) });
        let memory = match mapped {
            Ok(memory) => memory,
            Err(source) => return Err(Error::Io { path, source }),
        };
        let (header_len, metadata) = SafeTensors::read_metadata(&memory).map_err(|error| {
            Error::Model(format!(
                "{} is damaged or no safetensors file: {error} (it has {} bytes)",
                path.display(),
                memory.len()
            ))
        })?;
        Ok(Self { path, data_start: size_of::<u64>() + header_len, metadata, memory })
    }
}

/// The files that an index names, each once.
fn shards(model_path: &Path, index: PathBuf) -> Result<Vec<PathBuf>, Error> {
    let text = match std::fs::read_to_string(&index) {
        Ok(text) => text,
        Err(source) => {
            return Err(Error::Io { path: index, source });
        }
    };
    let parsed: Index = serde_json::from_str(&text).map_err(|error| {
        Error::Model(format!("{} has no usable weight_map: {error}", index.display()))
    })?;
    let mut names: Vec<String> = parsed.weight_map.into_values().collect();
    names.sort_unstable();
    names.dedup();
    if let Some(name) = names.iter().find(|name| Path::new(name).components().count() != 1) {
        return Err(Error::Model(format!(
            "{} names {name:?}, expected a file beside it",
            index.display()
        )));
    }
    Ok(names.into_iter().map(|name| model_path.join(name)).collect())
}

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Four bytes.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    Bf16,
}

impl Format {
    /// Bytes of a number.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Widens numbers.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
            Self::F16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = half::f16::from_le_bytes(*bytes).to_f32();
                }
            }
            Self::Bf16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
        }
    }
}

/// A tensor in a file, read as rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor<'a> {
    bytes: &'a [u8],
    format: Format,
    row_len: usize,
}

impl<'a> Tensor<'a> {
    /// How its numbers are written.
    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// All of its bytes.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Rows it has.
    pub(crate) fn num_rows(&self) -> usize {
        self.bytes.len() / (self.row_len * self.format.bytes())
    }

    /// Widens one row.
    pub(crate) fn decode_row(&self, row: usize, out: &mut [f32]) {
        let row_bytes = self.row_len * self.format.bytes();
        self.format.decode(&self.bytes[row * row_bytes..][..row_bytes], out);
    }

    /// Widens all of it.
    pub(crate) fn to_vec(self) -> Vec<f32> {
        let mut out = vec![0.0; self.bytes.len() / self.format.bytes()];
        self.format.decode(self.bytes, &mut out);
        out
    }
}
