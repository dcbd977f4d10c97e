//! A decoder-only model: its weights, named and checked, ready to compute with.
//!
//! What differs between families is configuration (biases, norms of queries and keys), read here; the
//! forward pass is in `decoder`.

pub(crate) mod decoder;
pub(crate) mod rope;

use crate::Error;
use crate::config::ModelConfig;
use crate::kernels::{Linear, PackedMatrix, Threads};
use crate::weights::{Checkpoint, Format, Tensor};

/// The weights.
#[derive(Debug)]
pub(crate) struct Model {
    config: ModelConfig,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    output: Linear,
}

#[derive(Debug)]
struct Layer {
    input_norm: Vec<f32>,
    qkv: Linear,
    qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    attention_output: Linear,
    mlp_norm: Vec<f32>,
    gate_up: Linear,
    down: Linear,
}

/// A vector for each token, `(vocab_size, hidden_size)`, as the checkpoint has it.
#[derive(Debug)]
struct Embedding {
    bytes: Vec<u8>,
    format: Format,
}

impl Embedding {
    fn look_up(&self, token: usize, out: &mut [f32]) {
        let row_bytes = out.len() * self.format.bytes();
        self.format.decode(&self.bytes[token * row_bytes..][..row_bytes], out);
    }
}

impl Model {
    /// Reads all weights of a checkpoint.
    pub(crate) fn load(
        config: ModelConfig,
        checkpoint: &Checkpoint,
        threads: &Threads,
    ) -> Result<Self, Error> {
        let loader = Loader { config: &config, checkpoint, threads };
        let vocabulary = [config.vocab_size, config.hidden_size];
        let embedding = checkpoint.tensor("model.embed_tokens.weight", &vocabulary)?;
        // A tied checkpoint may carry the output layer all the same; the embedding is the one that counts.
        let output = if config.tie_word_embeddings {
            embedding
        } else {
            checkpoint.tensor("lm_head.weight", &vocabulary)?
        };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| loader.layer(layer))
            .collect::<Result<_, _>>()?;
        let norm = loader.vector("model.norm.weight", config.hidden_size)?;
        let output = Linear { weight: loader.pack(&[output], config.hidden_size), bias: None };
        let embedding = Embedding { bytes: embedding.bytes().to_vec(), format: embedding.format() };
        Ok(Self { embedding, layers, norm, output, config })
    }

    /// What it looks like.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }
}

struct Loader<'a> {
    config: &'a ModelConfig,
    checkpoint: &'a Checkpoint,
    threads: &'a Threads,
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<Layer, Error> {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (query, kv) = (config.query_width(), config.kv_width());
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let qkv = [
            (name("self_attn.q_proj"), query),
            (name("self_attn.k_proj"), kv),
            (name("self_attn.v_proj"), kv),
        ];
        let gate_up = [(name("mlp.gate_proj"), inner), (name("mlp.up_proj"), inner)];
        let attention_output = [(name("self_attn.o_proj"), hidden)];
        let qk_norm = if config.qk_norm {
            let vector = |part: &str| self.vector(&name(part), config.head_dim);
            Some((vector("self_attn.q_norm.weight")?, vector("self_attn.k_norm.weight")?))
        } else {
            None
        };
        Ok(Layer {
            input_norm: self.vector(&name("input_layernorm.weight"), hidden)?,
            qkv: self.linear(&qkv, hidden, config.qkv_bias)?,
            qk_norm,
            attention_output: self.linear(
                &attention_output,
                query,
                config.attention_output_bias,
            )?,
            mlp_norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            gate_up: self.linear(&gate_up, hidden, config.mlp_bias)?,
            down: self.linear(&[(name("mlp.down_proj"), hidden)], inner, config.mlp_bias)?,
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        Ok(self.checkpoint.tensor(name, &[len])?.to_vec())
    }

    /// Several linear layers of the same input as one, their outputs one behind the other.
    fn linear(
        &self,
        parts: &[(String, usize)],
        in_features: usize,
        has_bias: bool,
    ) -> Result<Linear, Error> {
        let weights: Vec<_> = parts
            .iter()
            .map(|(name, len)| {
                self.checkpoint.tensor(&format!("{name}.weight"), &[*len, in_features])
            })
            .collect::<Result<_, _>>()?;
        let mut bias = None;
        for (name, len) in parts {
            let name = format!("{name}.bias");
            if has_bias {
                bias.get_or_insert_with(Vec::new).extend(self.vector(&name, *len)?);
            } else if self.checkpoint.has(&name) {
                return Err(Error::Model(format!(
                    "the checkpoint has the tensor {name}, but its config.json says there are no such biases"
                )));
            }
        }
        Ok(Linear { weight: self.pack(&weights, in_features), bias })
    }

    fn pack(&self, parts: &[Tensor<'_>], in_features: usize) -> PackedMatrix {
        let out_features = parts.iter().map(Tensor::num_rows).sum();
        let bf16 = parts.iter().all(|part| part.format() == Format::Bf16);
        PackedMatrix::pack(self.threads, (out_features, in_features), bf16, |mut row, out| {
            for part in parts {
                if row < part.num_rows() {
                    part.decode_row(row, out);
                    return;
                }
                row -= part.num_rows();
            }
        })
    }
}
