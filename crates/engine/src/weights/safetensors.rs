//! The safetensors files of a folder, whole or in shards, mapped into memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};

use super::{Format, Layout, Stored, map};
use crate::Error;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// Endings of weights in formats that are not read.
const FOREIGN_FORMATS: [&str; 7] = ["bin", "pt", "pth", "h5", "msgpack", "onnx", "ckpt"];

/// The files of a checkpoint.
#[derive(Debug)]
pub(crate) struct SafetensorsFiles {
    files: Vec<SafetensorsFile>,
    /// Which file has a tensor, by the name in the file.
    owners: HashMap<String, usize>,
}

#[derive(Debug)]
struct SafetensorsFile {
    path: PathBuf,
    memory: Mmap,
    metadata: Metadata,
    data_start: usize,
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl SafetensorsFiles {
    /// Opens the files in a model's folder.
    pub(crate) fn open(folder: &Path) -> Result<Self, Error> {
        let single = folder.join(SINGLE_FILE);
        let index = folder.join(INDEX_FILE);
        let paths = if single.is_file() {
            vec![single]
        } else if index.is_file() {
            shards(folder, index)?
        } else {
            return Err(no_weights(folder));
        };
        let files: Vec<_> =
            paths.into_iter().map(SafetensorsFile::open).collect::<Result<_, _>>()?;
        let mut owners = HashMap::new();
        for (number, file) in files.iter().enumerate() {
            for name in file.metadata.tensors().into_keys() {
                owners.entry(name).or_insert(number);
            }
        }
        Ok(Self { files, owners })
    }

    /// A tensor by transformers' name for it. A base model, saved without its head, lacks what its names
    /// begin with; transformers 5 may keep the matrices of all experts in one tensor.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Stored<'_>>, Error> {
        for name in [Some(name), name.strip_prefix("model.")].into_iter().flatten() {
            if let Some(number) = self.owners.get(name) {
                return self.files[*number].stored(name).map(Some);
            }
            if let Some((all, expert)) = of_all_experts(name)
                && let Some(number) = self.owners.get(&all)
            {
                return self.files[*number].expert(&all, expert).map(Some);
            }
        }
        Ok(None)
    }

    /// Bytes of all files.
    pub(crate) fn num_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.memory.len() as u64).sum()
    }

    /// The files, for errors.
    pub(crate) fn names(&self) -> String {
        let names: Vec<_> = self.files.iter().map(|file| file.path.display().to_string()).collect();
        names.join(", ")
    }
}

impl SafetensorsFile {
    fn open(path: PathBuf) -> Result<Self, Error> {
        let memory = map(&path)?;
        let (header_len, metadata) = SafeTensors::read_metadata(&memory).map_err(|error| {
            Error::Model(format!(
                "{} is damaged or no safetensors file: {error} (it has {} bytes)",
                path.display(),
                memory.len()
            ))
        })?;
        Ok(Self { path, data_start: size_of::<u64>() + header_len, metadata, memory })
    }

    /// An expert's matrix in a tensor of all experts, `(experts, rows, columns)`.
    fn expert(&self, name: &str, expert: usize) -> Result<Stored<'_>, Error> {
        let mut stored = self.stored(name)?;
        let [num_experts, rows, columns] = stored.shape[..] else {
            return Err(Error::Model(format!(
                "the tensor {name} in {} has shape {:?}, expected one matrix for each expert",
                self.path.display(),
                stored.shape
            )));
        };
        let len = stored.format.num_bytes(rows * columns);
        let bytes = stored.bytes.get(expert * len..(expert + 1) * len).ok_or_else(|| {
            Error::Model(format!(
                "the tensor {name} in {} has {num_experts} experts, expected number {expert} among them",
                self.path.display()
            ))
        })?;
        (stored.bytes, stored.shape) = (bytes, vec![rows, columns]);
        Ok(stored)
    }

    /// A tensor that the header has.
    fn stored(&self, name: &str) -> Result<Stored<'_>, Error> {
        let wrong = |what: String| {
            Error::Model(format!("the tensor {name} in {} {what}", self.path.display()))
        };
        let info = self.metadata.info(name).ok_or_else(|| wrong("is missing".into()))?;
        let format = match info.dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::Bf16,
            other => {
                return Err(wrong(format!("has dtype {other:?}, expected F32, F16 or BF16")));
            }
        };
        let (start, end) = info.data_offsets;
        let bytes = self
            .memory
            .get(self.data_start + start..self.data_start + end)
            .filter(|bytes| bytes.len() == format.num_bytes(info.shape.iter().product()))
            .ok_or_else(|| wrong("doesn't have the bytes its header promises".into()))?;
        Ok(Stored {
            file: &self.path,
            memory: &self.memory,
            bytes,
            format,
            shape: info.shape.clone(),
            layout: Layout::default(),
        })
    }
}

/// The tensor of all experts that would have an expert's matrix, and the expert's number:
/// `x.experts.3.down_proj.weight` is number 3 of `x.experts.down_proj`.
fn of_all_experts(name: &str) -> Option<(String, usize)> {
    let (layer, matrix) = name.strip_suffix(".weight")?.split_once(".experts.")?;
    let (number, matrix) = matrix.split_once('.')?;
    Some((format!("{layer}.experts.{matrix}"), number.parse().ok()?))
}

/// The files that an index names, each once.
fn shards(folder: &Path, index: PathBuf) -> Result<Vec<PathBuf>, Error> {
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
    if let Some(name) = names.iter().find(|name| !folder.join(name).is_file()) {
        return Err(Error::Model(format!(
            "{} names {name}, expected a file beside it, found none: the checkpoint is incomplete",
            index.display()
        )));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// What is missing, and what is there in its place.
fn no_weights(folder: &Path) -> Error {
    let names =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|file| file.file_name());
    let mut foreign: Vec<String> = names
        .map(|name| name.to_string_lossy().into_owned())
        .filter(|name| {
            let ending = name.rsplit_once('.').map(|(_, ending)| ending);
            ending.is_some_and(|ending| FOREIGN_FORMATS.contains(&ending) || ending == "gguf")
        })
        .collect();
    foreign.sort_unstable();
    let found = match foreign.first() {
        Some(name) if name.ends_with(".gguf") => {
            format!("; to load {name}, give the path of the file itself")
        }
        Some(name) => format!("; {name} is in a format that is not read"),
        None => String::new(),
    };
    Error::Model(format!("{} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}", folder.display()))
}
