//! The parts of a step, at the shapes of a model of 0.5 billion parameters (24 layers, 896 wide).
//!
//! `cargo bench -p flotilla-engine --bench parts [-- <part of a name>]`, on an idle machine.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use flotilla_engine::parts::{self, Part};
use flotilla_engine::quant::BlockFormat;
use flotilla_engine::{Format, KvCacheDtype, ModelConfig, SamplingParams};

const HIDDEN_SIZE: usize = 896;
const INTERMEDIATE_SIZE: usize = 4864;
/// A token, small and large batches of decoding, a chunk of a prompt.
const NUM_ROWS: [usize; 4] = [1, 8, 32, 256];
const CONFIG: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 1, "num_attention_heads": 14, "num_key_value_heads": 2,
    "vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": true}"#;

const FORMATS: [Format; 7] = [
    Format::F32,
    Format::F16,
    Format::Bf16,
    Format::Int8,
    Format::Block(BlockFormat::Q8_0),
    Format::Block(BlockFormat::Q6K),
    Format::Block(BlockFormat::Q4K),
];

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn run(group: &mut Group<'_>, id: BenchmarkId, part: Part) {
    let mut part = black_box(part);
    group.bench_function(id, |bencher| bencher.iter(&mut part));
}

type Group<'a> = criterion::BenchmarkGroup<'a, criterion::measurement::WallTime>;

/// The three large products of a layer, and attention's.
fn linear(criterion: &mut Criterion) {
    let shapes = [
        ("qkv", [HIDDEN_SIZE, 1152]),
        ("attention output", [HIDDEN_SIZE, HIDDEN_SIZE]),
        ("gate and up", [HIDDEN_SIZE, 2 * INTERMEDIATE_SIZE]),
        ("down", [INTERMEDIATE_SIZE, HIDDEN_SIZE]),
    ];
    for (name, [in_features, out_features]) in shapes {
        let mut group = criterion.benchmark_group(format!("linear, {name}"));
        for format in FORMATS {
            if !in_features.is_multiple_of(format.block_len()) {
                continue;
            }
            for num_rows in NUM_ROWS {
                let shape = [num_rows, in_features, out_features];
                let operations = 2 * shape.iter().product::<usize>() as u64;
                group.throughput(Throughput::Elements(operations));
                let part = parts::linear(threads(), format, shape).expect("threads");
                run(&mut group, BenchmarkId::new(format.name(), num_rows), part);
            }
        }
    }
}

fn feed_forward(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("feed-forward network");
    for format in
        FORMATS.into_iter().filter(|format| HIDDEN_SIZE.is_multiple_of(format.block_len()))
    {
        for num_rows in NUM_ROWS {
            let shape = [num_rows, HIDDEN_SIZE, INTERMEDIATE_SIZE];
            group.throughput(Throughput::Elements(6 * shape.iter().product::<usize>() as u64));
            let part = parts::feed_forward(threads(), format, shape).expect("threads");
            run(&mut group, BenchmarkId::new(format.name(), num_rows), part);
        }
    }
}

fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    // Sequences, tokens before, new tokens.
    let steps = [
        ("decode", [1, 288, 1]),
        ("decode", [32, 288, 1]),
        ("decode", [64, 288, 1]),
        ("decode", [4, 4000, 1]),
        ("prefill", [2, 0, 256]),
        ("prefill", [1, 1536, 512]),
    ];
    for dtype in [KvCacheDtype::Fp32, KvCacheDtype::Bf16, KvCacheDtype::Q8] {
        for (name, step) in steps {
            let config = ModelConfig::parse(CONFIG).expect("a configuration");
            let part = parts::attention(threads(), config, dtype, step).expect("threads, memory");
            let id = BenchmarkId::new(format!("{name}, {dtype}"), format!("{step:?}"));
            run(&mut group, id, part);
        }
    }
}

fn sampler(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sampler");
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let warm = SamplingParams { temperature: 0.8, ..SamplingParams::default() };
    let kinds = [
        ("greedy", greedy.clone()),
        ("greedy, penalties", SamplingParams { repetition_penalty: 1.1, ..greedy.clone() }),
        ("greedy, log-probabilities", SamplingParams { logprobs: Some(5), ..greedy }),
        ("temperature", warm.clone()),
        ("top-k 50", SamplingParams { top_k: 50, ..warm.clone() }),
        ("top-p 0.95", SamplingParams { top_p: 0.95, ..warm }),
    ];
    for vocab_size in [32_000, 128_256] {
        for (name, params) in &kinds {
            let part = parts::sample(vocab_size, params.clone());
            run(&mut group, BenchmarkId::new(*name, vocab_size), part);
        }
    }
}

fn elementwise(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("elementwise");
    for num_rows in NUM_ROWS {
        let norm = parts::norm(threads(), [num_rows, HIDDEN_SIZE]).expect("threads");
        run(&mut group, BenchmarkId::new("rms_norm", num_rows), norm);
    }
}

criterion_group! {
    name = all;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = linear, feed_forward, attention, sampler, elementwise
}
criterion_main!(all);
