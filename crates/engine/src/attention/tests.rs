//! Attention against the plain formula, position by position.

use super::*;
use crate::kernels::{Activations, Simd, Threads};
use crate::kv_cache::KvCache;
use crate::precision::KvCacheDtype;

const NUM_TOKENS: usize = 75;

fn config(num_kv_heads: usize, head_dim: usize) -> ModelConfig {
    let json = serde_json::json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": num_kv_heads, "head_dim": head_dim,
        "vocab_size": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    });
    ModelConfig::parse(&json.to_string()).unwrap()
}

/// Position by position, in `f64`, out of a plain list of rotated rows.
fn naive(layer: LayerInput<'_>, head: usize) -> Vec<f64> {
    let LayerInput { config, rope, sliding_window, qkv, .. } = layer;
    let dim = config.head_dim;
    let rotated = |row: usize, column: usize| -> Vec<f64> {
        let (cos, sin) = rope.at(row, false);
        let half = cos.len();
        let x = qkv.slice(row, column, dim);
        let mut out: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        for pair in 0..half {
            let (a, b) = (f64::from(x[pair]), f64::from(x[pair + half]));
            let (cos, sin) = (f64::from(cos[pair]), f64::from(sin[pair]));
            (out[pair], out[pair + half]) = (a * cos - b * sin, b * cos + a * sin);
        }
        out
    };
    let key_column = config.query_width() + head / config.heads_per_kv_head() * dim;
    let value_column = key_column + config.kv_width();
    let mut out = Vec::new();
    for row in 0..NUM_TOKENS {
        let query = rotated(row, head * dim);
        let weights: Vec<f64> = (0..=row)
            .map(|key| {
                if sliding_window.is_some_and(|window| row - key >= window) {
                    return 0.0;
                }
                let key = rotated(key, key_column);
                let dot: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                let score = dot * f64::from(config.attention_scale);
                let cap = config.attention_softcap.map(f64::from);
                cap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
            })
            .collect();
        let total: f64 = weights.iter().sum();
        out.extend((0..dim).map(|i| {
            let value = |key: usize| f64::from(qkv.slice(key, value_column + i, 1)[0]);
            (0..=row).map(|key| weights[key] * value(key)).sum::<f64>() / total
        }));
    }
    out
}

#[test]
fn attention_agrees_with_the_plain_formula() {
    let windows = [None, Some(1), Some(5), Some(16), Some(33), Some(1000)];
    for (num_kv_heads, head_dim, rotated) in
        [(4, 16, 16), (2, 10, 4), (4, 24, 24), (1, 8, 6), (1, 64, 48), (1, 300, 300)]
    {
        for (case, sliding_window) in windows.into_iter().enumerate() {
            let mut config = config(num_kv_heads, head_dim);
            config.ropes[0].dim = rotated;
            config.attention_softcap = (case % 2 == 1).then_some(1.5);
            config.attention_scale *= 1.0 + case as f32 / 4.0;
            let mut qkv =
                Activations::new(NUM_TOKENS, config.query_width() + 2 * config.kv_width());
            for row in 0..NUM_TOKENS {
                let numbers = qkv.row_mut(row).iter_mut().enumerate();
                numbers.for_each(|(i, x)| *x = ((row * 31 + i * 17) as f32 * 0.37).sin());
            }
            let mut rope = RopeTable::new(&config.ropes[0]);
            rope.ensure(NUM_TOKENS);
            let layer = LayerInput {
                config: &config,
                rope: &rope,
                sliding_window,
                qk_norm: None,
                qkv: qkv.rows(),
            };
            // Numbers up to 1; rounding moves scores and values by about that much of them.
            for (dtype, bound) in KvCacheDtype::ALL.into_iter().zip([1e-5, 2e-3, 1.5e-2, 1.5e-2]) {
                let mut cache = KvCache::new(&config, NUM_BLOCKS, dtype).unwrap();
                let out = attend(layer, &step_from(0, [6, 2, 5, 0, 3]), cache.layer_mut(0));
                let mut largest: f64 = 0.0;
                for head in 0..4 {
                    for (i, want) in naive(layer, head).iter().enumerate() {
                        let got = out.row(i / head_dim)[head * head_dim + i % head_dim];
                        let error = (f64::from(got) - want).abs();
                        assert!(
                            error < bound,
                            "{dtype}, window {sliding_window:?}, head {head}, {i}: {got}, {want}"
                        );
                        largest = largest.max(error);
                    }
                }
                let is_rounded = dtype != KvCacheDtype::Fp32;
                assert!(!is_rounded || largest > bound / 100.0, "{dtype}: nothing is rounded");
            }
        }
    }
}

const NUM_BLOCKS: usize = 7;

/// A step of the tokens from `first` on.
fn step_from(first: usize, block_table: [u32; 5]) -> StepInput {
    StepInput {
        token_ids: vec![0; NUM_TOKENS - first],
        sequences: vec![SequenceInput {
            num_scheduled_tokens: NUM_TOKENS - first,
            num_computed_tokens: first,
            block_table: block_table.map(BlockId).to_vec(),
            is_long: false,
            wants_logits: false,
        }],
    }
}

fn attend(layer: LayerInput<'_>, input: &StepInput, cache: &mut LayerCache) -> Activations {
    let cpu = Cpu::new(Simd::detect(), Threads::new(1).unwrap());
    let mut attention = Attention::new(1);
    let mut out = Activations::new(NUM_TOKENS, layer.config.query_width());
    attention.plan(layer.config, input);
    attention.write(&cpu, layer, cache);
    attention.attend(&cpu, layer, (input, cache), out.shared());
    out
}

#[test]
fn blocks_before_the_window_are_not_read() {
    let config = config(2, 16);
    let mut qkv = Activations::new(NUM_TOKENS, config.query_width() + 2 * config.kv_width());
    for row in 0..NUM_TOKENS {
        let numbers = qkv.row_mut(row).iter_mut().enumerate();
        numbers.for_each(|(i, x)| *x = ((row * 13 + i * 7) as f32 * 0.41).sin());
    }
    let mut rope = RopeTable::new(&config.ropes[0]);
    rope.ensure(NUM_TOKENS);
    let layer = LayerInput {
        config: &config,
        rope: &rope,
        sliding_window: Some(20),
        qk_norm: None,
        qkv: qkv.rows(),
    };
    let mut cache = KvCache::new(&config, NUM_BLOCKS, KvCacheDtype::Fp32).unwrap();
    let whole = attend(layer, &step_from(0, [6, 2, 5, 0, 3]), cache.layer_mut(0));
    let LayerCache::Fp32(pages) = cache.layer_mut(0) else { unreachable!("as it was made") };
    for mut head in pages.heads_mut() {
        for offset in 0..BLOCK_SIZE {
            head.write((BlockId(1), offset), &[f32::NAN; 16], &[f32::NAN; 16]);
        }
    }
    // Token 70 sees those from 51 on: block 3 is the first.
    let layer = LayerInput { qkv: qkv.rows_from(70), ..layer };
    let last = attend(layer, &step_from(70, [1, 1, 1, 0, 3]), cache.layer_mut(0));
    for row in 70..NUM_TOKENS {
        assert_eq!(last.row(row - 70), whole.row(row), "token {row}");
    }
}
