//! What a model is: a checkpoint's `config.json`, read strictly.
//!
//! Every architecture is the same decoder with other settings; they are told apart here and nowhere else.
//! Both dialects are read: that of transformers 4 (`rope_theta`, `rope_scaling`) and that of 5
//! (`rope_parameters`). What would change the numbers and is not supported is an error, never ignored.

mod family;
mod fields;
mod layers;
mod rope;

pub use self::family::Architecture;

use std::path::Path;

use serde_json::{Map, Value};

use self::family::{Defaults, architecture};
use self::fields::Fields;
use self::layers::{experts, layers};
use self::rope::RopeContext;
use crate::Error;
use crate::model::rope::Rope;
use crate::model_files::ModelFiles;
use crate::step::TokenId;

/// What the gates of the feed-forward network go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// The Gaussian unit by its approximation with tanh.
    GeluTanh,
    /// The Gaussian unit.
    Gelu,
    /// `x * sigmoid(1.702 x)`
    QuickGelu,
    /// `max(x, 0)`
    Relu,
}

/// What sets one layer apart from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerConfig {
    /// Tokens that a token sees, itself included; all before it if `None`.
    pub sliding_window: Option<usize>,
    /// Index into [`ModelConfig::ropes`].
    pub rope: usize,
    /// Whether its feed-forward network is one of experts ([`ModelConfig::experts`]).
    pub experts: bool,
}

/// Layers whose feed-forward network is several, of which each token goes through a few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// Experts of a layer.
    pub num_experts: usize,
    /// Experts that a token goes through.
    pub num_experts_per_token: usize,
    /// Width inside an expert.
    pub intermediate_size: usize,
    /// Whether the weights of a token's experts are made to sum to 1.
    pub normalize_weights: bool,
}

/// What a decoder-only model looks like.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family it belongs to.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward network.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads of a layer.
    pub num_attention_heads: usize,
    /// Key and value heads of a layer.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of tokens it knows.
    pub vocab_size: usize,
    /// Longest sequence it was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f32,
    /// Added to the weights of norms when they are loaded.
    pub norm_offset: f32,
    /// Whether attention and the feed-forward network are normed behind as well as before.
    pub sandwich_norms: bool,
    /// What the gates of the feed-forward network go through.
    pub activation: Activation,
    /// Embeddings are multiplied by it.
    pub embedding_scale: f32,
    /// Products of queries and keys are multiplied by it.
    pub attention_scale: f32,
    /// Bound that the scaled products of queries and keys approach.
    pub attention_softcap: Option<f32>,
    /// Bound that the logits approach.
    pub output_softcap: Option<f32>,
    /// The ways in which positions enter attention; each layer names its own.
    pub ropes: Vec<Rope>,
    /// The layers, `num_hidden_layers` of them.
    pub layers: Vec<LayerConfig>,
    /// What the layers with experts look like, if there are such.
    pub experts: Option<ExpertsConfig>,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub attention_output_bias: bool,
    /// Whether queries and keys are normed, head by head.
    pub qk_norm: bool,
    /// Whether the feed-forward network has biases.
    pub mlp_bias: bool,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
    /// Tokens that end a sequence; the model's `generation_config.json` may name more.
    pub eos_token_ids: Vec<TokenId>,
    /// Token that begins a sequence.
    pub bos_token_id: Option<TokenId>,
    /// Token that fills up.
    pub pad_token_id: Option<TokenId>,
}

impl ModelConfig {
    /// Reads the configuration of a model: its `config.json`, or a GGUF file's settings.
    pub fn load(model_path: &Path) -> Result<Self, Error> {
        let files = ModelFiles::open(model_path)?;
        Self::parse(&files.required("config.json")?).map_err(|error| match error {
            Error::Model(message) => {
                Error::Model(format!("{}: {message}", files.name("config.json")))
            }
            other => other,
        })
    }

    /// Reads the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let object: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| Error::Model(format!("not a JSON object: {error}")))?;
        let top = Fields::new(&object, "");
        let architecture = architecture(&top)?;
        if top.get("quantization_config").is_some() {
            return Err(Error::Model("quantized checkpoints are not supported".into()));
        }
        // A model of several kinds of input keeps what concerns text in an object of its own.
        let mut object = match top.optional_object("text_config")? {
            Some(text) => text.clone(),
            None => return Self::from_fields(architecture, &top),
        };
        for name in ["tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"] {
            if let Some(value) = top.get(name) {
                object.insert(name.into(), value.clone());
            }
        }
        // transformers' class for it doesn't bound the logits, whatever the text's config says.
        let config = Self::from_fields(architecture, &Fields::new(&object, "text_config."))?;
        Ok(Self { output_softcap: None, ..config })
    }

    fn from_fields(architecture: Architecture, fields: &Fields<'_>) -> Result<Self, Error> {
        let defaults = Defaults::of(architecture);
        let hidden_size = fields.dimension("hidden_size", defaults.hidden_size)?;
        let (num_attention_heads, num_key_value_heads, head_dim) =
            heads(fields, &defaults, hidden_size)?;
        let max_position_embeddings =
            fields.dimension("max_position_embeddings", defaults.max_position_embeddings)?;
        let layers = layers(architecture, fields, &defaults)?;
        let ropes = RopeContext {
            architecture,
            head_dim,
            max_positions: max_position_embeddings,
            default_theta: defaults.rope_theta,
        };
        let intermediate_size =
            fields.dimension("intermediate_size", defaults.intermediate_size)?;
        let attention_bias = fields.boolean("attention_bias", false)?;
        let biased = |kinds: &[Architecture]| attention_bias && kinds.contains(&architecture);
        let attention_output_bias =
            biased(&[Architecture::Llama, Architecture::Qwen3, Architecture::Qwen3Moe])
                || attention_bias && architecture.is_gemma();
        let (attention_softcap, output_softcap) = softcaps(architecture, fields)?;
        let token =
            |name, default| Ok::<_, Error>(fields.token_ids(name, default)?.first().copied());
        Ok(Self {
            architecture,
            hidden_size,
            intermediate_size,
            num_hidden_layers: layers.len(),
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.dimension("vocab_size", defaults.vocab_size)?,
            max_position_embeddings,
            rms_norm_eps: fields.optional_positive("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps)
                as f32,
            norm_offset: if architecture.is_gemma() { 1.0 } else { 0.0 },
            sandwich_norms: architecture.is_gemma(),
            activation: activation(architecture, fields)?,
            embedding_scale: if architecture.is_gemma() { (hidden_size as f64).sqrt() } else { 1.0 }
                as f32,
            attention_scale: attention_scale(architecture, fields, head_dim)?,
            attention_softcap,
            output_softcap,
            ropes: ropes.read(fields)?,
            experts: experts(architecture, fields, intermediate_size)?
                .filter(|_| layers.iter().any(|layer| layer.experts)),
            layers,
            qkv_bias: attention_output_bias || architecture == Architecture::Qwen2,
            attention_output_bias,
            qk_norm: matches!(
                architecture,
                Architecture::Qwen3 | Architecture::Qwen3Moe | Architecture::Gemma3
            ),
            mlp_bias: architecture == Architecture::Llama && fields.boolean("mlp_bias", false)?,
            tie_word_embeddings: fields
                .boolean("tie_word_embeddings", defaults.tie_word_embeddings)?,
            eos_token_ids: fields.token_ids("eos_token_id", defaults.eos_token_id)?,
            bos_token_id: token("bos_token_id", defaults.bos_token_id)?,
            pad_token_id: token("pad_token_id", defaults.pad_token_id)?,
        })
    }

    /// Query heads that share a key and value head.
    pub fn heads_per_kv_head(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key heads together, and of all value heads.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Tokens beyond which all positions of a sequence are rotated otherwise (longrope), if there is such a
    /// length.
    pub fn long_context_beyond(&self) -> Option<usize> {
        self.ropes.iter().find_map(Rope::long_beyond)
    }
}

/// Query heads, key and value heads, and the width of one.
fn heads(
    fields: &Fields<'_>,
    defaults: &Defaults,
    hidden_size: usize,
) -> Result<(usize, usize, usize), Error> {
    let num_attention_heads =
        fields.dimension("num_attention_heads", defaults.num_attention_heads)?;
    let num_key_value_heads = fields
        .nullable_dimension("num_key_value_heads", defaults.num_key_value_heads)?
        .unwrap_or(num_attention_heads);
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        return Err(Error::Model(format!(
            "num_attention_heads ({num_attention_heads}) is not a multiple of num_key_value_heads \
             ({num_key_value_heads})"
        )));
    }
    let head_dim = match fields.optional_dimension("head_dim")?.or(defaults.head_dim) {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_attention_heads) => {
            hidden_size / num_attention_heads
        }
        None => {
            return Err(Error::Model(format!(
                "hidden_size ({hidden_size}) is not a multiple of num_attention_heads \
                 ({num_attention_heads})"
            )));
        }
    };
    Ok((num_attention_heads, num_key_value_heads, head_dim))
}

fn activation(architecture: Architecture, fields: &Fields<'_>) -> Result<Activation, Error> {
    let (field, default) = if architecture.is_gemma() {
        ("hidden_activation", "gelu_pytorch_tanh")
    } else {
        ("hidden_act", "silu")
    };
    match fields.optional_text(field)?.unwrap_or(default) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" | "gelu_accurate" | "gelu_python_tanh" => {
            Ok(Activation::GeluTanh)
        }
        "gelu" | "gelu_python" => Ok(Activation::Gelu),
        "quick_gelu" => Ok(Activation::QuickGelu),
        "relu" => Ok(Activation::Relu),
        other => {
            let expected = "silu, gelu, gelu_new, gelu_pytorch_tanh, quick_gelu or relu";
            Err(fields.wrong(field, &other.into(), expected))
        }
    }
}

fn attention_scale(
    architecture: Architecture,
    fields: &Fields<'_>,
    head_dim: usize,
) -> Result<f32, Error> {
    let scalar = if architecture.is_gemma() {
        fields.optional_positive("query_pre_attn_scalar")?.unwrap_or(256.0)
    } else {
        head_dim as f64
    };
    Ok(scalar.powf(-0.5) as f32)
}

/// Bounds of attention's scores and of the logits. Gemma 3 has a field for the first, and no use for it.
fn softcaps(
    architecture: Architecture,
    fields: &Fields<'_>,
) -> Result<(Option<f32>, Option<f32>), Error> {
    if architecture.is_gemma() && fields.boolean("use_bidirectional_attention", false)? {
        return Err(Error::Model("use_bidirectional_attention is not supported".into()));
    }
    let cap = |name, default| {
        Ok::<_, Error>(fields.nullable_positive(name, default)?.map(|cap| cap as f32))
    };
    match architecture {
        Architecture::Gemma2 => Ok((
            cap("attn_logit_softcapping", Some(50.0))?,
            cap("final_logit_softcapping", Some(30.0))?,
        )),
        Architecture::Gemma3 => Ok((None, cap("final_logit_softcapping", None)?)),
        _ => Ok((None, None)),
    }
}

#[cfg(test)]
mod tests;
