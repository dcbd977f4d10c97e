//! The `config.json` that a GGUF file stands for.

use serde_json::{Map, Value as Json, json};

use super::{Gguf, Settings};
use crate::Error;

/// The families that are supported, with transformers' classes.
const FAMILIES: [(&str, &str); 7] = [
    ("llama", "LlamaForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
    ("qwen3moe", "Qwen3MoeForCausalLM"),
    ("phi3", "Phi3ForCausalLM"),
    ("gemma2", "Gemma2ForCausalLM"),
    ("gemma3", "Gemma3ForCausalLM"),
];
/// Local layers of Gemma 3 rotate with this base, whatever the global ones do.
const GEMMA_3_LOCAL_ROPE_BASE: f64 = 10_000.0;
/// One layer in so many of Gemma 3 is global.
const GEMMA_3_PATTERN: u64 = 6;
/// Layers that are looked at.
const MAX_LAYERS: u64 = 1 << 12;
/// Layers of the largest Gemma 2 and Gemma 3, which scale attention by another width than their heads'.
const GEMMA_27B_LAYERS: [(&str, u64); 2] = [("gemma2", 46), ("gemma3", 62)];

/// Writes the configuration.
pub(super) fn config(gguf: &Gguf) -> Result<Json, Error> {
    let settings = gguf.settings();
    let name = settings.supported_family()?;
    let key = |key: &str| format!("{name}.{key}");
    let required = |what: &str| -> Result<u64, Error> {
        settings.uniform(&key(what))?.ok_or_else(|| settings.missing(&key(what)))
    };
    let num_experts = settings.unsigned(&key("expert_count"))?.filter(|count| *count > 0);
    let sliding_window = settings.unsigned(&key("attention.sliding_window"))?;
    let class = class(name, num_experts.is_some(), sliding_window.is_some());
    let activation = if name.starts_with("gemma") { "gelu_pytorch_tanh" } else { "silu" };
    let (hidden, heads) = (required("embedding_length")?, required("attention.head_count")?);
    if heads == 0 {
        return Err(settings.wrong("has no attention heads"));
    }
    let head_dim = settings.unsigned(&key("attention.key_length"))?.unwrap_or(hidden / heads);
    if settings.unsigned(&key("attention.value_length"))?.is_some_and(|width| width != head_dim) {
        return Err(
            settings.wrong("has values of another width than its keys, which is not supported")
        );
    }
    let embedding = gguf.tensor("token_embd.weight").map(|(_, info)| info.shape[0]);
    let has = |name: &str| gguf.tensor(name).is_some();
    let eps = key("attention.layer_norm_rms_epsilon");
    let context = required("context_length")?;
    let mut config = json!({
        "architectures": [class],
        "hidden_act": activation,
        "hidden_activation": activation,
        "hidden_size": hidden,
        "intermediate_size": settings.uniform(&key("feed_forward_length"))?,
        "num_hidden_layers": required("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.kv_heads(name)?,
        "head_dim": head_dim,
        "vocab_size": embedding,
        "max_position_embeddings": context,
        "rms_norm_eps": settings.float(&eps)?.ok_or_else(|| settings.missing(&eps))?,
        "attention_bias": has("blk.0.attn_q.bias"),
        "mlp_bias": has("blk.0.ffn_down.bias"),
        "tie_word_embeddings": !has("output.weight"),
        "bos_token_id": settings.unsigned("tokenizer.ggml.bos_token_id")?,
        "pad_token_id": settings.unsigned("tokenizer.ggml.padding_token_id")?,
        "eos_token_id": settings.unsigned("tokenizer.ggml.eos_token_id")?,
        "sliding_window": sliding_window,
        "rope_theta": settings.float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        "rope_scaling": rope_scaling(gguf, name, context)?,
        "original_max_position_embeddings":
            settings.unsigned(&key("rope.scaling.original_context_length"))?,
    });
    let Json::Object(fields) = &mut config else { return Ok(config) };
    if let Some(dim) = settings.unsigned(&key("rope.dimension_count"))?
        && dim != head_dim
    {
        fields.insert("partial_rotary_factor".into(), json!(dim as f64 / head_dim as f64));
    }
    if let Some(num_experts) = num_experts {
        experts(gguf, name, num_experts, fields)?;
    }
    if name.starts_with("gemma") {
        gemma(&settings, name, (hidden / heads, head_dim), fields)?;
    }
    fields.retain(|_, value| !value.is_null());
    Ok(config)
}

/// transformers' class of a family. Files of Mistral and Mixtral have Llama's.
fn class(family: &str, has_experts: bool, has_window: bool) -> Option<&'static str> {
    match family {
        "llama" if has_experts => Some("MixtralForCausalLM"),
        "llama" if has_window => Some("MistralForCausalLM"),
        _ => FAMILIES.iter().find(|(name, _)| *name == family).map(|(_, class)| *class),
    }
}

fn experts(
    gguf: &Gguf,
    name: &str,
    num_experts: u64,
    fields: &mut Map<String, Json>,
) -> Result<(), Error> {
    let settings = gguf.settings();
    let num_layers = fields["num_hidden_layers"].as_u64().unwrap_or_default();
    let has_router =
        |layer: &u64| gguf.tensor(&format!("blk.{layer}.ffn_gate_inp.weight")).is_some();
    // More layers than the file can have are refused later; they must not become a list.
    let layers = 0..num_layers.min(MAX_LAYERS);
    let dense: Vec<u64> = layers.filter(|layer| !has_router(layer)).collect();
    fields.insert("mlp_only_layers".into(), json!(dense));
    let used = format!("{name}.expert_used_count");
    let used = settings.unsigned(&used)?.ok_or_else(|| settings.missing(&used))?;
    // Both spellings: each class reads its own.
    fields.insert("num_local_experts".into(), json!(num_experts));
    fields.insert("num_experts".into(), json!(num_experts));
    fields.insert("num_experts_per_tok".into(), json!(used));
    let width = settings.unsigned(&format!("{name}.expert_feed_forward_length"))?;
    if let Some(width) = width {
        fields.insert("moe_intermediate_size".into(), json!(width));
        // A model of experts alone has no other width.
        if fields["intermediate_size"].is_null() {
            fields.insert("intermediate_size".into(), json!(width));
        }
    }
    let normalises = settings.boolean(&format!("{name}.expert_weights_norm"))?.unwrap_or(true);
    fields.insert("norm_topk_prob".into(), json!(normalises));
    Ok(())
}

fn gemma(
    settings: &Settings<'_>,
    name: &str,
    (width, head_dim): (u64, u64),
    fields: &mut Map<String, Json>,
) -> Result<(), Error> {
    let num_layers = fields["num_hidden_layers"].as_u64().unwrap_or_default();
    let is_largest = GEMMA_27B_LAYERS.contains(&(name, num_layers));
    let scalar = match settings.float(&format!("{name}.attention.scale"))? {
        Some(scale) if scale > 0.0 => (1.0 / (scale * scale)).round() as u64,
        _ if is_largest => width,
        _ => head_dim,
    };
    fields.insert("query_pre_attn_scalar".into(), json!(scalar));
    for (field, key) in [
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ] {
        let cap = settings.float(&format!("{name}.{key}"))?.filter(|cap| *cap > 0.0);
        fields.insert(field.into(), json!(cap));
    }
    let pattern = settings.numbers(&format!("{name}.attention.sliding_window_pattern"))?;
    if let Some(layers) = pattern.as_ref().filter(|layers| layers.len() > 1) {
        let kind = |local: &f64| {
            if *local == 0.0 { "full_attention" } else { "sliding_attention" }
        };
        fields.insert("layer_types".into(), json!(layers.iter().map(kind).collect::<Vec<_>>()));
    }
    if name == "gemma3" {
        let local = settings.float(&format!("{name}.rope.freq_base_swa"))?;
        let local = local.unwrap_or(GEMMA_3_LOCAL_ROPE_BASE);
        fields.insert("rope_local_base_freq".into(), json!(local));
        let period = match pattern.as_deref() {
            Some([period]) => *period as u64,
            _ => GEMMA_3_PATTERN,
        };
        fields.insert("sliding_window_pattern".into(), json!(period));
    }
    Ok(())
}

/// How positions beyond those of the training are rotated.
fn rope_scaling(gguf: &Gguf, name: &str, context: u64) -> Result<Json, Error> {
    let settings = gguf.settings();
    let key = |key: &str| format!("{name}.rope.scaling.{key}");
    let factor = settings.float(&key("factor"))?.filter(|factor| *factor > 0.0);
    let original = settings.unsigned(&key("original_context_length"))?;
    let attention_factor = settings.float(&key("attn_factor"))?;
    let (short, long) = match gguf.vector("rope_freqs.weight")? {
        // Llama 3: what each frequency is divided by, worked out by the converter.
        Some(factors) => (Some(factors.clone()), Some(factors)),
        None => {
            (gguf.vector("rope_factors_short.weight")?, gguf.vector("rope_factors_long.weight")?)
        }
    };
    if let (Some(short), Some(long)) = (short, long) {
        return Ok(json!({
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": attention_factor.unwrap_or(1.0),
            "original_max_position_embeddings": original.unwrap_or(context),
        }));
    }
    Ok(match settings.text(&key("type"))? {
        None | Some("none") => match settings.float(&format!("{name}.rope.scale_linear"))? {
            Some(factor) if factor > 1.0 => json!({"rope_type": "linear", "factor": factor}),
            _ => Json::Null,
        },
        Some("linear") => json!({"rope_type": "linear", "factor": factor}),
        Some("yarn") => {
            let mut scaling = json!({"rope_type": "yarn", "factor": factor});
            if let Some(original) = original {
                scaling["original_max_position_embeddings"] = json!(original);
            }
            for (field, setting) in
                [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")]
            {
                if let Some(value) = settings.float(&key(setting))? {
                    scaling[field] = json!(value);
                }
            }
            if let (Some(given), Some(factor)) = (attention_factor, factor) {
                scaling["attention_factor"] = json!(given * (0.1 * factor.ln() + 1.0));
            }
            scaling
        }
        Some(other) => {
            return Err(settings
                .wrong(&format!("has {other} as {}, expected none, linear or yarn", key("type"))));
        }
    })
}

impl<'a> Settings<'a> {
    /// The name of the architecture, which begins the names of its settings.
    pub(super) fn supported_family(&self) -> Result<&'a str, Error> {
        let key = "general.architecture";
        let name = self.text(key)?.ok_or_else(|| self.missing(key))?;
        if FAMILIES.iter().any(|(family, _)| *family == name) {
            return Ok(name);
        }
        let known = FAMILIES.map(|(family, _)| family).join(", ");
        Err(self.wrong(&format!(
            "has the architecture {name}, which is not supported, expected one of {known}"
        )))
    }

    /// Heads that the settings of a family name.
    pub(super) fn heads(&self, family: &str, key: &str) -> Result<usize, Error> {
        let key = format!("{family}.{key}");
        let heads = self.uniform(&key)?.ok_or_else(|| self.missing(&key))?;
        let heads = usize::try_from(heads).ok().filter(|heads| *heads > 0);
        heads.ok_or_else(|| self.wrong(&format!("has no heads as {key}")))
    }

    /// Heads of keys and values; as many as of queries unless it says otherwise.
    pub(super) fn kv_heads(&self, family: &str) -> Result<usize, Error> {
        if self.has(&format!("{family}.attention.head_count_kv")) {
            self.heads(family, "attention.head_count_kv")
        } else {
            self.heads(family, "attention.head_count")
        }
    }

    /// A whole number, or a list with one for each layer, all the same.
    pub(super) fn uniform(&self, key: &str) -> Result<Option<u64>, Error> {
        let Some(numbers) = self.numbers(key)? else { return Ok(None) };
        match numbers.split_first() {
            Some((first, rest)) if first.fract() == 0.0 && (0.0..=1e12).contains(first) => {
                if rest.iter().any(|other| other != first) {
                    return Err(self.wrong(&format!(
                        "has {key} that differs from layer to layer, which is not supported"
                    )));
                }
                Ok(Some(*first as u64))
            }
            _ => Err(self.wrong(&format!("has {numbers:?} as {key}, expected a whole number"))),
        }
    }
}
