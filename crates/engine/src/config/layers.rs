//! Reads what sets the layers of a model apart: windows, ropes, experts.

use serde_json::Value;

use super::family::Defaults;
use super::fields::Fields;
use super::{Architecture, ExpertsConfig, LayerConfig};
use crate::Error;

/// Most layers.
const MAX_LAYERS: usize = 1 << 12;

/// What each layer is: which see only a window, which have experts.
pub(super) fn layers(
    architecture: Architecture,
    fields: &Fields<'_>,
    defaults: &Defaults,
) -> Result<Vec<LayerConfig>, Error> {
    let num_layers = fields.dimension("num_hidden_layers", defaults.num_hidden_layers)?;
    if num_layers > MAX_LAYERS {
        return Err(Error::Model(format!(
            "num_hidden_layers is {num_layers}, expected at most {MAX_LAYERS}"
        )));
    }
    let mut window = fields.nullable_dimension("sliding_window", defaults.sliding_window)?;
    if matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Qwen3Moe) {
        window = window.filter(|_| fields.get("use_sliding_window") == Some(&Value::Bool(true)));
    }
    let sliding = sliding_layers(architecture, fields, num_layers, window.is_some())?;
    let dense = fields.indices("mlp_only_layers")?;
    let sparse_step = fields.dimension("decoder_sparse_step", 1)?;
    (0..num_layers)
        .map(|layer| {
            let sliding_window = match (sliding[layer], window) {
                (false, _) => None,
                (true, Some(window)) => Some(window),
                (true, None) => {
                    return Err(Error::Model(format!(
                        "layer {layer} is one of sliding attention, but there is no sliding_window"
                    )));
                }
            };
            let rope = usize::from(architecture == Architecture::Gemma3 && sliding[layer]);
            let experts = match architecture {
                Architecture::Mixtral => true,
                Architecture::Qwen3Moe => {
                    !dense.contains(&layer) && (layer + 1).is_multiple_of(sparse_step)
                }
                _ => false,
            };
            Ok(LayerConfig { sliding_window, rope, experts })
        })
        .collect()
}

/// Which layers see only a window.
fn sliding_layers(
    architecture: Architecture,
    fields: &Fields<'_>,
    num_layers: usize,
    has_window: bool,
) -> Result<Vec<bool>, Error> {
    let every = |rule: &dyn Fn(usize) -> bool| Ok((0..num_layers).map(rule).collect());
    match architecture {
        Architecture::Llama => return every(&|_| false),
        Architecture::Mistral
        | Architecture::Mixtral
        | Architecture::Phi3
        | Architecture::Qwen3Moe => return every(&|_| has_window),
        Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Gemma2 | Architecture::Gemma3 => {
        }
    }
    if let Some(value) = fields.get("layer_types") {
        let kind = |value: &Value| match value.as_str() {
            Some("full_attention") => Some(false),
            Some("sliding_attention") => Some(true),
            _ => None,
        };
        let kinds: Option<Vec<bool>> =
            value.as_array().and_then(|list| list.iter().map(kind).collect());
        return kinds.filter(|kinds| kinds.len() == num_layers).ok_or_else(|| {
            let expected = format!("{num_layers} times full_attention or sliding_attention");
            fields.wrong("layer_types", value, &expected)
        });
    }
    match architecture {
        Architecture::Gemma2 => every(&|layer| layer % 2 == 0),
        Architecture::Gemma3 => {
            let period = fields.dimension("sliding_window_pattern", 6)?;
            every(&|layer| !(layer + 1).is_multiple_of(period))
        }
        _ => {
            let first = match fields.get("max_window_layers").map(|value| (value, value.as_u64())) {
                None => 28,
                Some((_, Some(first))) => first,
                Some((value, None)) => {
                    return Err(fields.wrong("max_window_layers", value, "a number of layers"));
                }
            };
            every(&|layer| has_window && layer as u64 >= first)
        }
    }
}

/// What layers with experts look like.
pub(super) fn experts(
    architecture: Architecture,
    fields: &Fields<'_>,
    intermediate_size: usize,
) -> Result<Option<ExpertsConfig>, Error> {
    let (default_experts, default_per_token) = match architecture {
        Architecture::Mixtral => (8, 2),
        Architecture::Qwen3Moe => (128, 8),
        _ => return Ok(None),
    };
    let is_qwen = architecture == Architecture::Qwen3Moe;
    let num_experts = match fields.optional_dimension("num_experts")? {
        Some(num_experts) => num_experts,
        None => fields.dimension("num_local_experts", default_experts)?,
    };
    let num_experts_per_token = fields.dimension("num_experts_per_tok", default_per_token)?;
    if num_experts_per_token > num_experts {
        return Err(Error::Model(format!(
            "num_experts_per_tok is {num_experts_per_token}, expected at most the {num_experts} experts"
        )));
    }
    Ok(Some(ExpertsConfig {
        num_experts,
        num_experts_per_token,
        intermediate_size: if is_qwen {
            fields.dimension("moe_intermediate_size", 768)?
        } else {
            intermediate_size
        },
        normalize_weights: !is_qwen || fields.boolean("norm_topk_prob", false)?,
    }))
}
