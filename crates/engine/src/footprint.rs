//! What a model is and takes, without loading it: from its configuration and the headers of its weights.
//!
//! The numbers come from the code that loads (`model`), which only counts here. So they are the engine's own, and
//! a checkpoint that lacks a tensor is known without reading it.

use std::path::Path;

use crate::Error;
use crate::config::ModelConfig;
use crate::kv_cache::bytes_per_block;
use crate::model::{Account, Model};
use crate::precision::{KvCacheDtype, Precision};
use crate::step::BLOCK_SIZE;
use crate::weights::{Checkpoint, Format};

/// A model that isn't loaded.
#[derive(Clone, Debug)]
pub struct Footprint {
    config: ModelConfig,
    num_file_bytes: u64,
    /// As the checkpoint has everything.
    stored: Account,
    /// Memory of the weights at each precision.
    weight_bytes: Vec<(Precision, u64)>,
}

impl Footprint {
    /// That of a checkpoint. The error says why it can't be loaded.
    pub fn open(model_path: &Path) -> Result<Self, Error> {
        let config = ModelConfig::load(model_path)?;
        Self::measure(config, &Checkpoint::open(model_path)?)
    }

    /// That of a model of which there is only the configuration, with weights in a given format.
    pub fn of(config: ModelConfig, format: Format) -> Result<Self, Error> {
        Self::measure(config, &Checkpoint::blueprint(format)?)
    }

    fn measure(config: ModelConfig, checkpoint: &Checkpoint) -> Result<Self, Error> {
        let account = |precision| Model::account(&config, checkpoint, precision);
        let stored = account(None)?;
        let weight_bytes = Precision::ALL
            .into_iter()
            .map(|precision| Ok((precision, account(Some(precision))?.num_bytes)))
            .collect::<Result<_, Error>>()?;
        Ok(Self { config, num_file_bytes: checkpoint.num_file_bytes(), stored, weight_bytes })
    }

    /// What the model looks like.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Its tensors, by their names, with their shapes. Those that share their numbers are one.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.stored.tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()))
    }

    /// Numbers in all of its tensors.
    pub fn num_parameters(&self) -> u64 {
        self.stored.stored.iter().map(|(_, count)| count).sum()
    }

    /// How many of them are stored in which format, the most frequent first.
    pub fn stored(&self) -> Vec<(Format, u64)> {
        let mut stored = self.stored.stored.clone();
        stored.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        stored
    }

    /// Bytes of the files with the weights.
    pub fn num_file_bytes(&self) -> u64 {
        self.num_file_bytes
    }

    /// Memory of the weights at a precision, or as they are stored.
    pub fn weight_bytes(&self, precision: Option<Precision>) -> u64 {
        let found = self.weight_bytes.iter().find(|(one, _)| Some(*one) == precision);
        found.map_or(self.stored.num_bytes, |(_, bytes)| *bytes)
    }

    /// Memory of the keys and values of a sequence of so many tokens, which are kept in whole blocks.
    pub fn kv_bytes(&self, dtype: KvCacheDtype, num_tokens: usize) -> u64 {
        num_tokens.div_ceil(BLOCK_SIZE) as u64 * bytes_per_block(&self.config, dtype) as u64
    }

    /// Memory of the key and value of a token in a block that is full.
    pub fn kv_bytes_per_token(&self, dtype: KvCacheDtype) -> u64 {
        self.kv_bytes(dtype, BLOCK_SIZE) / BLOCK_SIZE as u64
    }
}
