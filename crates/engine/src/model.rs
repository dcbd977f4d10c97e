//! A decoder-only model: its weights, named and checked, ready to compute with.
//!
//! What differs between families is configuration (biases, norms, fused projections), read here; the forward
//! pass is in `decoder`.

pub(crate) mod decoder;
mod feed_forward;
mod packing;
pub(crate) mod rope;

use self::feed_forward::{Experts, FeedForward};
use crate::Error;
use crate::config::{ExpertsConfig, ModelConfig};
use crate::kernels::{Cpu, Linear, Mlp, Simd};
use crate::precision::{MatrixRole, Precision};
use crate::weights::{Checkpoint, Tensor};
use packing::{Packing, StoredRows};

pub(crate) use packing::Account;

/// The weights.
#[derive(Debug)]
pub(crate) struct Model {
    config: ModelConfig,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    output: Linear,
    num_bytes: u64,
}

#[derive(Debug)]
struct Layer {
    input_norm: Vec<f32>,
    qkv: Linear,
    qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    attention_output: Linear,
    /// Behind attention, where the model norms there too.
    attention_output_norm: Option<Vec<f32>>,
    mlp_norm: Vec<f32>,
    feed_forward: FeedForward,
    /// Behind the feed-forward network, where the model norms there too.
    mlp_output_norm: Option<Vec<f32>>,
}

/// A vector for each token, `(vocab_size, hidden_size)`.
#[derive(Debug)]
enum Embedding {
    /// Of its own.
    Rows(StoredRows),
    /// The weights of the output layer.
    Output,
}

impl Model {
    /// Reads all weights of a checkpoint.
    pub(crate) fn load(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        cpu: &Cpu,
        precision: Option<Precision>,
    ) -> Result<Self, Error> {
        let packing = Packing::new(cpu, precision);
        let mut model = Self::assemble(config, checkpoint, &packing)?;
        model.num_bytes = packing.finish().num_bytes;
        Ok(model)
    }

    /// What loading a checkpoint would take in, without reading more than its headers. It fails where loading
    /// would for want of a tensor.
    pub(crate) fn account(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        precision: Option<Precision>,
    ) -> Result<Account, Error> {
        let packing = Packing::counting(precision);
        Self::assemble(config, checkpoint, &packing)?;
        Ok(packing.finish())
    }

    fn assemble(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        packing: &Packing<'_>,
    ) -> Result<Self, Error> {
        let loader = Loader { config, checkpoint, packing, prefix: prefix(checkpoint) };
        let vocabulary = [config.vocab_size, config.hidden_size];
        let (name, role) = (loader.name("embed_tokens.weight"), MatrixRole::Vocabulary);
        let tensor = loader.tensor(&name, &vocabulary)?;
        // A tied checkpoint may carry the output layer all the same; the embedding is the one that counts.
        let (embedding, weight) = if config.tie_word_embeddings {
            (Embedding::Output, packing.matrix(&name, role, &[tensor])?)
        } else {
            let rows = packing.rows(&name, role, &tensor)?;
            let nested = checkpoint.has("language_model.lm_head.weight");
            let name = if nested { "language_model.lm_head.weight" } else { "lm_head.weight" };
            let tensor = loader.tensor(name, &vocabulary)?;
            (Embedding::Rows(rows), packing.matrix(name, role, &[tensor])?)
        };
        let output = Linear { weight, bias: None };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| loader.layer(layer))
            .collect::<Result<_, _>>()?;
        let surplus =
            loader.name(&format!("layers.{}.input_layernorm.weight", config.num_hidden_layers));
        if checkpoint.has(&surplus) {
            return Err(Error::Model(format!(
                "the checkpoint has the tensor {surplus}, but its config.json says there are {} layers",
                config.num_hidden_layers
            )));
        }
        let norm = loader.norm("norm", config.hidden_size)?;
        Ok(Self { embedding, layers, norm, output, config: config.clone(), num_bytes: 0 })
    }

    /// What it looks like.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether the weights that make keys and values are `f32`.
    pub(crate) fn has_fp32_keys(&self) -> bool {
        self.layers.iter().all(|layer| layer.qkv.weight.is_f32())
    }

    /// Memory that its weights take.
    pub(crate) fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// Writes the vector of a token.
    fn embed(&self, simd: Simd, token: usize, out: &mut [f32]) {
        match &self.embedding {
            Embedding::Rows(rows) => rows.look_up(token, out),
            Embedding::Output => self.output.weight.row(simd, token, out),
        }
    }
}

/// What the names of a checkpoint's tensors begin with: a model of several kinds of input keeps its language
/// model apart.
fn prefix(checkpoint: &Checkpoint) -> &'static str {
    let nested = ["model.language_model.", "language_model.model."];
    let found =
        nested.into_iter().find(|prefix| checkpoint.has(&format!("{prefix}embed_tokens.weight")));
    found.unwrap_or("model.")
}

struct Loader<'a> {
    config: &'a ModelConfig,
    checkpoint: &'a Checkpoint,
    packing: &'a Packing<'a>,
    prefix: &'static str,
}

impl<'a> Loader<'a> {
    fn layer(&self, layer: usize) -> Result<Layer, Error> {
        let config = self.config;
        let hidden = config.hidden_size;
        let (query, kv) = (config.query_width(), config.kv_width());
        let name = |part: &str| self.name(&format!("layers.{layer}.{part}"));
        let norm = |part: &str| self.norm(&format!("layers.{layer}.{part}"), hidden);
        let head_norm =
            |part: &str| self.norm(&format!("layers.{layer}.self_attn.{part}"), config.head_dim);
        let qkv = self.fused_or(
            (name("self_attn.qkv_proj"), query + 2 * kv),
            vec![
                (name("self_attn.q_proj"), query),
                (name("self_attn.k_proj"), kv),
                (name("self_attn.v_proj"), kv),
            ],
        );
        let attention_output = [(name("self_attn.o_proj"), hidden)];
        let qk_norm =
            config.qk_norm.then(|| Ok::<_, Error>((head_norm("q_norm")?, head_norm("k_norm")?)));
        let sandwich = config.sandwich_norms;
        let mlp_norm =
            if sandwich { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        Ok(Layer {
            input_norm: norm("input_layernorm")?,
            qkv: self.linear(&qkv, hidden, config.qkv_bias)?,
            qk_norm: qk_norm.transpose()?,
            attention_output: self.linear(
                &attention_output,
                query,
                config.attention_output_bias,
            )?,
            attention_output_norm: sandwich
                .then(|| norm("post_attention_layernorm"))
                .transpose()?,
            mlp_norm: norm(mlp_norm)?,
            feed_forward: match config.experts.filter(|_| config.layers[layer].experts) {
                Some(experts) => FeedForward::Experts(self.experts(layer, experts)?),
                None => FeedForward::Dense(self.mlp(
                    &name("mlp"),
                    ["gate_proj", "up_proj", "down_proj"],
                    config.intermediate_size,
                )?),
            },
            mlp_output_norm: sandwich.then(|| norm("post_feedforward_layernorm")).transpose()?,
        })
    }

    /// The network that is called `name`, of layers that are called `[gate, up, down]`.
    fn mlp(
        &self,
        name: &str,
        [gate, up, down]: [&str; 3],
        intermediate_size: usize,
    ) -> Result<Mlp, Error> {
        let (hidden, inner) = (self.config.hidden_size, intermediate_size);
        let gate_up = self.fused_or(
            (format!("{name}.gate_up_proj"), 2 * inner),
            vec![(format!("{name}.{gate}"), inner), (format!("{name}.{up}"), inner)],
        );
        let down = [(format!("{name}.{down}"), hidden)];
        Ok(Mlp {
            activation: self.config.activation,
            gate_up: self.linear(&gate_up, hidden, self.config.mlp_bias)?,
            down: self.linear(&down, inner, self.config.mlp_bias)?,
        })
    }

    /// A layer's experts with their router. Mixtral has names of its own for them.
    fn experts(&self, layer: usize, config: ExpertsConfig) -> Result<Experts, Error> {
        let mixtral = self.name(&format!("layers.{layer}.block_sparse_moe"));
        let (name, parts) = if self.checkpoint.has(&format!("{mixtral}.gate.weight")) {
            (mixtral, ["w1", "w3", "w2"])
        } else {
            (self.name(&format!("layers.{layer}.mlp")), ["gate_proj", "up_proj", "down_proj"])
        };
        let router = [(format!("{name}.gate"), config.num_experts)];
        let expert =
            |expert| self.mlp(&format!("{name}.experts.{expert}"), parts, config.intermediate_size);
        Ok(Experts {
            router: self.linear(&router, self.config.hidden_size, false)?,
            experts: (0..config.num_experts).map(expert).collect::<Result<_, _>>()?,
            num_per_token: config.num_experts_per_token,
            normalize_weights: config.normalize_weights,
        })
    }

    /// The layer that some families have in place of several, or those.
    fn fused_or(
        &self,
        fused: (String, usize),
        parts: Vec<(String, usize)>,
    ) -> Vec<(String, usize)> {
        if self.checkpoint.has(&format!("{}.weight", fused.0)) { vec![fused] } else { parts }
    }

    /// The whole name of a tensor or layer.
    fn name(&self, part: &str) -> String {
        format!("{}{part}", self.prefix)
    }

    /// The weights of a norm.
    fn norm(&self, part: &str, len: usize) -> Result<Vec<f32>, Error> {
        let mut weights = self.vector(&self.name(&format!("{part}.weight")), len)?;
        weights.iter_mut().for_each(|weight| *weight += self.config.norm_offset);
        Ok(weights)
    }

    /// A tensor of the model.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'a>, Error> {
        let tensor = self.checkpoint.tensor(name, shape)?;
        self.packing.note(name, shape, tensor.format());
        Ok(tensor)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        Ok(self.packing.vector(&self.tensor(name, &[len])?))
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
            .map(|(name, len)| self.tensor(&format!("{name}.weight"), &[*len, in_features]))
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
        let name = format!("{}.weight", parts[0].0);
        Ok(Linear { weight: self.packing.matrix(&name, MatrixRole::Layer, &weights)?, bias })
    }
}
