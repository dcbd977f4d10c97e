//! Where a model lies: a folder as transformers writes it, or one GGUF file.
//!
//! Everything else asks here for the text files of the folder by their names. A GGUF file is read as the
//! folder that it was made from: `weights/gguf` writes those texts from its metadata.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Error;
use crate::weights::gguf::{self, Gguf};

/// The text files of a model.
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    gguf: Option<Gguf>,
}

impl ModelFiles {
    /// Opens a model: a folder, or a file in the GGUF format.
    pub fn open(model_path: &Path) -> Result<Self, Error> {
        let gguf = is_gguf(model_path).then(|| Gguf::open(model_path)).transpose()?;
        Ok(Self { path: model_path.to_owned(), gguf })
    }

    /// The text of a file, such as `config.json`; `None` if the model has none of that name.
    pub fn text(&self, name: &str) -> Result<Option<String>, Error> {
        if let Some(gguf) = &self.gguf {
            return gguf::text(gguf, name);
        }
        let path = self.path.join(name);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Io { path, source }),
        }
    }

    /// The text of a file that every model has.
    pub fn required(&self, name: &str) -> Result<String, Error> {
        self.text(name)?.ok_or_else(|| {
            let what = if self.path.is_dir() { "no such file" } else { "no such folder" };
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, what);
            Error::Io { path: self.path.join(name), source }
        })
    }

    /// The content of a JSON file; `None` if the model has none of that name.
    pub fn json(&self, name: &str) -> Result<Option<Value>, Error> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let parsed = serde_json::from_str(&text);
        parsed
            .map(Some)
            .map_err(|error| Error::Model(format!("{} is not JSON: {error}", self.name(name))))
    }

    /// What to call a file in an error.
    pub fn name(&self, name: &str) -> String {
        match &self.gguf {
            Some(_) => self.path.display().to_string(),
            None => self.path.join(name).display().to_string(),
        }
    }
}

/// Whether the path means a GGUF file: what is a file and no folder can be nothing else.
pub(crate) fn is_gguf(path: &Path) -> bool {
    let has_ending =
        path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    path.is_file() || has_ending && !path.is_dir()
}
