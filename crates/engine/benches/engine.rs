//! How fast the runner is: decode steps by batch size, and prefill, on models with random weights.
//!
//! `cargo bench -p flotilla-engine [-- <threads>]`. Times are the best of several rounds; the share of the
//! peak is of what this machine does at most, measured by the first line.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

#[expect(clippy::unwrap_used, reason = "shared with the tests")]
#[path = "../tests/common/synthetic.rs"]
mod synthetic;

use std::time::{Duration, Instant};

use flotilla_engine::step::{BLOCK_SIZE, BlockId, SequenceInput, StepInput};
use flotilla_engine::{Architecture, Precision, Runner, RunnerOptions};
use synthetic::{Random, Shape};

const SMALL: Shape = Shape {
    architecture: Architecture::Llama,
    hidden_size: 256,
    intermediate_size: 704,
    num_hidden_layers: 6,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    vocab_size: 4096,
    max_position_embeddings: 4096,
    bf16: false,
};

const LARGE: Shape = Shape {
    architecture: Architecture::Llama,
    hidden_size: 768,
    intermediate_size: 2048,
    num_hidden_layers: 12,
    num_attention_heads: 12,
    num_key_value_heads: 4,
    vocab_size: 16_384,
    max_position_embeddings: 4096,
    bf16: false,
};

const MAX_TOKENS: usize = 2048;

fn main() {
    let threads = std::env::args().filter_map(|arg| arg.parse().ok()).next();
    let threads = threads.unwrap_or_else(|| {
        std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
    });
    let kept = RunnerOptions { threads, max_num_batched_tokens: MAX_TOKENS, ..Default::default() };
    measure("small", SMALL, &kept);
    for precision in Precision::ALL {
        let options = RunnerOptions { precision: Some(precision), ..kept.clone() };
        measure(&format!("large, {precision}"), LARGE, &options);
    }
}

fn measure(name: &str, shape: Shape, options: &RunnerOptions) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let num_parameters = shape.write(folder.path(), 1);
    let start = Instant::now();
    let mut runner = Runner::load(folder.path(), options).expect("the model just written");
    println!(
        "{name}: {:.1} M parameters in {:.1} MB, {} threads, loaded in {:?}",
        num_parameters as f64 / 1e6,
        runner.weight_bytes() as f64 / 1e6,
        options.threads,
        start.elapsed()
    );
    runner.allocate_kv_cache(64 * 40).expect("a KV cache");
    // The embedding is looked up, not multiplied.
    let macs = num_parameters - shape.vocab_size * shape.hidden_size;
    for batch in [1, 8, 32, 64] {
        let time = best(|| runner_step(&mut runner, batch, 200, 1), 20);
        report(&format!("decode, batch {batch}, context 200"), batch, macs, time);
    }
    for (sequences, len) in [(1, 128), (4, 512), (1, 2048)] {
        let time = best(|| runner_step(&mut runner, sequences, 0, len), 3);
        report(&format!("prefill, {sequences} x {len}"), sequences * len, macs, time);
    }
}

fn report(what: &str, tokens: usize, macs: usize, time: Duration) {
    let seconds = time.as_secs_f64();
    println!(
        "  {what:32} {:9.3} ms  {:9.0} tokens/s  {:6.1} GFLOP/s in linear layers",
        seconds * 1e3,
        tokens as f64 / seconds,
        2.0 * (macs * tokens) as f64 / seconds / 1e9
    );
}

fn best(mut step: impl FnMut(), rounds: usize) -> Duration {
    step();
    let times = (0..rounds).map(|_| {
        let start = Instant::now();
        step();
        start.elapsed()
    });
    times.min().unwrap_or_default()
}

fn runner_step(runner: &mut Runner, num_sequences: usize, computed: usize, scheduled: usize) {
    let mut random = Random(3);
    let blocks = (computed + scheduled).div_ceil(BLOCK_SIZE) as u32;
    let vocab_size = runner.config().vocab_size;
    let input = StepInput {
        token_ids: (0..num_sequences * scheduled)
            .map(|_| random.below(vocab_size) as u32)
            .collect(),
        sequences: (0..num_sequences as u32)
            .map(|sequence| SequenceInput {
                num_scheduled_tokens: scheduled,
                num_computed_tokens: computed,
                block_table: (sequence * blocks..(sequence + 1) * blocks).map(BlockId).collect(),
                is_long: false,
                wants_logits: true,
            })
            .collect(),
    };
    let logits = runner.forward(&input).expect("a step");
    assert_eq!(logits.num_rows(), num_sequences, "rows of logits");
}
