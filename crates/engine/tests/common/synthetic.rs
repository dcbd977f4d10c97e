//! Checkpoints of any shape with random weights, for tests of invariance and of speed.

use std::collections::BTreeMap;
use std::path::Path;

use flotilla_engine::Architecture;
use safetensors::tensor::{Dtype, TensorView};

/// What the checkpoint looks like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Llama or Gemma 2, with the defaults of its class.
    pub(crate) architecture: Architecture,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) num_key_value_heads: usize,
    pub(crate) vocab_size: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) bf16: bool,
}

/// Random numbers that are the same everywhere (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Between -1 and 1.
    pub(crate) fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

impl Shape {
    /// Writes `config.json` and `model.safetensors`; returns the number of parameters.
    pub(crate) fn write(&self, folder: &Path, seed: u64) -> usize {
        let config = serde_json::json!({
            "architectures": [self.architecture.name()],
            "head_dim": self.hidden_size / self.num_attention_heads,
            "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers, "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads, "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings, "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0, "tie_word_embeddings": false, "eos_token_id": 2,
        });
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let mut random = Random(seed);
        let mut num_parameters = 0;
        let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = self
            .tensors()
            .into_iter()
            .map(|(name, shape)| {
                let len: usize = shape.iter().product();
                num_parameters += len;
                let width = (3.0 / shape[shape.len() - 1] as f32).sqrt();
                let mut bytes = Vec::new();
                for _ in 0..len {
                    let x = random.signed();
                    let x = if shape.len() == 1 { 1.0 + x / 4.0 } else { x * width };
                    if self.bf16 {
                        bytes.extend(((x.to_bits() >> 16) as u16).to_le_bytes());
                    } else {
                        bytes.extend(x.to_le_bytes());
                    }
                }
                (name, (shape, bytes))
            })
            .collect();
        let dtype = if self.bf16 { Dtype::BF16 } else { Dtype::F32 };
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, (shape, bytes))| {
                (name, TensorView::new(dtype, shape.clone(), bytes).unwrap())
            })
            .collect();
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
        num_parameters
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let kv = hidden / self.num_attention_heads * self.num_key_value_heads;
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden]),
            ("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        for layer in 0..self.num_hidden_layers {
            let mut parts = vec![
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("mlp.gate_proj", vec![self.intermediate_size, hidden]),
                ("mlp.up_proj", vec![self.intermediate_size, hidden]),
                ("mlp.down_proj", vec![hidden, self.intermediate_size]),
            ];
            if self.architecture == Architecture::Gemma2 {
                parts.push(("pre_feedforward_layernorm", vec![hidden]));
                parts.push(("post_feedforward_layernorm", vec![hidden]));
            }
            for (part, shape) in parts {
                tensors.push((format!("model.layers.{layer}.{part}.weight"), shape));
            }
        }
        tensors
    }
}
