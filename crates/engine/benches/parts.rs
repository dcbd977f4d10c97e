//! How fast the parts of a step are that are no linear layers.
//!
//! `cargo bench -p flotilla-engine --bench parts [-- <threads>]`. Times are the best of several rounds; attention is
//! compared with what a core's two units of fused multiply-adds do at most, which the first line measures.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::time::{Duration, Instant};

use flotilla_engine::parts::{
    AttentionPart, ElementwisePart, MULTIPLY_ADD_FLOPS, SamplingPart, multiply_add,
};
use flotilla_engine::{Activation, KvCacheDtype, SamplingParams};

/// `(num_heads, num_kv_heads, head_dim, num_layers)`, hidden and intermediate size.
const SHAPES: [(&str, (usize, usize, usize, usize), (usize, usize)); 2] =
    [("qwen05", (14, 2, 64, 24), (896, 4864)), ("tinyllama", (32, 4, 64, 22), (2048, 5632))];

fn main() {
    let threads = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(1);
    let peak = best(|| {
        std::hint::black_box(multiply_add());
    });
    println!(
        "{threads} threads, {:.0} GFLOP/s at most on one",
        MULTIPLY_ADD_FLOPS / peak.as_secs_f64() / 1e9
    );
    measure_sampling(threads);
    for (name, shape, widths) in SHAPES {
        println!("{name}");
        for (what, step) in [
            ("prefill 2 x 256", (2, 0, 256)),
            ("prefill 32 behind 224", (1, 224, 32)),
            ("decode batch 1 at 288", (1, 288, 1)),
            ("decode batch 32 at 288", (32, 288, 1)),
            ("decode batch 64 at 288", (64, 288, 1)),
        ] {
            for dtype in
                [KvCacheDtype::Fp32, KvCacheDtype::Bf16, KvCacheDtype::Fp16, KvCacheDtype::Q8]
            {
                let part = AttentionPart::new(shape, step, dtype, threads);
                let mut part = part.expect("a shape of a model");
                let write = best(|| part.write());
                let attend = best(|| part.attend());
                let rate = part.flops() / attend.as_secs_f64() / 1e9;
                println!(
                    "  attention, {what:24} {dtype:5} {:9.3} ms {rate:7.1} GFLOP/s, writing {:7.3} ms",
                    attend.as_secs_f64() * 1e3,
                    write.as_secs_f64() * 1e3
                );
            }
        }
        for num_rows in [1, 8, 32, 64, 256] {
            let part = ElementwisePart::new(num_rows, widths, threads);
            let mut part = part.expect("threads");
            let silu = best(|| part.gated(Activation::Silu));
            let gelu = best(|| part.gated(Activation::GeluTanh));
            let norm = best(|| part.rms_norm());
            let micro = |time: Duration| time.as_secs_f64() * 1e6;
            println!(
                "  {num_rows:3} rows of a layer: silu {:8.1} us, gelu {:8.1} us, two norms {:7.1} us",
                micro(silu),
                micro(gelu),
                2.0 * micro(norm)
            );
        }
    }
}

/// Sampling over a vocabulary of 128 thousand.
fn measure_sampling(threads: usize) {
    let greedy = SamplingParams::default();
    let drawn = SamplingParams { temperature: 0.8, ..greedy.clone() };
    let kinds = [
        ("greedy", greedy.clone()),
        ("greedy, penalties", SamplingParams { repetition_penalty: 1.1, ..greedy.clone() }),
        ("greedy, logprobs 5", SamplingParams { logprobs: Some(5), ..greedy }),
        ("temperature", drawn.clone()),
        ("top_k 50", SamplingParams { top_k: 50, ..drawn.clone() }),
        ("top_p 0.9", SamplingParams { top_p: 0.9, ..drawn.clone() }),
        ("top_k 50, top_p 0.9", SamplingParams { top_k: 50, top_p: 0.9, ..drawn.clone() }),
        ("min_p 0.05", SamplingParams { min_p: 0.05, ..drawn.clone() }),
        ("typical_p 0.9", SamplingParams { typical_p: 0.9, ..drawn }),
    ];
    for (name, params) in kinds {
        let time = |num_rows| {
            let part = SamplingPart::new(num_rows, 1 << 17, threads);
            let mut part = part.expect("threads");
            best(|| part.sample(&params)).as_secs_f64() * 1e3
        };
        println!("sampling, {name:20} {:8.3} ms one row, {:8.3} ms 64 rows", time(1), time(64));
    }
}

/// The best of several rounds.
fn best(mut run: impl FnMut()) -> Duration {
    run();
    let start = Instant::now();
    let mut least = Duration::MAX;
    let mut rounds = 0;
    while rounds < 3 || (rounds < 200 && start.elapsed() < Duration::from_millis(300)) {
        let start = Instant::now();
        run();
        least = least.min(start.elapsed());
        rounds += 1;
    }
    least
}
