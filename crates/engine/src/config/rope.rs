//! Reads how positions are rotated, in both dialects.
//!
//! transformers 4 wrote `rope_theta` and `rope_scaling` (Gemma 3: `rope_local_base_freq` for its sliding
//! layers), 5 writes `rope_parameters` (Gemma 3: one for each kind of layer).

use serde_json::{Map, Value};

use super::Architecture;
use super::fields::Fields;
use crate::Error;
use crate::model::rope::{Rope, RopeScaling};

/// Context Phi-3 was trained on first, where its config doesn't say.
const PHI3_ORIGINAL_POSITIONS: usize = 4096;

/// Base of the frequencies in Gemma 3's sliding layers, where its config doesn't say.
const GEMMA3_LOCAL_THETA: f64 = 1e4;

/// What the reading of a rope needs of the rest of the config.
pub(super) struct RopeContext {
    pub(super) architecture: Architecture,
    pub(super) head_dim: usize,
    pub(super) max_positions: usize,
    pub(super) default_theta: f64,
}

impl RopeContext {
    /// The ropes of a model: one, or for Gemma 3 that of full and that of sliding layers.
    pub(super) fn read(&self, fields: &Fields<'_>) -> Result<Vec<Rope>, Error> {
        let empty = Map::new();
        let theta = fields.optional_positive("rope_theta")?.unwrap_or(self.default_theta);
        let scaling = fields.optional_object("rope_scaling")?.filter(|object| !object.is_empty());
        let parameters =
            fields.optional_object("rope_parameters")?.filter(|object| !object.is_empty());
        if self.architecture == Architecture::Gemma3 {
            let parameters = Fields::new(parameters.unwrap_or(&empty), "rope_parameters.");
            if let Some(name) = parameters.names().find(|name| !name.ends_with("_attention")) {
                return Err(Error::Model(format!(
                    "rope_parameters has the field {name}, expected full_attention and sliding_attention"
                )));
            }
            let local_theta =
                fields.optional_positive("rope_local_base_freq")?.unwrap_or(GEMMA3_LOCAL_THETA);
            let full = match (scaling, parameters.optional_object("full_attention")?) {
                (Some(object), _) => Fields::new(object, "rope_scaling."),
                (None, Some(object)) => Fields::new(object, "rope_parameters.full_attention."),
                (None, None) => Fields::new(&empty, ""),
            };
            let sliding = parameters.optional_object("sliding_attention")?.unwrap_or(&empty);
            let sliding = Fields::new(sliding, "rope_parameters.sliding_attention.");
            let read = |rope, theta| self.read_one(rope, theta, None, 1.0);
            let (full, sliding) = (read(full, theta)?, read(sliding, local_theta)?);
            let switches = [&full, &sliding].map(Rope::long_beyond);
            if let [Some(full), Some(sliding)] = switches
                && full != sliding
            {
                return Err(Error::Model(format!(
                    "full attention is made for {full} tokens at first and sliding attention for {sliding}, \
                     expected the same"
                )));
            }
            return Ok(vec![full, sliding]);
        }
        let rope = match (scaling, parameters) {
            (Some(object), _) => Fields::new(object, "rope_scaling."),
            (None, Some(object)) => Fields::new(object, "rope_parameters."),
            (None, None) => Fields::new(&empty, ""),
        };
        if let Some(name) = rope.names().find(|name| rope.get(name).is_some_and(Value::is_object)) {
            return Err(Error::Model(format!(
                "rope_parameters differ by layer ({name}), which {} doesn't know",
                self.architecture.name()
            )));
        }
        let mut original = fields.optional_dimension("original_max_position_embeddings")?;
        if self.architecture == Architecture::Phi3 {
            original = original.or(Some(PHI3_ORIGINAL_POSITIONS));
        }
        let partial = fields.optional_positive("partial_rotary_factor")?.unwrap_or(1.0);
        Ok(vec![self.read_one(rope, theta, original, partial)?])
    }

    /// One rope: `fields` are its own, the rest is what the top of the config says.
    fn read_one(
        &self,
        fields: Fields<'_>,
        theta: f64,
        original: Option<usize>,
        partial: f64,
    ) -> Result<Rope, Error> {
        let theta = fields.optional_positive("rope_theta")?.unwrap_or(theta);
        let name = match fields.optional_text("rope_type")? {
            Some(name) => name,
            None => fields.optional_text("type")?.unwrap_or("default"),
        };
        let is_phi3 = self.architecture == Architecture::Phi3;
        let partial = fields.optional_positive("partial_rotary_factor")?.unwrap_or(partial);
        let dim = self.rotated_dims(partial, name)?;
        let original = match original {
            Some(original) => original,
            None => fields.dimension("original_max_position_embeddings", self.max_positions)?,
        };
        let scaling = match name {
            "longrope" => self.longrope(&fields, dim, original)?,
            // So Phi-3's first checkpoints call it.
            "su" | "yarn" if is_phi3 => self.longrope(&fields, dim, original)?,
            // Stretches what is longer than `max_position_embeddings`, and no sequence is.
            "default" | "dynamic" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: fields.positive("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: fields.positive("factor")?,
                low_freq_factor: fields.positive("low_freq_factor")?,
                high_freq_factor: fields.positive("high_freq_factor")?,
                original_max_positions: original,
            },
            "yarn" => self.yarn(&fields, original)?,
            other => {
                return Err(fields.wrong(
                    "rope_type",
                    &other.into(),
                    "default, linear, dynamic, llama3, yarn or longrope",
                ));
            }
        };
        Ok(Rope { dim, theta, scaling })
    }

    /// Dimensions that are rotated. Only Phi-3 leaves some alone: the others' classes in transformers ignore
    /// the factor, or fail where the rope is scaled.
    fn rotated_dims(&self, partial: f64, rope_type: &str) -> Result<usize, Error> {
        let dim = match self.architecture {
            Architecture::Phi3 => (self.head_dim as f64 * partial) as usize,
            _ if partial == 1.0 || rope_type == "default" => self.head_dim,
            other => {
                return Err(Error::Model(format!(
                    "partial_rotary_factor is {partial}, which {} doesn't know",
                    other.name()
                )));
            }
        };
        if dim == 0 || dim > self.head_dim || !dim.is_multiple_of(2) {
            return Err(Error::Model(format!(
                "{dim} dimensions of a head of {} are rotated, expected an even number of them",
                self.head_dim
            )));
        }
        Ok(dim)
    }

    fn yarn(&self, fields: &Fields<'_>, original: usize) -> Result<RopeScaling, Error> {
        let factor = self.stretch(fields, original)?;
        let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let nonzero = |name: &str| match fields.get(name) {
            Some(value) if value.as_f64() == Some(0.0) => Ok(None),
            _ => fields.optional_positive(name),
        };
        let attention_factor = match (
            fields.optional_positive("attention_factor")?,
            nonzero("mscale")?,
            nonzero("mscale_all_dim")?,
        ) {
            (Some(given), _, _) => given,
            (None, Some(scale), Some(all)) => mscale(scale) / mscale(all),
            _ => mscale(1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
            beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
            truncate: fields.boolean("truncate", true)?,
            original_max_positions: original,
        })
    }

    fn longrope(
        &self,
        fields: &Fields<'_>,
        dim: usize,
        original: usize,
    ) -> Result<RopeScaling, Error> {
        let factor = self.stretch(fields, original)?;
        let attention_factor = match fields.optional_positive("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        Ok(RopeScaling::Longrope {
            short_factors: fields.positives("short_factor", dim / 2)?,
            long_factors: fields.positives("long_factor", dim / 2)?,
            attention_factor,
            original_max_positions: original,
        })
    }

    /// How much longer the window became.
    fn stretch(&self, fields: &Fields<'_>, original: usize) -> Result<f64, Error> {
        let stretched = self.max_positions as f64 / original as f64;
        Ok(fields.optional_positive("factor")?.unwrap_or(stretched))
    }
}
