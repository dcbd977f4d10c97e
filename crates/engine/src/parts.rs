//! Parts of a step by themselves, for `benches/parts.rs` to time. Not part of the interface.

use crate::Error;
use crate::attention::{Attention, LayerInput};
use crate::config::{Activation, ModelConfig};
use crate::kernels::{
    Activations, Cpu, Epilogue, Kernel, Lanes, Simd, Threads, Vector, gated, rms_norm,
};
use crate::kv_cache::KvCache;
use crate::model::rope::RopeTable;
use crate::precision::KvCacheDtype;
use crate::sampler::{Samplers, SamplingParams, SamplingState};
use crate::step::{BLOCK_SIZE, BlockId, SequenceInput, StepInput, TokenId};

/// What computes, on so many threads.
fn cpu(threads: usize) -> Result<Cpu, Error> {
    Ok(Cpu { simd: Simd::detect(), threads: Threads::new(threads)? })
}

/// Rows of numbers between -1 and 1.
fn rows(num_rows: usize, width: usize) -> Activations {
    let mut rows = Activations::new(num_rows, width);
    for row in 0..num_rows {
        for (i, x) in rows.row_mut(row).iter_mut().enumerate() {
            *x = ((row * 31 + i * 17) as f32 * 0.37).sin();
        }
    }
    rows
}

/// Multiplications and additions of [`multiply_add`].
pub const MULTIPLY_ADD_FLOPS: f64 = (2 * 16 * SUMS * ROUNDS) as f64;

const SUMS: usize = 14;
const ROUNDS: usize = 1 << 16;

/// Fused multiply-adds of numbers that lie in registers, on one thread. Returns their sum.
pub fn multiply_add() -> f32 {
    let mut sum = Lanes::ZERO;
    Simd::detect().run(MultiplyAdd(&mut sum));
    sum.0.iter().sum()
}

struct MultiplyAdd<'a>(&'a mut Lanes);

impl Kernel for MultiplyAdd<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let w = V::load(std::hint::black_box(&Lanes([0.5; 16])));
        let mut sums = [V::zero(); SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = w.fma(0.5, *sum);
            }
        }
        for sum in sums {
            let mut lanes = Lanes::ZERO;
            sum.store(&mut lanes);
            self.0.0[0] += lanes.0[0];
        }
    }
}

/// Attention of a step in every layer of a model.
#[derive(Debug)]
pub struct AttentionPart {
    config: ModelConfig,
    cpu: Cpu,
    rope: RopeTable,
    qkv: Activations,
    out: Activations,
    cache: KvCache,
    attention: Attention,
    input: StepInput,
}

impl AttentionPart {
    /// `(num_heads, num_kv_heads, head_dim, num_layers)`, and a step of so many sequences that have computed so
    /// many tokens and compute so many more.
    pub fn new(
        (num_heads, num_kv_heads, head_dim, num_layers): (usize, usize, usize, usize),
        (num_sequences, computed, scheduled): (usize, usize, usize),
        dtype: KvCacheDtype,
        threads: usize,
    ) -> Result<Self, Error> {
        let end = computed + scheduled;
        let config = ModelConfig::parse(&format!(
            r#"{{"model_type": "llama", "hidden_size": 32, "intermediate_size": 8, "vocab_size": 8,
            "num_hidden_layers": {num_layers}, "num_attention_heads": {num_heads},
            "num_key_value_heads": {num_kv_heads}, "head_dim": {head_dim},
            "max_position_embeddings": {end}, "rms_norm_eps": 1e-5}}"#
        ))?;
        let per_sequence = end.div_ceil(BLOCK_SIZE);
        let num_tokens = num_sequences * scheduled;
        let mut rope = RopeTable::new(&config.ropes[0]);
        rope.ensure(end);
        // The blocks of a sequence are not neighbours.
        let block = |sequence, index| BlockId((index * num_sequences + sequence) as u32);
        let sequence = |sequence| SequenceInput {
            num_scheduled_tokens: scheduled,
            num_computed_tokens: computed,
            block_table: (0..per_sequence).map(|index| block(sequence, index)).collect(),
            is_long: false,
            wants_logits: false,
        };
        let sequences: Vec<_> = (0..num_sequences).map(sequence).collect();
        let qkv = rows(num_tokens.max(num_sequences), config.query_width() + 2 * config.kv_width());
        let mut part = Self {
            cpu: cpu(threads)?,
            rope,
            qkv,
            out: Activations::new(num_tokens, config.query_width()),
            cache: KvCache::new(&config, num_sequences * per_sequence, dtype)?,
            attention: Attention::new(threads),
            input: StepInput::default(),
            config,
        };
        part.fill(&sequences, computed);
        part.input = StepInput { token_ids: vec![0; num_tokens], sequences };
        part.attention.plan(&part.config, &part.input);
        Ok(part)
    }

    /// Writes the tokens that are computed already, so that their memory is resident.
    fn fill(&mut self, sequences: &[SequenceInput], computed: usize) {
        for position in 0..computed {
            let at = |sequence: &SequenceInput| SequenceInput {
                num_scheduled_tokens: 1,
                num_computed_tokens: position,
                ..sequence.clone()
            };
            let sequences: Vec<_> = sequences.iter().map(at).collect();
            let input = StepInput { token_ids: vec![0; sequences.len()], sequences };
            self.attention.plan(&self.config, &input);
            self.write();
        }
    }

    /// Keys and values of the step into the cache, in every layer.
    pub fn write(&mut self) {
        for index in 0..self.config.num_hidden_layers {
            let Self { config, cpu, rope, qkv, cache, attention, .. } = self;
            let layer =
                LayerInput { config, rope, sliding_window: None, qk_norm: None, qkv: qkv.rows() };
            attention.write(cpu, layer, cache.layer_mut(index));
        }
    }

    /// Attention of the step, in every layer.
    pub fn attend(&mut self) {
        for index in 0..self.config.num_hidden_layers {
            let Self { config, cpu, rope, qkv, cache, attention, input, out } = self;
            let layer =
                LayerInput { config, rope, sliding_window: None, qk_norm: None, qkv: qkv.rows() };
            cpu.threads.step(|| {
                attention.attend(cpu, layer, (input, cache.layer_mut(index)), out.shared());
            });
        }
    }

    /// Multiplications and additions that [`Self::attend`] can't do without.
    pub fn flops(&self) -> f64 {
        let keys: usize = self
            .input
            .sequences
            .iter()
            .flat_map(|s| (1..=s.num_scheduled_tokens).map(|i| s.num_computed_tokens + i))
            .sum();
        (4 * keys * self.config.query_width() * self.config.num_hidden_layers) as f64
    }
}

/// What lies between the linear layers of `num_rows` tokens.
#[derive(Debug)]
pub struct ElementwisePart {
    cpu: Cpu,
    num_rows: usize,
    all_rows: Vec<usize>,
    weight: Vec<f32>,
    gate_up: Activations,
    hidden: Activations,
    activated: Activations,
    normed: Activations,
}

impl ElementwisePart {
    /// Of a model with these widths.
    pub fn new(
        num_rows: usize,
        (hidden_size, intermediate_size): (usize, usize),
        threads: usize,
    ) -> Result<Self, Error> {
        Ok(Self {
            cpu: cpu(threads)?,
            num_rows,
            all_rows: (0..num_rows).collect(),
            weight: vec![1.0; hidden_size],
            gate_up: rows(num_rows, 2 * intermediate_size),
            hidden: rows(num_rows, hidden_size),
            activated: Activations::new(num_rows, intermediate_size),
            normed: Activations::new(num_rows, hidden_size),
        })
    }

    /// `activation(gate) * up`
    pub fn gated(&mut self, activation: Activation) {
        let Self { cpu, num_rows, gate_up, activated, .. } = self;
        cpu.threads
            .step(|| gated(cpu, activation, (gate_up.rows(), *num_rows), activated.shared()));
    }

    /// `x / rms(x) * weight`
    pub fn rms_norm(&mut self) {
        let Self { cpu, all_rows, weight, hidden, normed, .. } = self;
        let out = (normed.shared(), Epilogue::Store);
        cpu.threads.step(|| rms_norm(cpu, (hidden.rows(), all_rows), (weight, 1e-5), out));
    }
}

/// Sampling of rows of random logits.
#[derive(Debug)]
pub struct SamplingPart {
    threads: Threads,
    samplers: Samplers,
    logits: Activations,
    rows: Vec<Option<TokenId>>,
}

impl SamplingPart {
    /// Of so many rows over a vocabulary of this size.
    pub fn new(num_rows: usize, vocab_size: usize, threads: usize) -> Result<Self, Error> {
        let mut logits = Activations::new(num_rows, vocab_size);
        let mut state = 1_u64;
        for row in 0..num_rows {
            for logit in logits.row_mut(row) {
                *logit = -2.0 * LOGITS_RANGE;
                // Some bell.
                for _ in 0..4 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    *logit += (state >> 40) as f32 / (1 << 24) as f32 * LOGITS_RANGE;
                }
            }
        }
        Ok(Self {
            threads: Threads::new(threads)?,
            samplers: Samplers::new(threads),
            logits,
            rows: vec![None; num_rows],
        })
    }

    /// Chooses a token of each row.
    pub fn sample(&mut self, params: &SamplingParams) {
        let state = SamplingState::new(params.clone(), &[1, 2, 3], &[0]);
        let Self { threads, samplers, logits, rows } = self;
        samplers.each(threads, rows, |sampler, index, row| {
            *row = sampler.sample(logits.row(index), &state).ok().map(|chosen| chosen.token);
        });
    }
}

/// How far random logits reach.
const LOGITS_RANGE: f32 = 4.0;
