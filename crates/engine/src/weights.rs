//! A checkpoint's tensors, by the names that transformers gives them, mapped into memory while they are packed.
//!
//! Which bytes a tensor has in which file is known in `safetensors` and `gguf`; here it is checked against the
//! shape that the model expects, and read row by row.

mod format;
pub(crate) mod gguf;
mod safetensors;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut, UncheckedAdvice};

use crate::Error;
use crate::config::ModelConfig;
use crate::model_files::is_gguf;
pub use format::Format;
pub(crate) use format::INT8_SCALE_BYTES;
use gguf::{Gguf, GgufTensors};
use safetensors::SafetensorsFiles;

/// Bytes of a tensor after whose reading the pages before are given back.
const RELEASE_BYTES: usize = 1 << 20;

/// The weights of a model, and what it looks like.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    model_path: PathBuf,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Safetensors(SafetensorsFiles),
    Gguf(GgufTensors),
    /// No file: every tensor is there, of the shape that is asked for, and has no numbers.
    Blueprint {
        format: Format,
        empty: Mmap,
    },
}

/// A tensor as its file has it.
#[derive(Debug)]
pub(crate) struct Stored<'a> {
    file: &'a Path,
    memory: &'a Mmap,
    bytes: &'a [u8],
    format: Format,
    shape: Vec<usize>,
    layout: Layout,
}

/// How a file's numbers differ from those that transformers saves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Layout {
    /// Number of heads whose rows alternate between the first and the second half of the head.
    interleaved_heads: Option<usize>,
    /// What has been added to each number.
    offset: f32,
}

impl Checkpoint {
    /// Opens the checkpoint in a model's folder, or a GGUF file.
    pub(crate) fn open(model_path: &Path) -> Result<Self, Error> {
        let source = if is_gguf(model_path) {
            Source::Gguf(GgufTensors::new(Gguf::open(model_path)?)?)
        } else {
            Source::Safetensors(SafetensorsFiles::open(model_path)?)
        };
        Ok(Self { model_path: model_path.to_owned(), source })
    }

    /// A checkpoint of any model, of which only the shapes are known.
    pub(crate) fn blueprint(format: Format) -> Result<Self, Error> {
        let failed = |error: std::io::Error| Error::OutOfMemory(error.to_string());
        let empty = MmapMut::map_anon(1).and_then(MmapMut::make_read_only).map_err(failed)?;
        Ok(Self { model_path: PathBuf::new(), source: Source::Blueprint { format, empty } })
    }

    /// Bytes of its files.
    pub(crate) fn num_file_bytes(&self) -> u64 {
        match &self.source {
            Source::Safetensors(files) => files.num_bytes(),
            Source::Gguf(files) => files.num_bytes(),
            Source::Blueprint { .. } => 0,
        }
    }

    /// What the model looks like.
    pub(crate) fn config(&self) -> Result<ModelConfig, Error> {
        ModelConfig::load(&self.model_path)
    }

    /// A tensor, which must have this shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, Error> {
        if let Source::Blueprint { format, empty } = &self.source {
            return Ok(Tensor::new(Stored {
                file: &self.model_path,
                memory: empty,
                bytes: &empty[..0],
                format: *format,
                shape: shape.to_vec(),
                layout: Layout::default(),
            }));
        }
        let Some(stored) = self.find(name)? else {
            let files = match &self.source {
                Source::Safetensors(files) => files.names(),
                Source::Gguf(files) => files.names(),
                Source::Blueprint { .. } => String::new(),
            };
            return Err(Error::Model(format!(
                "the tensor {name} of shape {shape:?} is in none of {files}"
            )));
        };
        if stored.shape != shape {
            return Err(Error::Model(format!(
                "the tensor {name} in {} has shape {:?}, expected {shape:?}",
                stored.file.display(),
                stored.shape
            )));
        }
        Ok(Tensor::new(stored))
    }

    /// Whether there is such a tensor.
    pub(crate) fn has(&self, name: &str) -> bool {
        // One that is there and damaged is told about when it is asked for.
        self.find(name).map_or(true, |found| found.is_some())
    }

    fn find(&self, name: &str) -> Result<Option<Stored<'_>>, Error> {
        match &self.source {
            Source::Safetensors(files) => files.find(name),
            Source::Gguf(files) => files.find(name),
            Source::Blueprint { .. } => Ok(None),
        }
    }
}

/// Maps a file into memory.
#[expect(unsafe_code, reason = "mapping a file into memory")]
fn map(path: &Path) -> Result<Mmap, Error> {
    // SAFETY: what is mapped is only copied out of the map, as bytes; a file that is changed meanwhile
    // gives wrong numbers, and one that is cut ends the process: loading needs it left alone.
    let mapped = File::open(path).and_then(|file| unsafe { Mmap::map(&file) });
    mapped.map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// A tensor in a file, read as rows. Its pages leave memory when it is dropped.
#[derive(Debug)]
pub(crate) struct Tensor<'a> {
    stored: Stored<'a>,
    row_len: usize,
}

impl<'a> Tensor<'a> {
    fn new(stored: Stored<'a>) -> Self {
        // A vector of heads is turned number by number.
        let is_column = stored.layout.interleaved_heads.is_some() && stored.shape.len() == 1;
        let row_len = stored.shape.last().copied().filter(|_| !is_column).unwrap_or(1);
        Self { stored, row_len }
    }

    /// How its numbers are written.
    pub(crate) fn format(&self) -> Format {
        self.stored.format
    }

    /// Numbers of a row.
    pub(crate) fn row_len(&self) -> usize {
        self.row_len
    }

    /// Rows it has.
    pub(crate) fn num_rows(&self) -> usize {
        self.stored.shape.iter().product::<usize>() / self.row_len
    }

    /// The bytes of one row. Rows are read from the first on: what lies well before this one has been read.
    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        let Stored { bytes, format, layout, .. } = &self.stored;
        let row_bytes = format.num_bytes(self.row_len);
        let (start, end) = (row * row_bytes, (row + 1) * row_bytes);
        if start / RELEASE_BYTES != end / RELEASE_BYTES {
            let released = 2 * RELEASE_BYTES.max(row_bytes);
            self.stored.release(start.saturating_sub(released)..start);
        }
        let row = layout.interleaved_heads.map_or(row, |heads| {
            let half = self.num_rows() / heads / 2;
            let (head, in_head) = (row / (2 * half), row % (2 * half));
            head * 2 * half + in_head % half * 2 + in_head / half
        });
        &bytes[row * row_bytes..][..row_bytes]
    }

    /// Widens one row.
    pub(crate) fn decode_row(&self, row: usize, out: &mut [f32]) {
        self.format().decode(self.row(row), out);
        let offset = self.stored.layout.offset;
        if offset != 0.0 {
            out.iter_mut().for_each(|x| *x -= offset);
        }
    }

    /// Widens all of it.
    pub(crate) fn to_vec(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.num_rows() * self.row_len];
        for (row, out) in out.chunks_exact_mut(self.row_len).enumerate() {
            self.decode_row(row, out);
        }
        out
    }
}

impl Stored<'_> {
    /// Lets the system take pages back: what has been packed is not needed a second time.
    #[expect(unsafe_code, reason = "advice on mapped memory")]
    fn release(&self, range: Range<usize>) {
        let start = self.bytes.as_ptr() as usize - self.memory.as_ptr() as usize + range.start;
        // SAFETY: the map is of a file and never written to, so that a page that is dropped and touched
        // again, by a neighbour or another thread, has the same content. Advice that is refused changes
        // nothing.
        let _refused = unsafe {
            self.memory.unchecked_advise_range(UncheckedAdvice::DontNeed, start, range.len())
        };
    }
}

impl Drop for Stored<'_> {
    fn drop(&mut self) {
        self.release(0..self.bytes.len());
    }
}
