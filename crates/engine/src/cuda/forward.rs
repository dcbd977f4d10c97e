//! The forward pass on a device: tokens through the layers to logits, and to tokens where they are plain to choose, launch by launch.

use std::sync::Arc;

use super::device::{Address, Device, Memory, Product};
use super::kernels::{Delta, Kernels, Paged, Shape};
use super::plan::StepPlan;
use super::store::Matrix;
use crate::Error;
use crate::config::{LayerConfig, ModelConfig};
use crate::kernels::{Linear, Mlp};
use crate::model::feed_forward::FeedForward;
use crate::model::rope::Rope;
use crate::model::{Embedding, Layer, Model};
use crate::step::BLOCK_SIZE;

/// The weights on a device.
pub(super) type DeviceModel = Model<Matrix, Memory, Matrix>;

const HALF_BYTES: usize = 2;
const FLOAT_BYTES: usize = 4;

/// Keys and values of all layers: `(layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)`.
#[derive(Debug)]
pub(super) struct DeviceCache {
    memory: Memory,
    num_blocks: usize,
    /// Memory of the keys, or of the values, of a layer.
    layer_bytes: usize,
}

impl DeviceCache {
    pub(super) fn new(
        device: &Arc<dyn Device>,
        config: &ModelConfig,
        num_blocks: usize,
    ) -> Result<Self, Error> {
        // One block more, for tokens that only fill a step up.
        let layer_bytes =
            (num_blocks + 1) * bytes_per_block(config) / (2 * config.num_hidden_layers);
        let memory = Memory::new(device, 2 * config.num_hidden_layers * layer_bytes)?;
        Ok(Self { memory, num_blocks, layer_bytes })
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Keys and values of a layer.
    fn layer(&self, layer: usize) -> (Address, Address) {
        let keys = self.memory.address() + (2 * layer * self.layer_bytes) as u64;
        (keys, keys + self.layer_bytes as u64)
    }
}

/// Memory of one block: keys and values of its tokens in every layer.
pub(super) fn bytes_per_block(config: &ModelConfig) -> usize {
    2 * config.num_hidden_layers * config.kv_width() * BLOCK_SIZE * HALF_BYTES
}

/// Memory of a step on the device.
#[derive(Debug)]
pub(super) struct DeviceBuffers {
    residual: Memory,
    normed: Memory,
    /// What is added to the residual next.
    delta: Memory,
    qkv: Memory,
    attended: Memory,
    gate_up: Memory,
    inner: Memory,
    /// Cosines and sines of the step's positions, for each of the model's ropes.
    angles: Vec<Memory>,
    /// Frequencies of each of the model's ropes.
    frequencies: Vec<Memory>,
    plan: Memory,
    partials: Memory,
    logits: Memory,
    /// Chosen, by the place of their items.
    tokens: Memory,
}

impl DeviceBuffers {
    /// Memory for steps of up to `max_tokens` tokens.
    pub(super) fn new(
        device: &Arc<dyn Device>,
        config: &ModelConfig,
        max_tokens: usize,
    ) -> Result<Self, Error> {
        let halves = |width: usize| Memory::new(device, max_tokens * width * HALF_BYTES);
        let frequencies = |rope: &Rope| {
            let bytes: Vec<u8> =
                rope.frequency_rows().iter().flat_map(|number| number.to_le_bytes()).collect();
            let memory = Memory::new(device, bytes.len())?;
            memory.write(&bytes)?;
            Ok::<_, Error>(memory)
        };
        // Two numbers for each pair of dimensions.
        let angles = |rope: &Rope| Memory::new(device, max_tokens * rope.dim * FLOAT_BYTES);
        Ok(Self {
            residual: Memory::new(device, max_tokens * config.hidden_size * FLOAT_BYTES)?,
            normed: halves(config.hidden_size)?,
            delta: halves(config.hidden_size)?,
            qkv: halves(config.query_width() + 2 * config.kv_width())?,
            attended: halves(config.query_width())?,
            gate_up: halves(2 * config.intermediate_size)?,
            inner: halves(config.intermediate_size)?,
            angles: config.ropes.iter().map(angles).collect::<Result<_, _>>()?,
            frequencies: config.ropes.iter().map(frequencies).collect::<Result<_, _>>()?,
            plan: Memory::new(device, 0)?,
            partials: Memory::new(device, 0)?,
            logits: Memory::new(device, 0)?,
            tokens: Memory::new(device, 0)?,
        })
    }

    /// The logits of the last step, `(wanted, vocab_size)` in f32.
    pub(super) fn logits(&self) -> &Memory {
        &self.logits
    }

    /// The tokens that were chosen in the last step.
    pub(super) fn tokens(&self) -> &Memory {
        &self.tokens
    }

    /// Copies a step to the device, and takes memory for what differs from step to step. Whether something has moved for that.
    pub(super) fn prepare(
        &mut self,
        device: &Arc<dyn Device>,
        plan: &StepPlan,
        (shape, vocab_size): (&Shape, usize),
    ) -> Result<bool, Error> {
        let partial_bytes = shape.partial_len() * FLOAT_BYTES;
        let moved = [
            grow(device, &mut self.plan, plan.num_bytes())?,
            grow(device, &mut self.partials, plan.num_partials * partial_bytes)?,
            grow(device, &mut self.logits, plan.wanted.len() * vocab_size * FLOAT_BYTES)?,
            grow(device, &mut self.tokens, plan.samples.len() * size_of::<i32>())?,
        ];
        plan.upload(&self.plan)?;
        Ok(moved.contains(&true))
    }
}

/// Sees to it that `memory` has `num_bytes`; if it had not, it moves, and what was in it is lost.
fn grow(device: &Arc<dyn Device>, memory: &mut Memory, num_bytes: usize) -> Result<bool, Error> {
    let is_short = memory.num_bytes() < num_bytes;
    if is_short {
        // What it had is given back first: nobody needs it any more.
        *memory = Memory::new(device, 0)?;
        *memory = Memory::new(device, num_bytes.next_power_of_two())?;
    }
    Ok(is_short)
}

/// A step on its way through the model.
#[derive(Debug)]
pub(super) struct Forward<'a> {
    pub(super) device: &'a Arc<dyn Device>,
    pub(super) shape: &'a Shape,
    pub(super) model: &'a DeviceModel,
    pub(super) cache: &'a DeviceCache,
    pub(super) plan: &'a StepPlan,
    pub(super) buffers: &'a DeviceBuffers,
}

impl Forward<'_> {
    /// Asks for the whole step: keys and values go to the cache, logits to the buffers.
    pub(super) fn run(&self) -> Result<(), Error> {
        let config = &self.model.config;
        let (tokens, num_tokens) = self.plan.tokens.at(&self.buffers.plan);
        let embedding = match &self.model.embedding {
            Embedding::Rows(rows) => rows,
            Embedding::Output => &self.model.output.weight,
        };
        let residual = self.buffers.residual.address();
        let embedding = embedding.memory.address();
        let kernels = self.kernels();
        kernels.embed((tokens, num_tokens), embedding, config.embedding_scale, residual)?;
        self.rotate()?;
        // What the layer before adds to the residual is added where the next one norms it.
        let mut delta = Delta::default();
        for (index, layer) in self.model.layers.iter().enumerate() {
            delta = self.attend(layer, (index, &config.layers[index]), delta)?;
            delta = self.feed_forward(layer, delta)?;
        }
        self.project_output(delta)?;
        let samples = self.plan.samples.at(&self.buffers.plan);
        if samples.1 > 0 {
            let logits = (self.buffers.logits.address(), config.vocab_size);
            kernels.sample(logits, samples, self.buffers.tokens.address())?;
        }
        Ok(())
    }

    fn kernels(&self) -> Kernels<'_> {
        let eps = self.model.config.rms_norm_eps;
        Kernels { device: self.device.as_ref(), shape: self.shape, eps }
    }

    fn num_tokens(&self) -> usize {
        self.plan.tokens.len()
    }

    /// The angles of the step's positions.
    fn rotate(&self) -> Result<(), Error> {
        let buffers = &self.buffers;
        let (positions, num_tokens) = self.plan.positions.at(&buffers.plan);
        let (is_long, _) = self.plan.is_long.at(&buffers.plan);
        for ((rope, frequencies), angles) in
            self.model.config.ropes.iter().zip(&buffers.frequencies).zip(&buffers.angles)
        {
            let frequencies = (frequencies.address(), rope.attention_factor(), rope.dim / 2);
            let tokens = (positions, is_long, num_tokens);
            self.kernels().rope_angles(tokens, frequencies, angles.address())?;
        }
        Ok(())
    }

    /// `out = norm(residual += delta)` of all tokens.
    fn norm(&self, delta: Delta, weight: &Memory) -> Result<(), Error> {
        let (residual, out) = (self.buffers.residual.address(), self.buffers.normed.address());
        let rows = (0, self.num_tokens());
        self.kernels().rms_norm((residual, delta), weight.address(), rows, out)
    }

    /// `out = weight x` for a row of each token; the bias is left to who reads it.
    fn multiply(
        &self,
        linear: &Linear<Matrix, Memory>,
        x: &Memory,
        out: &Memory,
    ) -> Result<(), Error> {
        self.device.multiply(&Product {
            x: x.address(),
            weight: linear.weight.memory.address(),
            out: out.address(),
            num_rows: self.num_tokens(),
            in_features: linear.weight.row_len,
            out_features: linear.weight.num_rows,
            wide: false,
        })
    }

    /// Attention; what it adds to the residual.
    fn attend(
        &self,
        layer: &Layer<Matrix, Memory>,
        (index, settings): (usize, &LayerConfig),
        delta: Delta,
    ) -> Result<Delta, Error> {
        let config = &self.model.config;
        self.norm(delta, &layer.input_norm)?;
        let buffers = self.buffers;
        self.multiply(&layer.qkv, &buffers.normed, &buffers.qkv)?;
        let (keys, values) = self.cache.layer(index);
        let paged = Paged {
            keys,
            values,
            tables: self.plan.tables.at(&buffers.plan).0,
            window: settings.sliding_window,
            scale: config.attention_scale,
            cap: config.attention_softcap,
        };
        let kernels = self.kernels();
        let (slots, num_tokens) = self.plan.slots.at(&buffers.plan);
        let (query_norm, key_norm) =
            layer.qk_norm.as_ref().map_or((0, 0), |(query, key)| (query.address(), key.address()));
        let (qkv, out) = (buffers.qkv.address(), buffers.attended.address());
        kernels.rotate_and_store(
            (qkv, num_tokens),
            [address(layer.qkv.bias.as_ref()), query_norm, key_norm],
            (buffers.angles[settings.rope].address(), config.ropes[settings.rope].dim / 2),
            (slots, &paged),
        )?;
        let prefill = self.plan.prefill.at(&buffers.plan);
        if prefill.1 > 0 {
            kernels.attend_prefill(prefill, qkv, &paged, out)?;
        }
        let decode = self.plan.decode.at(&buffers.plan);
        if decode.1 > 0 {
            let partials = buffers.partials.address();
            kernels.attend_decode(decode, qkv, &paged, (partials, out))?;
            let combine = self.plan.combine.at(&buffers.plan);
            if combine.1 > 0 {
                kernels.combine(combine, partials, out)?;
            }
        }
        self.multiply(&layer.attention_output, &buffers.attended, &buffers.delta)?;
        Ok(self.delta(&layer.attention_output, layer.attention_output_norm.as_ref()))
    }

    /// The feed-forward network; what it adds to the residual.
    fn feed_forward(&self, layer: &Layer<Matrix, Memory>, delta: Delta) -> Result<Delta, Error> {
        let FeedForward::Dense(Mlp { gate_up, down, .. }) = &layer.feed_forward else {
            unreachable!("a shape was made for it, which there is not for experts");
        };
        self.norm(delta, &layer.mlp_norm)?;
        let buffers = self.buffers;
        self.multiply(gate_up, &buffers.normed, &buffers.gate_up)?;
        let gates = (buffers.gate_up.address(), self.num_tokens());
        let width = self.model.config.intermediate_size;
        let inner = buffers.inner.address();
        self.kernels().gate(gates, address(gate_up.bias.as_ref()), width, inner)?;
        self.multiply(down, &buffers.inner, &buffers.delta)?;
        Ok(self.delta(down, layer.mlp_output_norm.as_ref()))
    }

    /// What was just computed as what is added next.
    fn delta(&self, linear: &Linear<Matrix, Memory>, norm: Option<&Memory>) -> Delta {
        Delta {
            x: self.buffers.delta.address(),
            bias: address(linear.bias.as_ref()),
            norm: address(norm),
        }
    }

    /// Logits of the tokens that want them.
    fn project_output(&self, delta: Delta) -> Result<(), Error> {
        let config = &self.model.config;
        let buffers = self.buffers;
        let (rows, num_rows) = self.plan.wanted.at(&buffers.plan);
        if num_rows == 0 {
            return Ok(());
        }
        let kernels = self.kernels();
        let (residual, normed) = (buffers.residual.address(), buffers.normed.address());
        let norm = self.model.norm.address();
        kernels.rms_norm((residual, delta), norm, (rows, num_rows), normed)?;
        let output = &self.model.output.weight;
        self.device.multiply(&Product {
            x: normed,
            weight: output.memory.address(),
            out: buffers.logits.address(),
            num_rows,
            in_features: output.row_len,
            out_features: output.num_rows,
            wide: true,
        })?;
        match config.output_softcap {
            Some(cap) => {
                kernels.softcap(buffers.logits.address(), cap, num_rows * config.vocab_size)
            }
            None => Ok(()),
        }
    }
}

/// The address of what may be missing.
fn address(memory: Option<&Memory>) -> Address {
    memory.map_or(0, Memory::address)
}
