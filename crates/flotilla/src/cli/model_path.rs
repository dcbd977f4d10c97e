//! Which model a command means: the one given, or the shipped one.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;

use crate::hub::{self, HubOptions, Need};

/// The model that ships with flotilla.
const SHIPPED_MODEL: &str = "models/flotilla-reader";

/// Where a model comes from.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelPath {
    /// The model: a folder with config.json, safetensors and tokenizer.json, a GGUF file, or the
    /// name of a model at the Hugging Face Hub, ORG/NAME or ORG/NAME@REVISION, or ORG/NAME:FILE for
    /// one GGUF file of it [default: the shipped model].
    ///
    /// A model of the Hub is fetched into the cache that Python's libraries use too. HF_HOME,
    /// HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are heeded. Where no answers are
    /// computed, only the tokenizer is wanted: it counts the tokens for --max-tokens.
    #[arg(long, env = "FLOTILLA_MODEL_PATH", value_name = "MODEL")]
    pub(crate) model_path: Option<String>,
    #[command(flatten)]
    pub(crate) hub: HubOptions,
}

impl ModelPath {
    /// Its place on this machine, fetched if need be.
    pub(crate) fn find(&self, need: Need) -> anyhow::Result<PathBuf> {
        if let Some(given) = &self.model_path {
            return hub::find(given, &self.hub, need);
        }
        Self::shipped()
    }

    /// The shipped model, looked for in this folder and in those above the program.
    pub(crate) fn shipped() -> anyhow::Result<PathBuf> {
        let program = std::env::current_exe().unwrap_or_default();
        let candidates =
            std::iter::once(PathBuf::new()).chain(program.ancestors().map(PathBuf::from));
        for folder in candidates {
            let path = folder.join(SHIPPED_MODEL);
            if path.join("config.json").is_file() {
                return Ok(path);
            }
        }
        bail!(
            "the shipped model {SHIPPED_MODEL} is neither here nor beside the program: expected a \
             model in --model-path or FLOTILLA_MODEL_PATH"
        );
    }
}
