//! Tensors of a GGUF file by the names that transformers gives them.

use super::super::{Layout, Stored};
use super::{Gguf, GgufFile, TensorInfo};
use crate::Error;

/// Families whose norms have 1 added to their weights in the file.
const FAMILIES_WITH_NORM_OFFSET: [&str; 3] = ["gemma", "gemma2", "gemma3"];
/// The family whose query and key heads alternate between their halves, for another form of rotation.
const FAMILY_WITH_INTERLEAVED_HEADS: &str = "llama";

/// The tensors of a model.
#[derive(Debug)]
pub(crate) struct GgufTensors {
    gguf: Gguf,
    family: String,
    num_heads: usize,
    num_kv_heads: usize,
}

/// Where transformers' tensor is in the file.
#[derive(Debug, PartialEq)]
struct Location {
    name: String,
    /// Its place in a tensor of all experts.
    expert: Option<usize>,
    layout: Layout,
}

impl GgufTensors {
    pub(crate) fn new(gguf: Gguf) -> Result<Self, Error> {
        let settings = gguf.settings();
        let family = settings.supported_family()?.to_owned();
        let num_heads = settings.heads(&family, "attention.head_count")?;
        let num_kv_heads = settings.kv_heads(&family)?;
        Ok(Self { gguf, family, num_heads, num_kv_heads })
    }

    /// Bytes of all files.
    pub(crate) fn num_bytes(&self) -> u64 {
        self.gguf.files.iter().map(|file| file.memory.len() as u64).sum()
    }

    /// The files, for errors.
    pub(crate) fn names(&self) -> String {
        let paths: Vec<_> =
            self.gguf.files.iter().map(|file| file.path.display().to_string()).collect();
        paths.join(", ")
    }

    /// A tensor by transformers' name for it.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Stored<'_>>, Error> {
        for location in self.locations(name) {
            if let Some((file, info)) = self.gguf.tensor(&location.name) {
                return stored(file, info, &location).map(Some);
            }
        }
        Ok(None)
    }

    /// Where it may be, depending on the converter's age.
    fn locations(&self, name: &str) -> Vec<Location> {
        let name = name.strip_prefix("model.").unwrap_or(name);
        let plain = |name: &str| Location {
            name: name.to_owned(),
            expert: None,
            layout: Layout::default(),
        };
        match name {
            "embed_tokens.weight" => return vec![plain("token_embd.weight")],
            "lm_head.weight" => return vec![plain("output.weight")],
            "norm.weight" => {
                return vec![Location { layout: self.norm(), ..plain("output_norm.weight") }];
            }
            _ => {}
        }
        let Some((layer, part)) =
            name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'))
        else {
            return Vec::new();
        };
        let in_layer = |part: &str| plain(&format!("blk.{layer}.{part}"));
        if let Some((expert, matrix)) = expert(part) {
            let all = in_layer(&format!("ffn_{matrix}_exps.weight"));
            let own = in_layer(&format!("ffn_{matrix}.{expert}.weight"));
            return vec![Location { expert: Some(expert), ..all }, own];
        }
        let Some((module, kind)) = part.rsplit_once('.') else { return Vec::new() };
        let Some((module, layout)) = self.module(module) else { return Vec::new() };
        vec![Location { layout, ..in_layer(&format!("{module}.{kind}")) }]
    }

    /// A layer's module, and how its numbers are written.
    fn module(&self, module: &str) -> Option<(&'static str, Layout)> {
        let has_more_norms = FAMILIES_WITH_NORM_OFFSET[1..].contains(&self.family.as_str());
        let has_fused = self.family == "phi3";
        let heads = |heads| Layout {
            interleaved_heads: (self.family == FAMILY_WITH_INTERLEAVED_HEADS).then_some(heads),
            ..Layout::default()
        };
        Some(match module {
            "input_layernorm" => ("attn_norm", self.norm()),
            "post_attention_layernorm" if has_more_norms => ("post_attention_norm", self.norm()),
            "pre_feedforward_layernorm" if has_more_norms => ("ffn_norm", self.norm()),
            "post_feedforward_layernorm" if has_more_norms => ("post_ffw_norm", self.norm()),
            "post_attention_layernorm" => ("ffn_norm", self.norm()),
            "self_attn.q_norm" => ("attn_q_norm", self.norm()),
            "self_attn.k_norm" => ("attn_k_norm", self.norm()),
            "self_attn.q_proj" => ("attn_q", heads(self.num_heads)),
            "self_attn.k_proj" => ("attn_k", heads(self.num_kv_heads)),
            "self_attn.v_proj" => ("attn_v", Layout::default()),
            "self_attn.o_proj" => ("attn_output", Layout::default()),
            "self_attn.qkv_proj" => ("attn_qkv", Layout::default()),
            "mlp.gate_up_proj" if has_fused => ("ffn_up", Layout::default()),
            "mlp.gate_proj" if !has_fused => ("ffn_gate", Layout::default()),
            "mlp.up_proj" if !has_fused => ("ffn_up", Layout::default()),
            "mlp.down_proj" => ("ffn_down", Layout::default()),
            "mlp.gate" | "block_sparse_moe.gate" => ("ffn_gate_inp", Layout::default()),
            _ => return None,
        })
    }

    fn norm(&self) -> Layout {
        let has_offset = FAMILIES_WITH_NORM_OFFSET.contains(&self.family.as_str());
        Layout { offset: if has_offset { 1.0 } else { 0.0 }, ..Layout::default() }
    }
}

/// Number and matrix of an expert's tensor.
fn expert(part: &str) -> Option<(usize, &'static str)> {
    let (_, rest) = part.split_once("experts.")?;
    let (number, matrix) = rest.strip_suffix(".weight")?.split_once('.')?;
    let matrix = match matrix {
        "gate_proj" | "w1" => "gate",
        "up_proj" | "w3" => "up",
        "down_proj" | "w2" => "down",
        _ => return None,
    };
    Some((number.parse().ok()?, matrix))
}

fn stored<'a>(
    file: &'a GgufFile,
    info: &'a TensorInfo,
    location: &Location,
) -> Result<Stored<'a>, Error> {
    let (format, mut bytes) = file.bytes(&location.name, info)?;
    let mut shape = info.shape.clone();
    if let Some(expert) = location.expert {
        let num_experts = shape.remove(0);
        if shape.len() != 2 || expert >= num_experts {
            return Err(file.wrong(&format!(
                "has the tensor {} of shape {:?}, expected one matrix for each expert, {expert} among them",
                location.name, info.shape
            )));
        }
        let len = bytes.len() / num_experts;
        bytes = &bytes[expert * len..][..len];
    }
    let layout = location.layout;
    if let Some(heads) = layout.interleaved_heads
        && !shape[0].is_multiple_of(2 * heads)
    {
        return Err(file.wrong(&format!(
            "has the tensor {} of shape {shape:?}, expected {heads} heads of an even width",
            location.name
        )));
    }
    Ok(Stored { file: &file.path, memory: &file.memory, bytes, format, shape, layout })
}
