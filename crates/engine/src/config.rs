//! A checkpoint's `config.json`: what the model is, read strictly.
//!
//! Both dialects are read: that of transformers 4 (`rope_theta`, `rope_scaling`) and that of 5
//! (`rope_parameters`). What would change the numbers and is not supported is an error, never ignored.

use std::path::Path;

use serde_json::{Map, Value};

use crate::Error;
use crate::model::rope::{Rope, RopeScaling};
use crate::step::TokenId;

/// No dimension of a model is larger; what is, is a damaged file.
const MAX_DIMENSION: usize = 1 << 24;

/// Most layers.
const MAX_LAYERS: usize = 1 << 12;

/// What a decoder-only model looks like.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
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
    /// How positions enter attention.
    pub rope: Rope,
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
    /// Reads `config.json` in a model's folder.
    pub fn load(model_path: &Path) -> Result<Self, Error> {
        let path = model_path.join("config.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) => return Err(Error::Io { path, source }),
        };
        Self::parse(&text).map_err(|error| match error {
            Error::Model(message) => Error::Model(format!("{}: {message}", path.display())),
            other => other,
        })
    }

    /// Reads the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let object: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| Error::Model(format!("not a JSON object: {error}")))?;
        let fields = Fields { object: &object, prefix: "" };
        check_supported(&fields)?;
        let hidden_size = fields.dimension("hidden_size")?;
        let num_attention_heads = fields.dimension("num_attention_heads")?;
        let num_key_value_heads =
            fields.optional_dimension("num_key_value_heads")?.unwrap_or(num_attention_heads);
        let head_dim = head_dim(&fields, hidden_size, num_attention_heads)?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(Error::Model(format!(
                "num_attention_heads ({num_attention_heads}) is not a multiple of num_key_value_heads \
                 ({num_key_value_heads})"
            )));
        }
        let max_position_embeddings = fields.dimension("max_position_embeddings")?;
        let attention_bias = fields.boolean("attention_bias", false)?;
        let config = Self {
            hidden_size,
            intermediate_size: fields.dimension("intermediate_size")?,
            num_hidden_layers: fields.dimension("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.dimension("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: fields.positive("rms_norm_eps")? as f32,
            rope: rope(&fields, head_dim, max_position_embeddings)?,
            qkv_bias: attention_bias,
            attention_output_bias: attention_bias,
            qk_norm: false,
            mlp_bias: fields.boolean("mlp_bias", false)?,
            tie_word_embeddings: fields.boolean("tie_word_embeddings", false)?,
            eos_token_ids: fields.token_ids("eos_token_id")?,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            pad_token_id: fields.token_ids("pad_token_id")?.first().copied(),
        };
        if config.num_hidden_layers > MAX_LAYERS {
            return Err(Error::Model(format!(
                "num_hidden_layers is {}, expected at most {MAX_LAYERS}",
                config.num_hidden_layers
            )));
        }
        Ok(config)
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
}

fn check_supported(fields: &Fields<'_>) -> Result<(), Error> {
    let architectures = fields.object.get("architectures").and_then(Value::as_array);
    let architecture = architectures.and_then(|list| list.first()).and_then(Value::as_str);
    let model_type = fields.object.get("model_type").and_then(Value::as_str);
    match (architecture, model_type) {
        (Some("LlamaForCausalLM"), _) | (None, Some("llama")) => {}
        (Some(other), _) | (None, Some(other)) => {
            return Err(Error::Model(format!(
                "the architecture {other} is not supported, expected LlamaForCausalLM"
            )));
        }
        (None, None) => {
            return Err(Error::Model(
                "neither architectures nor model_type is given, expected LlamaForCausalLM".into(),
            ));
        }
    }
    match fields.object.get("hidden_act") {
        None | Some(Value::Null) => {}
        Some(Value::String(name)) if name == "silu" || name == "swish" => {}
        Some(other) => {
            return Err(Error::Model(format!(
                "hidden_act {other} is not supported, expected \"silu\""
            )));
        }
    }
    if fields.object.get("quantization_config").is_some_and(|value| !value.is_null()) {
        return Err(Error::Model("quantized checkpoints are not supported".into()));
    }
    Ok(())
}

fn head_dim(fields: &Fields<'_>, hidden_size: usize, num_heads: usize) -> Result<usize, Error> {
    let head_dim = match fields.optional_dimension("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return Err(Error::Model(format!(
                "hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads})"
            )));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(Error::Model(format!("head_dim is {head_dim}, expected an even number")));
    }
    Ok(head_dim)
}

/// Reads `rope_parameters`, or `rope_theta` and `rope_scaling`.
fn rope(fields: &Fields<'_>, head_dim: usize, max_positions: usize) -> Result<Rope, Error> {
    let empty = Map::new();
    let top_theta = fields.optional_positive("rope_theta")?;
    let (object, prefix) =
        match (fields.object.get("rope_parameters"), fields.object.get("rope_scaling")) {
            (Some(Value::Object(object)), _) => (object, "rope_parameters."),
            (None | Some(Value::Null), Some(Value::Object(object))) => (object, "rope_scaling."),
            (None | Some(Value::Null), None | Some(Value::Null)) => (&empty, ""),
            _ => {
                return Err(Error::Model(
                    "rope_parameters or rope_scaling is not an object".into(),
                ));
            }
        };
    let scaling = Fields { object, prefix };
    let theta = scaling.optional_positive("rope_theta")?.or(top_theta).unwrap_or(10_000.0);
    for (holder, fields) in [("", fields), (prefix, &scaling)] {
        let partial = fields.optional_positive("partial_rotary_factor")?;
        if partial.is_some_and(|factor| factor != 1.0) {
            return Err(Error::Model(format!("{holder}partial_rotary_factor is not supported")));
        }
    }
    let name = object.get("rope_type").or_else(|| object.get("type"));
    let name = match name {
        None | Some(Value::Null) => "default",
        Some(Value::String(name)) => name,
        Some(other) => {
            return Err(Error::Model(format!("{prefix}rope_type is {other}, expected a string")));
        }
    };
    let original = scaling
        .optional_dimension("original_max_position_embeddings")?
        .or(fields.optional_dimension("original_max_position_embeddings")?);
    let scaling = match name {
        // The dynamic kind changes nothing before `max_position_embeddings`, and no sequence goes beyond.
        "default" | "dynamic" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: scaling.positive("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: scaling.positive("factor")?,
            low_freq_factor: scaling.positive("low_freq_factor")?,
            high_freq_factor: scaling.positive("high_freq_factor")?,
            original_max_positions: original.unwrap_or(max_positions),
        },
        "yarn" => yarn(&scaling, original.unwrap_or(max_positions))?,
        other => {
            return Err(Error::Model(format!(
                "{prefix}rope_type \"{other}\" is not supported, expected default, linear, dynamic, llama3 or yarn"
            )));
        }
    };
    Ok(Rope { dim: head_dim, theta, scaling })
}

fn yarn(fields: &Fields<'_>, original_max_positions: usize) -> Result<RopeScaling, Error> {
    let factor = fields.positive("factor")?;
    let mscale = |scale: f64| {
        if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
    };
    let attention_factor = match (
        fields.optional_positive("attention_factor")?,
        fields.optional_positive("mscale")?,
        fields.optional_positive("mscale_all_dim")?,
    ) {
        (Some(given), _, _) => given,
        (None, Some(scale), Some(all)) => mscale(scale) / mscale(all),
        _ => mscale(1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor,
        beta_fast: fields.optional_positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: fields.optional_positive("beta_slow")?.unwrap_or(1.0),
        truncate: fields.boolean("truncate", true)?,
        original_max_positions,
    })
}

/// The fields of one JSON object, each read with its check.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    prefix: &'a str,
}

impl Fields<'_> {
    fn wrong(&self, name: &str, value: &Value, expected: &str) -> Error {
        Error::Model(format!("{}{name} is {value}, expected {expected}", self.prefix))
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    fn optional_dimension(&self, name: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|value| usize::try_from(value).ok()) {
            Some(number) if (1..=MAX_DIMENSION).contains(&number) => Ok(Some(number)),
            _ => Err(self.wrong(name, value, &format!("an integer from 1 to {MAX_DIMENSION}"))),
        }
    }

    fn dimension(&self, name: &str) -> Result<usize, Error> {
        self.optional_dimension(name)?.ok_or_else(|| self.missing(name))
    }

    fn optional_positive(&self, name: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(name, value, "a positive number")),
        }
    }

    fn positive(&self, name: &str) -> Result<f64, Error> {
        self.optional_positive(name)?.ok_or_else(|| self.missing(name))
    }

    fn boolean(&self, name: &str, default: bool) -> Result<bool, Error> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        value.as_bool().ok_or_else(|| self.wrong(name, value, "true or false"))
    }

    /// One token, several or none.
    fn token_ids(&self, name: &str) -> Result<Vec<TokenId>, Error> {
        let Some(value) = self.get(name) else {
            return Ok(Vec::new());
        };
        let ids = match value {
            Value::Array(values) => values.iter().collect(),
            single => vec![single],
        };
        ids.into_iter()
            .map(|id| id.as_u64().and_then(|id| TokenId::try_from(id).ok()))
            .collect::<Option<_>>()
            .ok_or_else(|| self.wrong(name, value, "a token id or a list of them"))
    }

    fn missing(&self, name: &str) -> Error {
        Error::Model(format!("{}{name} is missing", self.prefix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Value {
        serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "eos_token_id": 2
        })
    }

    #[expect(clippy::needless_pass_by_value, reason = "called with literals")]
    fn with(changes: Value) -> Result<ModelConfig, Error> {
        let mut config = base();
        for (name, value) in changes.as_object().unwrap() {
            config[name] = value.clone();
        }
        ModelConfig::parse(&config.to_string())
    }

    #[test]
    fn left_out_fields_have_their_defaults() {
        let config = with(serde_json::json!({})).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim), (4, 16));
        assert_eq!(config.rope, Rope { dim: 16, theta: 10_000.0, scaling: RopeScaling::None });
        assert_eq!(config.eos_token_ids, [2]);
        assert!(!config.tie_word_embeddings && !config.qkv_bias);
    }

    #[test]
    fn both_dialects_of_rope_mean_the_same() {
        let scaling = serde_json::json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64
        });
        let old = with(serde_json::json!({"rope_theta": 5e5, "rope_scaling": scaling})).unwrap();
        let mut parameters = scaling;
        parameters["rope_theta"] = 5e5.into();
        let new = with(serde_json::json!({"rope_parameters": parameters})).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.rope.theta, 5e5);
        let linear =
            with(serde_json::json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap();
        assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            (
                serde_json::json!({"architectures": ["GPT2LMHeadModel"]}),
                "GPT2LMHeadModel is not supported",
            ),
            (serde_json::json!({"hidden_act": "gelu"}), "hidden_act"),
            (serde_json::json!({"hidden_size": 63}), "not a multiple"),
            (serde_json::json!({"hidden_size": "64"}), "hidden_size is \"64\""),
            (serde_json::json!({"hidden_size": null}), "hidden_size is missing"),
            (serde_json::json!({"vocab_size": 0}), "vocab_size is 0"),
            (serde_json::json!({"vocab_size": 1e18}), "vocab_size"),
            (serde_json::json!({"num_hidden_layers": 100_000}), "num_hidden_layers"),
            (serde_json::json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (serde_json::json!({"head_dim": 15}), "even"),
            (serde_json::json!({"rms_norm_eps": -1}), "rms_norm_eps"),
            (serde_json::json!({"rope_scaling": {"rope_type": "longrope"}}), "longrope"),
            (
                serde_json::json!({"rope_scaling": {"rope_type": "linear"}}),
                "rope_scaling.factor is missing",
            ),
            (serde_json::json!({"rope_scaling": 4}), "not an object"),
            (serde_json::json!({"eos_token_id": "x"}), "eos_token_id"),
            (serde_json::json!({"quantization_config": {"bits": 4}}), "quantized"),
        ];
        for (changes, want) in cases {
            let error = with(changes.clone()).unwrap_err().to_string();
            assert!(error.contains(want), "{changes}: {error}");
        }
        assert!(ModelConfig::parse("[1]").unwrap_err().to_string().contains("JSON object"));
    }
}
