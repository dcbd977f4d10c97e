//! The parts that a step's time goes to, each ready to be run again and again: for the benchmarks alone.

use crate::attention::{Attention, LayerInput};
use crate::config::{Activation, ModelConfig};
use crate::kernels::{
    Activations, Cpu, Epilogue, Inner, Linear, Mlp, PackedMatrix, RowSource, Simd, Threads, matmul,
    rms_norm,
};
use crate::kv_cache::KvCache;
use crate::model::rope::RopeTable;
use crate::sampler::{Sampler, SamplingParams, SamplingState};
use crate::step::{BLOCK_SIZE, BlockId, SequenceInput, StepInput, TokenId};
use crate::weights::Format;
use crate::{Error, KvCacheDtype};

/// Something to measure: each call does it once.
pub type Part = Box<dyn FnMut() + Send>;

/// A linear layer with random weights: so many rows, inputs and outputs.
///
/// # Errors
/// If the threads can't be started.
pub fn linear(
    threads: usize,
    format: Format,
    [num_rows, in_features, out_features]: [usize; 3],
) -> Result<Part, Error> {
    let cpu = cpu(threads)?;
    let linear = random_linear(&cpu, format, [in_features, out_features])?;
    let x = random_rows(num_rows, in_features);
    let mut out = Activations::new(num_rows, out_features);
    Ok(Box::new(move || {
        cpu.threads.step(|| {
            matmul(&cpu, (x.rows(), num_rows), &linear, (out.shared(), Epilogue::Store));
        });
    }))
}

/// Attention of one layer of a model: of each sequence, so many tokens before and so many new ones.
///
/// # Errors
/// If the threads can't be started, or there is no memory for the cache.
pub fn attention(
    threads: usize,
    config: ModelConfig,
    dtype: KvCacheDtype,
    [num_sequences, num_before, num_new]: [usize; 3],
) -> Result<Part, Error> {
    let cpu = cpu(threads)?;
    let config = ModelConfig { num_hidden_layers: 1, ..config };
    let blocks = (num_before + num_new).div_ceil(BLOCK_SIZE) as u32;
    let input = StepInput {
        token_ids: vec![0; num_sequences * num_new],
        sequences: (0..num_sequences as u32)
            .map(|sequence| SequenceInput {
                num_scheduled_tokens: num_new,
                num_computed_tokens: num_before,
                block_table: (sequence * blocks..(sequence + 1) * blocks).map(BlockId).collect(),
                is_long: false,
                wants_logits: true,
            })
            .collect(),
    };
    let mut cache = KvCache::new(&config, num_sequences * blocks as usize, dtype)?;
    let mut rope = RopeTable::new(&config.ropes[0]);
    rope.ensure(num_before + num_new);
    let num_tokens = input.token_ids.len();
    let qkv = random_rows(num_tokens, config.query_width() + 2 * config.kv_width());
    let mut out = Activations::new(num_tokens, config.query_width());
    let mut attention = Attention::new(cpu.threads.num_threads());
    Ok(Box::new(move || {
        cpu.threads.step(|| {
            attention.plan(&config, &input);
            let layer = LayerInput {
                config: &config,
                rope: &rope,
                sliding_window: None,
                qk_norm: None,
                qkv: qkv.rows(),
            };
            let cache = cache.layer_mut(0);
            attention.write(&cpu, layer, cache);
            attention.attend(&cpu, layer, (&input, cache), out.shared());
        });
    }))
}

/// Choosing a token from a row of random logits.
pub fn sample(vocab_size: usize, params: SamplingParams) -> Part {
    let mut logits = vec![0.0; vocab_size];
    fill(1, &mut logits);
    let mut sampler = Sampler::default();
    let prompt: Vec<TokenId> = (0..100).collect();
    let state = SamplingState::new(params, &prompt, &[]);
    Box::new(move || {
        let chosen = sampler.sample(&logits, &state);
        assert!(std::hint::black_box(chosen).is_ok(), "a token can be chosen");
    })
}

/// Norming rows.
///
/// # Errors
/// If the threads can't be started.
pub fn norm(threads: usize, [num_rows, width]: [usize; 2]) -> Result<Part, Error> {
    let cpu = cpu(threads)?;
    let x = random_rows(num_rows, width);
    let (weight, from) = (vec![1.0; width], (0..num_rows).collect::<Vec<_>>());
    let mut out = Activations::new(num_rows, width);
    Ok(Box::new(move || {
        cpu.threads.step(|| {
            rms_norm(&cpu, (x.rows(), &from), (&weight, 1e-6), (out.shared(), Epilogue::Store));
        });
    }))
}

/// A feed-forward network, of SiLU, with random weights: so many rows, numbers of each, and numbers between.
///
/// # Errors
/// If the threads can't be started.
pub fn feed_forward(
    threads: usize,
    format: Format,
    [num_rows, hidden_size, intermediate_size]: [usize; 3],
) -> Result<Part, Error> {
    let cpu = cpu(threads)?;
    let mlp = Mlp {
        activation: Activation::Silu,
        gate_up: random_linear(&cpu, format, [hidden_size, 2 * intermediate_size])?,
        down: random_linear(&cpu, format, [intermediate_size, hidden_size])?,
    };
    let x = random_rows(num_rows, hidden_size);
    let mut inner = Inner::new(intermediate_size);
    let mut out = Activations::new(num_rows, hidden_size);
    Ok(Box::new(move || {
        cpu.threads.step(|| {
            mlp.widen(&cpu, (x.rows(), num_rows), &mut inner);
            mlp.narrow(&cpu, (&inner, num_rows), (out.shared(), Epilogue::Store));
        });
    }))
}

fn random_linear(
    cpu: &Cpu,
    format: Format,
    [in_features, out_features]: [usize; 2],
) -> Result<Linear, Error> {
    let write = |row: usize, bytes: &mut [u8]| {
        let mut numbers = vec![0.0; in_features];
        fill(row, &mut numbers);
        format.given().encode(&numbers, bytes);
    };
    let source = RowSource { format, num_rows: out_features, write: &write };
    let weight = PackedMatrix::pack(cpu, in_features, &[source])?;
    Ok(Linear { weight, bias: None })
}

fn cpu(threads: usize) -> Result<Cpu, Error> {
    Ok(Cpu::new(Simd::detect(), Threads::new(threads)?))
}

fn random_rows(num_rows: usize, width: usize) -> Activations {
    let mut rows = Activations::new(num_rows, width);
    (0..num_rows).for_each(|row| fill(row, rows.row_mut(row)));
    rows
}

/// Numbers from -1 to 1 that look random and are the same each time.
fn fill(seed: usize, numbers: &mut [f32]) {
    let mut state = seed as u64;
    for number in numbers {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
        *number = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
    }
}
