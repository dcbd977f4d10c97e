//! The device's logits beside those of the processor, in fp32: every family, prompts whole and in pieces, answers, all at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::backend::DeviceBackend;
use super::device::Device;
use super::emulator::Emulator;
use super::kernels::Shape;
use super::limits::{self, Sizes};
use crate::Error;
use crate::kernels::{Cpu, Simd, Threads};
use crate::runner::{Backend, Runner, RunnerOptions};
use crate::step::{BlockId, SequenceInput, StepInput};
use crate::weights::Checkpoint;
#[cfg(feature = "cuda")]
use crate::{Gpu, GpuId, cuda::driver::Cuda};
use crate::{KvCacheDtype, Precision};

mod sampling;

const NUM_BLOCKS: usize = 60;

/// The folder of this crate, be it where it was compiled or, told by the variable, where the tests were carried to.
#[expect(clippy::disallowed_methods, reason = "cargo sets it for tests, no user does")]
fn package() -> PathBuf {
    std::env::var("CARGO_MANIFEST_DIR")
        .map_or_else(|_| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

fn fixture(name: &str) -> PathBuf {
    package().join("tests/fixtures").join(name)
}

fn shipped_model() -> PathBuf {
    package().join("../../models/flotilla-reader")
}

/// Where the kernels run.
#[derive(Clone, Copy, Debug)]
enum Place {
    Emulator,
    #[cfg(feature = "cuda")]
    Gpu,
}

impl Place {
    fn open(self, shape: &Shape) -> Arc<dyn Device> {
        match self {
            Self::Emulator => Arc::new(Emulator::open(shape, 1 << 30)),
            #[cfg(feature = "cuda")]
            Self::Gpu => {
                let gpu = Gpu::find(GpuId::Index(0)).unwrap();
                Arc::new(Cuda::open(&gpu, shape, None).unwrap())
            }
        }
    }
}

/// Makes tests of functions that take a place: on the emulator, and on a GPU where there is one.
macro_rules! on_every_device {
    ($($name:ident),* $(,)?) => {
        mod on_the_emulator {
            $(#[test]
            fn $name() {
                super::$name(crate::cuda::tests::Place::Emulator);
            })*
        }

        #[cfg(feature = "cuda")]
        mod on_a_gpu {
            $(#[test]
            #[ignore = "needs a GPU: make check-gpu"]
            fn $name() {
                super::$name(crate::cuda::tests::Place::Gpu);
            })*
        }
    };
}
use on_every_device;

on_every_device!(
    every_family_has_the_logits_of_the_processor,
    bfloat16_is_computed_in_bfloat16,
    long_sequences_are_split_and_put_together,
    the_company_of_a_sequence_does_not_change_its_logits,
    the_limits_of_a_device_are_measured,
    recorded_steps_compute_the_same_bits,
    a_full_step_that_is_filled_up_has_room,
);

fn load(
    model: &Path,
    options: &RunnerOptions,
    open: impl FnOnce(&Shape) -> Arc<dyn Device>,
) -> Result<DeviceBackend, Error> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let cpu = Cpu::new(Simd::detect(), Threads::new(1).unwrap());
    DeviceBackend::load(&checkpoint, cpu, options, |shape| Ok(open(shape)))
}

fn device(place: Place, model: &Path, precision: Precision) -> DeviceBackend {
    let options = RunnerOptions {
        precision: Some(precision),
        kv_cache_dtype: None,
        ..RunnerOptions::default()
    };
    let mut backend = load(model, &options, |shape| place.open(shape)).unwrap();
    backend.allocate_kv_cache(NUM_BLOCKS).unwrap();
    backend
}

fn reference(model: &Path) -> Runner {
    let options = RunnerOptions {
        precision: Some(Precision::Fp32),
        kv_cache_dtype: Some(KvCacheDtype::Fp32),
        ..RunnerOptions::default()
    };
    let mut runner = Runner::load(model, &options).unwrap();
    runner.allocate_kv_cache(NUM_BLOCKS).unwrap();
    runner
}

/// Sequences that go on from step to step. Their blocks lie scattered in the cache.
struct Sequences {
    computed: Vec<usize>,
    vocab_size: usize,
}

impl Sequences {
    fn new(num: usize, vocab_size: usize) -> Self {
        Self { computed: vec![0; num], vocab_size }
    }

    /// The step in which each sequence goes on by so many tokens.
    fn step(&mut self, scheduled: &[usize]) -> StepInput {
        let mut input = StepInput::default();
        let num_sequences = self.computed.len();
        for (index, num) in scheduled.iter().enumerate().filter(|(_, num)| **num > 0) {
            let computed = self.computed[index];
            let tokens = (computed..computed + num).map(|position| {
                (((position * 31 + index * 17) % (self.vocab_size - 3)) + 3) as u32
            });
            input.token_ids.extend(tokens);
            let blocks = NUM_BLOCKS / num_sequences;
            let block = |i: usize| BlockId(((i * num_sequences + index) * 7 % NUM_BLOCKS) as u32);
            input.sequences.push(SequenceInput {
                num_scheduled_tokens: *num,
                num_computed_tokens: computed,
                block_table: (0..blocks).map(block).collect(),
                is_long: false,
                wants_logits: true,
            });
            self.computed[index] += num;
        }
        input
    }
}

/// How far the device's logits are from the reference, by the spread of the reference's.
fn check(place: Place, name: &str, precision: Precision, tolerance: f32) {
    let model = fixture(name);
    let (mut device, mut reference) = (device(place, &model, precision), reference(&model));
    let mut sequences = Sequences::new(3, device.config().vocab_size);
    // A prompt alone; in pieces beside others; answers beside prompts; only answers; a piece of two tokens.
    for scheduled in [[37, 0, 0], [1, 20, 70], [1, 30, 1], [1, 1, 1], [2, 1, 40], [1, 1, 1]] {
        let step = sequences.step(&scheduled);
        let expected = reference.forward(&step).unwrap();
        let logits = device.forward(&step, &[]).unwrap();
        assert_eq!(logits.num_rows(), expected.num_rows());
        for (row, (expected, logits)) in expected.rows().zip(logits.rows()).enumerate() {
            let error = distance(expected, logits);
            assert!(error < tolerance, "{name} {precision} {scheduled:?} row {row}: {error}");
        }
    }
}

/// The length of the difference, by that of `expected` around its mean.
fn distance(expected: &[f32], given: &[f32]) -> f32 {
    let mean = expected.iter().sum::<f32>() / expected.len() as f32;
    let spread = expected.iter().map(|x| (x - mean).powi(2)).sum::<f32>();
    let error = expected.iter().zip(given).map(|(x, y)| (x - y).powi(2)).sum::<f32>();
    (error / spread).sqrt()
}

/// Those whose widths are multiples of 8.
const FAMILIES: [&str; 21] = [
    "gemma2-v4",
    "gemma3",
    "llama-bf16",
    "llama-bias",
    "llama-f16",
    "llama-gelu",
    "llama-gqa",
    "llama-head-dim",
    "llama-mha",
    "llama-mqa",
    "llama-rope-dynamic",
    "llama-rope-llama3",
    "llama-rope-yarn-mscale",
    "llama-tied",
    "mistral",
    "phi3-longrope-partial",
    "phi3-window",
    "qwen2-tied-yarn",
    "qwen2-window",
    "qwen3",
    "qwen3-window",
];

fn every_family_has_the_logits_of_the_processor(place: Place) {
    for name in FAMILIES {
        check(place, name, Precision::Fp16, 0.015);
    }
}

fn bfloat16_is_computed_in_bfloat16(place: Place) {
    for name in ["llama-bf16", "gemma3", "qwen3"] {
        check(place, name, Precision::Bf16, 0.06);
    }
}

fn long_sequences_are_split_and_put_together(place: Place) {
    let model = shipped_model();
    let (mut device, mut reference) = (device(place, &model, Precision::Fp16), reference(&model));
    let mut sequences = Sequences::new(1, device.config().vocab_size);
    // The third split begins with the last token but one.
    for scheduled in [[500], [11], [1], [1], [1]] {
        let step = sequences.step(&scheduled);
        let expected = reference.forward(&step).unwrap();
        let logits = device.forward(&step, &[]).unwrap();
        let error = distance(expected.row(0), logits.row(0));
        assert!(error < 0.01, "{scheduled:?}: {error}");
    }
}

fn the_company_of_a_sequence_does_not_change_its_logits(place: Place) {
    let model = fixture("qwen3-window");
    let bits = |rows: &[Vec<f32>]| rows.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let mut alone = device(place, &model, Precision::Bf16);
    let mut sequences = Sequences::new(3, alone.config().vocab_size);
    let alone = [[0, 50, 0], [0, 1, 0], [0, 1, 0]]
        .map(|scheduled| alone.forward(&sequences.step(&scheduled), &[]).unwrap().row(0).to_vec());
    let mut among = device(place, &model, Precision::Bf16);
    let mut sequences = Sequences::new(3, among.config().vocab_size);
    let among = [[7, 50, 9], [1, 1, 30], [20, 1, 1]]
        .map(|scheduled| among.forward(&sequences.step(&scheduled), &[]).unwrap().row(1).to_vec());
    match place {
        Place::Emulator => assert!(bits(&alone) == bits(&among)),
        // cuBLAS may choose other algorithms for other numbers of rows.
        #[cfg(feature = "cuda")]
        Place::Gpu => {
            for (alone, among) in alone.iter().zip(&among) {
                assert!(distance(alone, among) < 0.02);
            }
        }
    }
}

#[test]
fn what_a_device_cannot_do_is_refused_with_the_reason() {
    let refused = |name: &str, options: &RunnerOptions, memory| {
        load(&fixture(name), options, |shape| Arc::new(Emulator::open(shape, memory)))
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    let options = RunnerOptions { kv_cache_dtype: None, ..RunnerOptions::default() };
    for (name, reason) in [
        ("llama-odd", "intermediate_size is 100"),
        ("gemma2", "head_dim is 12"),
        ("mixtral", "models of experts"),
    ] {
        let error = refused(name, &options, 1 << 30);
        assert!(error.contains(reason), "{name}: {error}");
    }
    let error = refused("llama-gqa", &options, 1000);
    assert!(error.contains("MiB are missing"), "{error}");
    // The weights fit, what is computed with does not.
    let weights = device(Place::Emulator, &fixture("llama-gqa"), Precision::Bf16).weight_bytes();
    let error = refused("llama-gqa", &options, weights + 100);
    assert!(error.contains("out of memory"), "{error}");
    let with =
        |precision, kv_cache_dtype| RunnerOptions { precision, kv_cache_dtype, ..options.clone() };
    let error = refused("llama-gqa", &with(Some(Precision::Int8), None), 1 << 30);
    assert!(error.contains("not in int8"), "{error}");
    let error = refused("llama-gqa", &with(None, Some(KvCacheDtype::Q8)), 1 << 30);
    assert!(error.contains("bf16, not in q8"), "{error}");
}

fn recorded_steps_compute_the_same_bits(place: Place) {
    let model = shipped_model();
    let mut recorded = device(place, &model, Precision::Bf16);
    let mut launched = device(place, &model, Precision::Bf16).without_graphs();
    let mut sequences = Sequences::new(3, recorded.config().vocab_size);
    // Forms come and go, one of the sequences passes from one split to two, prompts come between.
    let decodes = [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 0, 1]];
    let prompts = [[20, 250, 30], [1, 1, 12]];
    let steps = [&prompts[..1], &decodes, &prompts[1..], &decodes[..3]].concat();
    for scheduled in steps {
        let step = sequences.step(&scheduled);
        let bits = |device: &mut DeviceBackend| -> Vec<Vec<u32>> {
            let logits = device.forward(&step, &[]).unwrap();
            logits.rows().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
        };
        assert!(bits(&mut recorded) == bits(&mut launched), "{scheduled:?}");
    }
    assert_eq!((recorded.num_graphs(), launched.num_graphs()), (2, 0));
}

fn a_full_step_that_is_filled_up_has_room(place: Place) {
    // As many sequences as a step may have tokens, and one less than the next form has rows.
    for num in [3, 11] {
        let options = RunnerOptions {
            max_num_batched_tokens: num,
            kv_cache_dtype: None,
            ..RunnerOptions::default()
        };
        let model = fixture("llama-gqa");
        let mut device = load(&model, &options, |shape| place.open(shape)).unwrap();
        device.allocate_kv_cache(NUM_BLOCKS).unwrap();
        let mut reference = reference(&model);
        let step = Sequences::new(num, device.config().vocab_size).step(&vec![1; num]);
        let expected = reference.forward(&step).unwrap();
        let logits = device.forward(&step, &[]).unwrap();
        for (expected, logits) in expected.rows().zip(logits.rows()) {
            assert!(distance(expected, logits) < 0.05);
        }
    }
}

fn the_limits_of_a_device_are_measured(place: Place) {
    let device = place.open(&Shape::SMALLEST);
    let sizes = Sizes { num_bytes: 1 << 16, width: 32 };
    let (bytes_per_second, operations_per_second) = limits::measure(&device, sizes).unwrap();
    assert!(bytes_per_second.is_normal() && operations_per_second.is_normal());
}
