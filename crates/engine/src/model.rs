//! A decoder-only model: its weights, named and checked, ready to compute with.
//!
//! What differs between families is configuration (biases, norms, fused projections), read here. Where the weights go is up
//! to a [`Store`]: packed for the processor (`packing`), whose forward pass is in `decoder`, or to a GPU.

pub(crate) mod decoder;
pub(crate) mod feed_forward;
pub(crate) mod packing;
pub(crate) mod rope;

use self::feed_forward::{Experts, FeedForward};
use crate::Error;
use crate::config::{ExpertsConfig, ModelConfig};
use crate::kernels::{Cpu, Linear, Mlp, PackedMatrix, Simd};
use crate::precision::{MatrixRole, Precision};
use crate::weights::{Checkpoint, Format, Tensor};
use packing::{Packing, StoredRows};

pub(crate) use packing::Account;

/// The weights, as matrices `M`, vectors `V` and rows to be looked up `R`.
#[derive(Debug)]
pub(crate) struct Model<M = PackedMatrix, V = Vec<f32>, R = StoredRows> {
    pub(crate) config: ModelConfig,
    pub(crate) embedding: Embedding<R>,
    pub(crate) layers: Vec<Layer<M, V>>,
    pub(crate) norm: V,
    pub(crate) output: Linear<M, V>,
    num_bytes: u64,
}

#[derive(Debug)]
pub(crate) struct Layer<M = PackedMatrix, V = Vec<f32>> {
    pub(crate) input_norm: V,
    pub(crate) qkv: Linear<M, V>,
    pub(crate) qk_norm: Option<(V, V)>,
    pub(crate) attention_output: Linear<M, V>,
    /// Behind attention, where the model norms there too.
    pub(crate) attention_output_norm: Option<V>,
    pub(crate) mlp_norm: V,
    pub(crate) feed_forward: FeedForward<M, V>,
    /// Behind the feed-forward network, where the model norms there too.
    pub(crate) mlp_output_norm: Option<V>,
}

/// A vector for each token, `(vocab_size, hidden_size)`.
#[derive(Debug)]
pub(crate) enum Embedding<R = StoredRows> {
    /// Of its own.
    Rows(R),
    /// The weights of the output layer.
    Output,
}

/// Takes in the tensors of a checkpoint.
pub(crate) trait Store {
    /// A matrix to multiply with.
    type Matrix;
    /// Numbers of norms and biases.
    type Vector;
    /// Rows to be looked up.
    type Rows;

    /// Notes a tensor of the model.
    fn note(&self, name: &str, shape: &[usize], format: Format);

    /// The numbers of a vector, widened.
    fn numbers(&self, tensor: &Tensor<'_>) -> Vec<f32>;

    /// Keeps a vector.
    fn vector(&self, numbers: Vec<f32>) -> Result<Self::Vector, Error>;

    /// The rows of all tensors, which are of one width, as one matrix. `name` is for errors.
    fn matrix(
        &self,
        name: &str,
        role: MatrixRole,
        tensors: &[Tensor<'_>],
    ) -> Result<Self::Matrix, Error>;

    /// The rows of a tensor, to be looked up. `name` is for errors.
    fn rows(&self, name: &str, role: MatrixRole, tensor: &Tensor<'_>) -> Result<Self::Rows, Error>;
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

    /// Whether the weights that make keys and values are `f32`.
    pub(crate) fn has_fp32_keys(&self) -> bool {
        self.layers.iter().all(|layer| layer.qkv.weight.is_f32())
    }

    /// Writes the vector of a token.
    fn embed(&self, simd: Simd, token: usize, out: &mut [f32]) {
        match &self.embedding {
            Embedding::Rows(rows) => rows.look_up(token, out),
            Embedding::Output => self.output.weight.row(simd, token, out),
        }
    }
}

impl<M, V, R> Model<M, V, R> {
    /// Hands all tensors of a checkpoint to a store.
    pub(crate) fn assemble<S: Store<Matrix = M, Vector = V, Rows = R>>(
        config: &ModelConfig,
        checkpoint: &Checkpoint,
        store: &S,
    ) -> Result<Self, Error> {
        let loader = Loader { config, checkpoint, store, prefix: prefix(checkpoint) };
        let vocabulary = [config.vocab_size, config.hidden_size];
        let (name, role) = (loader.name("embed_tokens.weight"), MatrixRole::Vocabulary);
        let tensor = loader.tensor(&name, &vocabulary)?;
        // A tied checkpoint may carry the output layer all the same; the embedding is the one that counts.
        let (embedding, weight) = if config.tie_word_embeddings {
            (Embedding::Output, store.matrix(&name, role, &[tensor])?)
        } else {
            let rows = store.rows(&name, role, &tensor)?;
            let nested = checkpoint.has("language_model.lm_head.weight");
            let name = if nested { "language_model.lm_head.weight" } else { "lm_head.weight" };
            let tensor = loader.tensor(name, &vocabulary)?;
            (Embedding::Rows(rows), store.matrix(name, role, &[tensor])?)
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

    /// Memory that its weights take.
    pub(crate) fn num_bytes(&self) -> u64 {
        self.num_bytes
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

struct Loader<'a, S> {
    config: &'a ModelConfig,
    checkpoint: &'a Checkpoint,
    store: &'a S,
    prefix: &'static str,
}

impl<'a, S: Store> Loader<'a, S> {
    fn layer(&self, layer: usize) -> Result<Layer<S::Matrix, S::Vector>, Error> {
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
            qkv: self.linear(MatrixRole::Layer, &qkv, hidden, config.qkv_bias)?,
            qk_norm: qk_norm.transpose()?,
            attention_output: self.linear(
                MatrixRole::Layer,
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
    ) -> Result<Mlp<S::Matrix, S::Vector>, Error> {
        let (hidden, inner) = (self.config.hidden_size, intermediate_size);
        let gate_up = self.fused_or(
            (format!("{name}.gate_up_proj"), 2 * inner),
            vec![(format!("{name}.{gate}"), inner), (format!("{name}.{up}"), inner)],
        );
        let down = [(format!("{name}.{down}"), hidden)];
        Ok(Mlp {
            activation: self.config.activation,
            gate_up: self.linear(MatrixRole::Layer, &gate_up, hidden, self.config.mlp_bias)?,
            down: self.linear(MatrixRole::Layer, &down, inner, self.config.mlp_bias)?,
        })
    }

    /// A layer's experts with their router. Mixtral has names of its own for them.
    fn experts(
        &self,
        layer: usize,
        config: ExpertsConfig,
    ) -> Result<Experts<S::Matrix, S::Vector>, Error> {
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
            router: self.linear(MatrixRole::Router, &router, self.config.hidden_size, false)?,
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
    fn norm(&self, part: &str, len: usize) -> Result<S::Vector, Error> {
        let mut weights = self.numbers(&self.name(&format!("{part}.weight")), len)?;
        weights.iter_mut().for_each(|weight| *weight += self.config.norm_offset);
        self.store.vector(weights)
    }

    /// A tensor of the model.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'a>, Error> {
        let tensor = self.checkpoint.tensor(name, shape)?;
        self.store.note(name, shape, tensor.format());
        Ok(tensor)
    }

    fn numbers(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        Ok(self.store.numbers(&self.tensor(name, &[len])?))
    }

    /// Several linear layers of the same input as one, their outputs one behind the other.
    fn linear(
        &self,
        role: MatrixRole,
        parts: &[(String, usize)],
        in_features: usize,
        has_bias: bool,
    ) -> Result<Linear<S::Matrix, S::Vector>, Error> {
        let weights: Vec<_> = parts
            .iter()
            .map(|(name, len)| self.tensor(&format!("{name}.weight"), &[*len, in_features]))
            .collect::<Result<_, _>>()?;
        let mut bias = None;
        for (name, len) in parts {
            let name = format!("{name}.bias");
            if has_bias {
                bias.get_or_insert_with(Vec::new).extend(self.numbers(&name, *len)?);
            } else if self.checkpoint.has(&name) {
                return Err(Error::Model(format!(
                    "the checkpoint has the tensor {name}, but its config.json says there are no such biases"
                )));
            }
        }
        let name = format!("{}.weight", parts[0].0);
        let bias = bias.map(|numbers| self.store.vector(numbers)).transpose()?;
        Ok(Linear { weight: self.store.matrix(&name, role, &weights)?, bias })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::path::Path;

    use super::*;

    /// Notes what each matrix is for.
    #[derive(Default)]
    struct Roles(RefCell<Vec<(String, MatrixRole)>>);

    impl Store for Roles {
        type Matrix = ();
        type Vector = ();
        type Rows = ();

        fn note(&self, _: &str, _: &[usize], _: Format) {}

        fn numbers(&self, _: &Tensor<'_>) -> Vec<f32> {
            Vec::new()
        }

        fn vector(&self, _: Vec<f32>) -> Result<(), Error> {
            Ok(())
        }

        fn matrix(&self, name: &str, role: MatrixRole, _: &[Tensor<'_>]) -> Result<(), Error> {
            self.0.borrow_mut().push((name.to_owned(), role));
            Ok(())
        }

        fn rows(&self, name: &str, role: MatrixRole, _: &Tensor<'_>) -> Result<(), Error> {
            self.matrix(name, role, &[])
        }
    }

    #[test]
    fn routers_and_vocabulary_are_told_from_layers() {
        for name in ["mixtral", "qwen3-moe"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
            let checkpoint = Checkpoint::open(&path).unwrap();
            let roles = Roles::default();
            Model::assemble(&checkpoint.config().unwrap(), &checkpoint, &roles).unwrap();
            let roles = roles.0.into_inner();
            assert!(roles.iter().any(|(_, role)| *role == MatrixRole::Router), "{roles:?}");
            for (name, role) in roles {
                let expected = if name.ends_with(".gate.weight") {
                    MatrixRole::Router
                } else if name.contains("embed_tokens") || name.contains("lm_head") {
                    MatrixRole::Vocabulary
                } else {
                    MatrixRole::Layer
                };
                assert_eq!(role, expected, "{name}");
            }
        }
    }
}
