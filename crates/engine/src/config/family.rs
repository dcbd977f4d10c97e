//! The architectures, and what each takes for granted where a `config.json` leaves a field out.
//!
//! These are the defaults of the architecture's class in transformers, which leaves out of a `config.json`
//! what equals them, and reads configs that people wrote by hand.

use serde_json::Value;

use super::fields::Fields;
use crate::Error;
use crate::step::TokenId;

/// A family of models, named after its class in transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1 to 3, TinyLlama and what follows them.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Mixtral: Mistral with experts.
    Mixtral,
    /// Qwen 2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: norms of queries and keys.
    Qwen3,
    /// Qwen 3 with experts.
    Qwen3Moe,
    /// Phi-3, 3.5 and 4: fused projections, longrope.
    Phi3,
    /// Gemma 2: soft-capping, every other layer local.
    Gemma2,
    /// Gemma 3, the text model: five of six layers local, with a rope of their own.
    Gemma3,
}

impl Architecture {
    /// The name of its class in transformers.
    pub fn name(self) -> &'static str {
        let class = CLASSES.iter().find(|(_, _, architecture)| *architecture == self);
        class.map_or("", |(name, _, _)| name)
    }

    pub(super) fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }
}

/// Classes of transformers, with the `model_type` of their configs.
const CLASSES: [(&str, &str, Architecture); 10] = [
    ("LlamaForCausalLM", "llama", Architecture::Llama),
    ("MistralForCausalLM", "mistral", Architecture::Mistral),
    ("MixtralForCausalLM", "mixtral", Architecture::Mixtral),
    ("Qwen2ForCausalLM", "qwen2", Architecture::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Architecture::Qwen3),
    ("Qwen3MoeForCausalLM", "qwen3_moe", Architecture::Qwen3Moe),
    ("Phi3ForCausalLM", "phi3", Architecture::Phi3),
    ("Gemma2ForCausalLM", "gemma2", Architecture::Gemma2),
    ("Gemma3ForCausalLM", "gemma3_text", Architecture::Gemma3),
    ("Gemma3ForConditionalGeneration", "gemma3", Architecture::Gemma3),
];

/// Defaults of an architecture.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    /// As many as query heads if `None`.
    pub(super) num_key_value_heads: Option<usize>,
    /// `hidden_size / num_attention_heads` if `None`.
    pub(super) head_dim: Option<usize>,
    pub(super) max_position_embeddings: usize,
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) sliding_window: Option<usize>,
    pub(super) tie_word_embeddings: bool,
    pub(super) bos_token_id: Option<TokenId>,
    pub(super) eos_token_id: Option<TokenId>,
    pub(super) pad_token_id: Option<TokenId>,
}

const LLAMA: Defaults = Defaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 11_008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
    rope_theta: 1e4,
    sliding_window: None,
    tie_word_embeddings: false,
    bos_token_id: Some(1),
    eos_token_id: Some(2),
    pad_token_id: None,
};

const MISTRAL: Defaults = Defaults {
    intermediate_size: 14_336,
    num_key_value_heads: Some(8),
    max_position_embeddings: 131_072,
    sliding_window: Some(4096),
    ..LLAMA
};

const QWEN2: Defaults = Defaults {
    vocab_size: 151_936,
    intermediate_size: 22_016,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    sliding_window: Some(4096),
    bos_token_id: None,
    eos_token_id: None,
    ..LLAMA
};

const GEMMA2: Defaults = Defaults {
    vocab_size: 256_000,
    hidden_size: 2304,
    intermediate_size: 9216,
    num_hidden_layers: 26,
    num_attention_heads: 8,
    num_key_value_heads: Some(4),
    head_dim: Some(256),
    max_position_embeddings: 8192,
    sliding_window: Some(4096),
    tie_word_embeddings: true,
    bos_token_id: Some(2),
    eos_token_id: Some(1),
    pad_token_id: Some(0),
    ..LLAMA
};

impl Defaults {
    pub(super) fn of(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Llama => LLAMA,
            Architecture::Mistral => MISTRAL,
            Architecture::Mixtral => {
                Self { rms_norm_eps: 1e-5, rope_theta: 1e6, sliding_window: None, ..MISTRAL }
            }
            Architecture::Qwen2 => QWEN2,
            Architecture::Qwen3 => Self { head_dim: Some(128), ..QWEN2 },
            Architecture::Qwen3Moe => Self {
                hidden_size: 2048,
                intermediate_size: 6144,
                num_hidden_layers: 24,
                num_key_value_heads: Some(4),
                ..QWEN2
            },
            Architecture::Phi3 => Self {
                vocab_size: 32_064,
                hidden_size: 3072,
                intermediate_size: 8192,
                max_position_embeddings: 4096,
                rms_norm_eps: 1e-5,
                eos_token_id: Some(32_000),
                pad_token_id: Some(32_000),
                ..LLAMA
            },
            Architecture::Gemma2 => GEMMA2,
            Architecture::Gemma3 => Self {
                vocab_size: 262_208,
                max_position_embeddings: 131_072,
                rope_theta: 1e6,
                ..GEMMA2
            },
        }
    }
}

/// The family: by the name of the class, or by the type of the config where that is left out.
pub(super) fn architecture(fields: &Fields<'_>) -> Result<Architecture, Error> {
    let expected = || {
        let names: Vec<_> = CLASSES.iter().map(|(class, _, _)| *class).collect();
        format!("expected one of {}", names.join(", "))
    };
    let class = fields.get("architectures").and_then(Value::as_array);
    let class = class.and_then(|list| list.first()).and_then(Value::as_str);
    let model_type = fields.optional_text("model_type")?;
    // A model without its output layer has the embedding for it, or is refused for the want of it later.
    let is_of = |class: &str, name: &str| {
        let family = class.strip_suffix("ForCausalLM");
        let bare = family.and_then(|family| name.strip_prefix(family));
        class == name || matches!(bare, Some("Model" | "TextModel"))
    };
    let by_class = |name: &str| CLASSES.iter().find(|(class, _, _)| is_of(class, name));
    let by_type = |name: &str| CLASSES.iter().find(|(_, model_type, _)| *model_type == name);
    let (given, found) = match (class, model_type) {
        (Some(class), _) => (class, by_class(class)),
        (None, Some(model_type)) => (model_type, by_type(model_type)),
        (None, None) => {
            return Err(Error::Model(format!(
                "neither architectures nor model_type is given, {}",
                expected()
            )));
        }
    };
    let Some((class, _, architecture)) = found else {
        return Err(Error::Model(format!(
            "the architecture {given} is not supported, {}",
            expected()
        )));
    };
    match model_type.map(|name| (name, by_type(name))) {
        Some((name, other)) if other.is_none_or(|(_, _, other)| other != architecture) => {
            Err(Error::Model(format!("the architecture is {class} but the model_type is {name}")))
        }
        _ => Ok(*architecture),
    }
}
