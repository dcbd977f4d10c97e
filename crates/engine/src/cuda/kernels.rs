//! The kernels' source for one model, and their launches: each with the grid that its comment in `cuda/*.cu` asks for.

use super::device::{Address, Argument, Device, Half, Launch};
use super::plan;
use crate::Error;
use crate::config::ModelConfig;
use crate::step::BLOCK_SIZE;

const WARP_SIZE: usize = 32;
/// Threads of the kernels that leave their number open.
const THREADS: usize = 256;
const NORM_THREADS: usize = 256;
const SAMPLE_THREADS: usize = 512;
const ROPE_WARPS: usize = 4;
const PREFILL_WARPS: usize = 4;
/// Rows of a warp's tile in attention.
const TILE_ROWS: usize = 16;
/// Keys that one block of attention sees of a token that decodes.
pub(super) const SPLIT_KEYS: usize = 256;

/// The shape that kernels are compiled for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) half: Half,
    pub(super) hidden_size: usize,
    pub(super) head_dim: usize,
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    /// The place of the model's in [`crate::Activation`].
    pub(super) activation: usize,
}

impl Shape {
    /// One for when it doesn't matter.
    pub(super) const SMALLEST: Self = Self {
        half: Half::Bf16,
        hidden_size: 8,
        head_dim: 8,
        num_heads: 1,
        num_kv_heads: 1,
        activation: 0,
    };

    /// That of a model; the error says what no kernel is made for.
    pub(super) fn new(config: &ModelConfig, half: Half) -> Result<Self, Error> {
        let widths = [
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("head_dim", config.head_dim),
        ];
        for (name, width) in widths {
            if !width.is_multiple_of(8) {
                return Err(Error::Model(format!(
                    "a GPU computes models whose widths are multiples of 8, {name} is {width}"
                )));
            }
        }
        if config.head_dim > 256 {
            return Err(Error::Model(format!(
                "a GPU computes heads of up to 256 dimensions, the model's have {}",
                config.head_dim
            )));
        }
        if config.experts.is_some() {
            return Err(Error::Model("models of experts are not computed on a GPU yet".into()));
        }
        Ok(Self {
            half,
            hidden_size: config.hidden_size,
            head_dim: config.head_dim,
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            activation: config.activation as usize,
        })
    }

    /// The whole source.
    pub(super) fn source(&self) -> String {
        let constants = [
            ("HIDDEN_SIZE", self.hidden_size),
            ("HEAD_DIM", self.head_dim),
            ("NUM_HEADS", self.num_heads),
            ("NUM_KV_HEADS", self.num_kv_heads),
            ("ACTIVATION", self.activation),
            ("BLOCK_SIZE", BLOCK_SIZE),
            ("BF16", usize::from(self.half == Half::Bf16)),
        ];
        let defines = constants.map(|(name, value)| format!("#define {name} {value}\n")).concat();
        let files = [
            ("common.cuh", include_str!("../../cuda/common.cuh")),
            ("elementwise.cu", include_str!("../../cuda/elementwise.cu")),
            ("attention.cu", include_str!("../../cuda/attention.cu")),
            ("sample.cu", include_str!("../../cuda/sample.cu")),
        ];
        let files = files.map(|(name, text)| format!("#line 1 \"{name}\"\n{text}"));
        defines + &files.concat()
    }

    /// Query heads of a KV head.
    fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Tokens of a prompt that one block of attention computes.
    pub(super) fn prefill_tokens(&self) -> usize {
        (PREFILL_WARPS * TILE_ROWS / self.group()).max(1)
    }

    /// Whether tokens that decode have a kernel of their own: their group fits the rows of one tile.
    pub(super) fn has_decode(&self) -> bool {
        self.group() <= TILE_ROWS
    }

    /// Keys that attention computes with at a time.
    fn tile_keys(&self) -> usize {
        if self.head_dim > 128 { 32 } else { 64 }
    }

    /// Numbers of a partial result of attention.
    pub(super) fn partial_len(&self) -> usize {
        self.num_heads * (self.head_dim + 2)
    }

    /// Shared memory of a block of attention: two stages of keys and values, which partial sums take the place of.
    fn attention_bytes(&self) -> usize {
        let dim = self.head_dim.next_multiple_of(16);
        let tiles = 2 * 2 * self.tile_keys() * (dim + 8) * 2;
        let decode_warps = self.tile_keys() / 16;
        tiles.max(decode_warps * TILE_ROWS * (dim + 2) * 4)
    }
}

/// Keys and values of one layer, with how they are seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paged {
    pub(super) keys: Address,
    pub(super) values: Address,
    /// Blocks of the step's sequences.
    pub(super) tables: Address,
    pub(super) window: Option<usize>,
    pub(super) scale: f32,
    pub(super) cap: Option<f32>,
}

impl Paged {
    fn arguments(&self) -> [Argument; 6] {
        let window = self.window.and_then(|window| i32::try_from(window).ok());
        [
            Argument::Address(self.keys),
            Argument::Address(self.values),
            Argument::Address(self.tables),
            Argument::Int(window.unwrap_or(i32::MAX)),
            Argument::Float(self.scale),
            Argument::Float(self.cap.unwrap_or(0.0)),
        ]
    }
}

/// What is added to the residual before a norm: the output of a linear layer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Delta {
    pub(super) x: Address,
    pub(super) bias: Address,
    /// Weights of a norm that it goes through first.
    pub(super) norm: Address,
}

/// A device with a shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernels<'a> {
    pub(super) device: &'a dyn Device,
    pub(super) shape: &'a Shape,
    /// Added to the mean square in norms.
    pub(super) eps: f32,
}

impl Kernels<'_> {
    fn launch(
        &self,
        kernel: &'static str,
        grid: (usize, usize),
        num_threads: usize,
        arguments: &[Argument],
    ) -> Result<(), Error> {
        self.device.launch(&Launch { kernel, grid, num_threads, shared_bytes: 0, arguments })
    }

    /// `residual = embedding[tokens] * scale`
    pub(super) fn embed(
        &self,
        (tokens, num_tokens): (Address, usize),
        embedding: Address,
        scale: f32,
        residual: Address,
    ) -> Result<(), Error> {
        use Argument::{Address, Float};
        let arguments = [Address(tokens), Address(embedding), Float(scale), Address(residual)];
        self.launch("embed", (num_tokens, 1), THREADS, &arguments)
    }

    /// `residual += delta; out = norm(residual)`, of the rows that are named (an address of such, or 0), without changing the
    /// residual, or of all.
    pub(super) fn rms_norm(
        &self,
        (residual, delta): (Address, Delta),
        weight: Address,
        (rows, num_rows): (Address, usize),
        out: Address,
    ) -> Result<(), Error> {
        use Argument::{Address, Float};
        let arguments = [
            Address(residual),
            Address(delta.x),
            Address(delta.bias),
            Address(delta.norm),
            Address(weight),
            Address(rows),
            Address(out),
            Float(self.eps),
        ];
        self.launch("rms_norm", (num_rows, 1), NORM_THREADS, &arguments)
    }

    /// Cosines and sines of a step's positions.
    pub(super) fn rope_angles(
        &self,
        (positions, is_long, num_tokens): (Address, Address, usize),
        (frequencies, scale, half): (Address, f32, usize),
        angles: Address,
    ) -> Result<(), Error> {
        use Argument::{Address, Float};
        let arguments = [
            Address(positions),
            Address(is_long),
            Address(frequencies),
            Float(scale),
            int(half),
            Address(angles),
        ];
        self.launch("rope_angles", (num_tokens, 1), WARP_SIZE, &arguments)
    }

    /// Rotates queries and keys, and writes keys and values to the cache.
    pub(super) fn rotate_and_store(
        &self,
        (qkv, num_tokens): (Address, usize),
        [bias, query_norm, key_norm]: [Address; 3],
        (angles, half): (Address, usize),
        (slots, paged): (Address, &Paged),
    ) -> Result<(), Error> {
        use Argument::{Address, Float};
        let heads = self.shape.num_heads + 2 * self.shape.num_kv_heads;
        let arguments = [
            Address(qkv),
            Address(bias),
            Address(query_norm),
            Address(key_norm),
            Address(angles),
            int(half),
            Address(slots),
            Address(paged.keys),
            Address(paged.values),
            Float(self.eps),
        ];
        let grid = (num_tokens, heads.div_ceil(ROPE_WARPS));
        self.launch("rotate_and_store", grid, ROPE_WARPS * WARP_SIZE, &arguments)
    }

    /// Attention of tokens of prompts.
    pub(super) fn attend_prefill(
        &self,
        (items, num_items): (Address, usize),
        qkv: Address,
        paged: &Paged,
        out: Address,
    ) -> Result<(), Error> {
        let mut arguments = vec![Argument::Address(items), Argument::Address(qkv)];
        arguments.extend(paged.arguments());
        arguments.push(Argument::Address(out));
        self.device.launch(&Launch {
            kernel: "attend_prefill",
            grid: (num_items, self.shape.num_kv_heads),
            num_threads: PREFILL_WARPS * WARP_SIZE,
            shared_bytes: self.shape.attention_bytes(),
            arguments: &arguments,
        })
    }

    /// Attention of tokens that decode.
    pub(super) fn attend_decode(
        &self,
        (items, num_items): (Address, usize),
        qkv: Address,
        paged: &Paged,
        (partials, out): (Address, Address),
    ) -> Result<(), Error> {
        let mut arguments = vec![Argument::Address(items), Argument::Address(qkv)];
        arguments.extend(paged.arguments());
        arguments.extend([Argument::Address(partials), Argument::Address(out)]);
        self.device.launch(&Launch {
            kernel: "attend_decode",
            grid: (num_items, self.shape.num_kv_heads),
            num_threads: self.shape.tile_keys() / 16 * WARP_SIZE,
            shared_bytes: self.shape.attention_bytes(),
            arguments: &arguments,
        })
    }

    /// Puts partial results of attention together.
    pub(super) fn combine(
        &self,
        (items, num_items): (Address, usize),
        partials: Address,
        out: Address,
    ) -> Result<(), Error> {
        use Argument::Address;
        let arguments = [Address(items), Address(partials), Address(out)];
        let threads = self.shape.head_dim.next_multiple_of(WARP_SIZE);
        self.launch("combine", (num_items, self.shape.num_heads), threads, &arguments)
    }

    /// `out = activation(gates) * ups`
    pub(super) fn gate(
        &self,
        (gate_up, num_tokens): (Address, usize),
        bias: Address,
        width: usize,
        out: Address,
    ) -> Result<(), Error> {
        use Argument::Address;
        let arguments = [Address(gate_up), Address(bias), int(width), Address(out)];
        let grid = (num_tokens, width.div_ceil(8 * THREADS));
        self.launch("gate", grid, THREADS, &arguments)
    }

    /// Chooses tokens, by the place of their items.
    pub(super) fn sample(
        &self,
        (logits, vocab_size): (Address, usize),
        (items, num_items): (Address, usize),
        tokens: Address,
    ) -> Result<(), Error> {
        use Argument::Address;
        let arguments = [Address(logits), int(vocab_size), Address(items), Address(tokens)];
        self.launch("sample", (num_items, 1), SAMPLE_THREADS, &arguments)
    }

    /// Caps numbers.
    pub(super) fn softcap(&self, x: Address, cap: f32, num: usize) -> Result<(), Error> {
        let arguments = [Argument::Address(x), Argument::Float(cap), int(num)];
        self.launch("softcap", (num.div_ceil(THREADS).min(1 << 14), 1), THREADS, &arguments)
    }
}

fn int(count: usize) -> Argument {
    Argument::Int(plan::int(count))
}
