//! Precisions of weights and dtypes of the KV cache: near fp32 by as much as the format allows, and under
//! each of them an answer depends on nothing but its request.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/driver.rs"]
mod driver;
#[path = "common/synthetic.rs"]
mod synthetic;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use driver::{Sequence, argmax, generate, run, step};
use flotilla_engine::quant::BlockFormat;
use flotilla_engine::step::{BlockId, TokenId};
use flotilla_engine::{
    Architecture, Engine, EngineConfig, Format, InstructionSet, KvCacheDtype, MatrixRole,
    Precision, Request, Runner, RunnerOptions, SamplingParams, StepOutput, Tokenizer,
};
use synthetic::{Random, Shape};

/// Rows of whole blocks of every format, but for the feed-forward network's second layer, where the
/// formats of 256 give way to that of 32.
const SHAPE: Shape = Shape {
    architecture: Architecture::Llama,
    hidden_size: 256,
    intermediate_size: 352,
    num_hidden_layers: 2,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    vocab_size: 517,
    max_position_embeddings: 256,
    bf16: false,
};

fn synthetic() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    SHAPE.write(folder.path(), 1);
    folder
}

fn prompt(len: usize) -> Vec<TokenId> {
    let mut random = Random(5);
    (0..len).map(|_| random.below(SHAPE.vocab_size) as TokenId).collect()
}

fn load(
    path: &Path,
    threads: usize,
    precision: Option<Precision>,
    kv_cache_dtype: KvCacheDtype,
) -> Runner {
    let options = RunnerOptions {
        threads,
        max_num_batched_tokens: 256,
        precision,
        kv_cache_dtype: Some(kv_cache_dtype),
        ..RunnerOptions::default()
    };
    let mut runner = Runner::load(path, &options).unwrap();
    runner.allocate_kv_cache(64).unwrap();
    runner
}

/// Logits at the end of a prompt and at every token before.
fn logits(runner: &mut Runner, tokens: &[TokenId]) -> Vec<Vec<f32>> {
    run(runner, &mut Sequence::contiguous(tokens.to_vec(), 0, 128).of(runner), 1)
}

/// Root mean square of the differences, relative to that of the numbers.
fn relative_error(numbers: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(numbers.len(), expected.len());
    let squares = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let differences = numbers.iter().zip(expected).map(|(x, want)| f64::from(x - want));
    let error = squares(&mut differences.into_iter());
    (error / squares(&mut expected.iter().map(|x| f64::from(*x)))).sqrt()
}

/// By how much a format moves weights like those of the synthetic checkpoints, and activations beside them.
fn error_of_products(precision: Precision) -> f64 {
    let mut random = Random(9);
    let weights: Vec<f32> = (0..4096).map(|_| random.signed()).collect();
    let blocks = |format: BlockFormat| {
        let mut bytes = vec![0; weights.len() / format.block_len() * format.block_bytes()];
        format.encode(&weights, &mut bytes);
        let mut out = vec![0.0; weights.len()];
        format.decode(&bytes, &mut out);
        out
    };
    let rows = |len: usize| {
        let round = |row: &[f32]| {
            let scale = row.iter().fold(0.0, |largest: f32, x| largest.max(x.abs())) / 127.0;
            row.iter().map(|x| (x / scale).round() * scale).collect::<Vec<_>>()
        };
        weights.chunks(len).flat_map(round).collect()
    };
    let activations = || {
        let mean = weights.iter().map(|x| x.abs()).sum::<f32>() / weights.len() as f32;
        let step = 4.0 * mean / 127.0;
        let rounded: Vec<f32> = weights.iter().map(|x| (x / step).round() * step).collect();
        relative_error(&rounded, &weights)
    };
    let rounded: Vec<f32> = match precision {
        Precision::Fp32 => weights.clone(),
        Precision::Fp16 => weights.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect(),
        Precision::Bf16 => weights.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect(),
        Precision::Q8_0 => blocks(BlockFormat::Q8_0),
        Precision::Int8 => rows(256),
        Precision::Q6K => blocks(BlockFormat::Q6K),
        Precision::Q4K => blocks(BlockFormat::Q4K),
    };
    let error = relative_error(&rounded, &weights);
    // Activations get 8 bits as well, up to four times their mean.
    error.hypot(if precision == Precision::Int8 { activations() } else { 0.0 })
}

#[test]
fn logits_of_every_precision_are_as_near_to_fp32_as_its_weights() {
    let folder = synthetic();
    let tokens = prompt(40);
    let kv = KvCacheDtype::Fp32;
    let exact = logits(&mut load(folder.path(), 1, None, kv), &tokens).concat();
    let mut last = 0.0;
    // From the finest to the coarsest.
    for precision in [
        Precision::Fp32,
        Precision::Fp16,
        Precision::Bf16,
        Precision::Q8_0,
        Precision::Int8,
        Precision::Q6K,
        Precision::Q4K,
    ] {
        let rounded = logits(&mut load(folder.path(), 1, Some(precision), kv), &tokens).concat();
        let (error, products) = (relative_error(&rounded, &exact), error_of_products(precision));
        eprintln!("{precision}: {error:.2e}, products {products:.2e}");
        if precision == Precision::Fp32 {
            assert_eq!(rounded, exact);
            continue;
        }
        assert!(error < 8.0 * products, "{precision}: {error:.2e}, products {products:.2e}");
        assert!(error > products, "{precision}: {error:.2e}, products {products:.2e}");
        // Evenly spread weights leave a row's scale and a block's alike.
        assert!(error > 0.9 * last, "{precision} is nearer than the one before: {error}, {last}");
        last = error;
    }
}

#[test]
fn logits_of_every_kv_cache_dtype_are_near_to_fp32() {
    let folder = synthetic();
    let tokens = prompt(60);
    let exact = logits(&mut load(folder.path(), 1, None, KvCacheDtype::Fp32), &tokens).concat();
    for (dtype, low, high) in [
        (KvCacheDtype::Fp16, 1e-5, 1e-3),
        (KvCacheDtype::Bf16, 1e-4, 8e-3),
        (KvCacheDtype::Q8, 1e-4, 2e-2),
    ] {
        let rounded = logits(&mut load(folder.path(), 1, None, dtype), &tokens).concat();
        let error = relative_error(&rounded, &exact);
        eprintln!("{dtype}: {error:.2e}");
        assert!((low..high).contains(&error), "{dtype}: {error:.2e}");
    }
}

#[test]
fn kv_cache_is_in_half_precision_unless_the_weights_are_in_fp32() {
    let dtype = |name: &str, precision, kv_cache_dtype| {
        let options = RunnerOptions { precision, kv_cache_dtype, ..RunnerOptions::default() };
        Runner::load(&fixture(name), &options).unwrap().kv_cache_dtype()
    };
    let (fp32, fp16) = (KvCacheDtype::Fp32, KvCacheDtype::Fp16);
    assert_eq!(dtype("llama-gqa", None, None), fp32);
    assert_eq!(dtype("llama-gqa", Some(Precision::Q8_0), None), fp16);
    assert_eq!(dtype("llama-bf16", None, None), fp16);
    assert_eq!(dtype("llama-f16", None, None), fp16);
    assert_eq!(dtype("llama-bf16", Some(Precision::Fp32), None), fp32);
    assert_eq!(dtype("llama-bf16", None, Some(KvCacheDtype::Q8)), KvCacheDtype::Q8);
}

#[test]
fn less_precision_takes_less_memory() {
    let folder = synthetic();
    let weights = |precision| {
        load(folder.path(), 1, Some(precision), KvCacheDtype::Fp32).weight_bytes() as f64
    };
    let fp32 = weights(Precision::Fp32);
    // The feed-forward network's second layer is finer, and outputs are filled up to 16.
    for (precision, bits) in [
        (Precision::Fp16, 16.0),
        (Precision::Bf16, 16.0),
        (Precision::Q8_0, 8.5),
        // A scale for a row, and outputs are filled up to 32, inputs to 64.
        (Precision::Int8, 8.3),
        (Precision::Q6K, 6.83),
        (Precision::Q4K, 5.75),
    ] {
        let share = weights(precision) / fp32;
        assert!((share - bits / 32.0).abs() < 0.01, "{precision}: {share} of fp32");
    }
    // The two matrices of the vocabulary: the embedding is not filled up.
    let (layer, vocabulary) = (MatrixRole::Layer, MatrixRole::Vocabulary);
    let layers = [(512, 256), (256, 256), (704, 256), (256, 352)].map(|shape| (layer, shape));
    for precision in [Precision::Fp32, Precision::Q8_0, Precision::Q4K] {
        let bytes = |(role, shape)| precision.matrix_bytes(role, shape, Format::F32);
        let output = bytes((vocabulary, (517, 256)));
        let embedding = precision.format(vocabulary, 256, Format::F32).num_bytes(517 * 256);
        // Norms stay as they are: two a layer, and the last.
        let norms = (2 * 2 + 1) * 256 * size_of::<f32>();
        let all = 2 * layers.into_iter().map(bytes).sum::<usize>() + output + embedding + norms;
        assert_eq!(weights(precision), all as f64, "{precision}");
    }
    let block = |dtype| load(folder.path(), 1, None, dtype).kv_bytes_per_block();
    // 2 layers, 2 heads of 64, 16 keys and 16 values; in q8 a scale for each.
    assert_eq!(block(KvCacheDtype::Fp32), 2 * 2 * 2 * 64 * 16 * 4);
    assert_eq!(block(KvCacheDtype::Fp16), 2 * 2 * 2 * 64 * 16 * 2);
    assert_eq!(block(KvCacheDtype::Bf16), 2 * 2 * 2 * 64 * 16 * 2);
    assert_eq!(block(KvCacheDtype::Q8), 2 * 2 * 2 * (64 + 4) * 16);
    let runner = load(folder.path(), 1, None, KvCacheDtype::Q8);
    let per_token = KvCacheDtype::Q8.bytes_per_token(runner.config());
    assert_eq!(per_token * 16, runner.kv_bytes_per_block());
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn batch_chunks_blocks_and_threads_change_no_bit_in_any_precision() {
    let folder = synthetic();
    let tokens = prompt(50);
    let others = [prompt(90)[50..].to_vec(), prompt(70)[3..40].to_vec()];
    let weights = Precision::ALL.map(|precision| (Some(precision), KvCacheDtype::Q8));
    let caches = KvCacheDtype::ALL.map(|dtype| (None, dtype));
    for (precision, dtype) in weights.into_iter().chain(caches) {
        let what = format!("{precision:?}, {dtype}");
        let mut runner = load(folder.path(), 1, precision, dtype);
        let alone = bits(&logits(&mut runner, &tokens)[tokens.len() - 1]);
        for threads in [1, 2] {
            let mut runner = load(folder.path(), threads, precision, dtype);
            for chunk in [256, 16, 7] {
                let mut sequence = Sequence::contiguous(tokens.clone(), 3, 64);
                sequence.blocks = [9, 2, 30, 4].map(BlockId).to_vec();
                let last = run(&mut runner, &mut sequence, chunk).pop().unwrap();
                assert!(bits(&last) == alone, "{what}: {threads} threads, chunks of {chunk}");
            }
            let mut sequence = Sequence::contiguous(tokens.clone(), 0, 64);
            let mut others: Vec<_> = (0..)
                .zip(&others)
                .map(|(i, tokens)| Sequence::contiguous(tokens.clone(), 10 + 8 * i, 64))
                .collect();
            let [first, second] = &mut others[..] else { unreachable!("two others") };
            let together = step(&mut runner, &mut [first, &mut sequence, second], 256);
            assert!(bits(&together[1]) == alone, "{what}: {threads} threads, in a batch");
        }
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

#[test]
fn greedy_tokens_of_16_bits_are_those_of_fp32_where_the_choice_is_clear() {
    let (mut num_clear, mut num_tokens) = (0, 0);
    for name in ["llama-gqa", "llama-tied", "llama-bias", "llama-odd"] {
        let mut exact = load(&fixture(name), 1, None, KvCacheDtype::Fp32);
        let vocab_size = exact.config().vocab_size;
        let tokens: Vec<_> = prompt(80).iter().map(|token| token % vocab_size as u32).collect();
        let exact = logits(&mut exact, &tokens);
        for (precision, dtype) in
            [(Precision::Fp16, KvCacheDtype::Fp16), (Precision::Bf16, KvCacheDtype::Bf16)]
        {
            let mut runner = load(&fixture(name), 1, Some(precision), dtype);
            for (logits, exact) in logits(&mut runner, &tokens).iter().zip(&exact) {
                let best = argmax(exact) as usize;
                let rest = exact.iter().enumerate().filter(|(token, _)| *token != best);
                let second = rest.fold(f32::NEG_INFINITY, |max, (_, x)| max.max(*x));
                let largest = exact.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                num_tokens += 1;
                if exact[best] - second > 0.04 * largest {
                    num_clear += 1;
                    assert_eq!(argmax(logits) as usize, best, "{name} in {precision}");
                }
            }
        }
    }
    assert!(num_clear * 3 > num_tokens, "only {num_clear} of {num_tokens} are clear");
}

#[test]
fn what_is_stored_in_16_bits_is_kept_and_widened_without_a_difference() {
    for (name, precision) in [("llama-bf16", Precision::Bf16), ("llama-f16", Precision::Fp16)] {
        let runner = |precision| load(&fixture(name), 1, precision, KvCacheDtype::Fp32);
        let tokens: Vec<_> = prompt(20).iter().map(|token| token % 300).collect();
        let stored = logits(&mut runner(None), &tokens);
        let answer = |precision| {
            let mut sequence = Sequence::contiguous(tokens.clone(), 0, 64);
            generate(&mut runner(precision), &mut [&mut sequence], 16)
        };
        assert!(logits(&mut runner(Some(precision)), &tokens) == stored, "{name} in {precision}");
        assert_eq!(answer(Some(precision)), answer(None), "{name} in {precision}");
        // A matrix unit takes activations to 2^-17.
        let widened = logits(&mut runner(Some(Precision::Fp32)), &tokens);
        if InstructionSet::detect().has_matrix_unit() && precision == Precision::Bf16 {
            let error = relative_error(&stored.concat(), &widened.concat());
            assert!(error < 1e-4, "{name} in fp32: {error}");
        } else {
            assert!(widened == stored, "{name} in fp32");
            assert_eq!(answer(Some(Precision::Fp32)), answer(None), "{name} in fp32");
        }
        assert_eq!(runner(None).weight_bytes(), runner(Some(precision)).weight_bytes());
        // But for the norms, two a layer and the last, which are in fp32 anyhow.
        let norms = (2 * 2 + 1) * 64 * size_of::<f32>();
        let matrices = |precision| runner(precision).weight_bytes() - norms as u64;
        assert_eq!(2 * matrices(None), matrices(Some(Precision::Fp32)));
        // Half precision has more digits than bfloat16, which has none that half precision lacks.
        let is_rounded = logits(&mut runner(Some(Precision::Bf16)), &tokens) != stored;
        assert_eq!(is_rounded, precision == Precision::Fp16, "{name} in bf16");
    }
}

#[test]
fn a_weight_beyond_the_precision_is_an_error_that_names_it() {
    let folder = synthetic();
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header_len..][..4].copy_from_slice(&1e6f32.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let loaded = |precision| {
        let options = RunnerOptions { precision, ..RunnerOptions::default() };
        Runner::load(folder.path(), &options).map(drop).map_err(|error| error.to_string())
    };
    for precision in [Precision::Fp16, Precision::Q8_0, Precision::Q4K] {
        let error = loaded(Some(precision)).unwrap_err();
        assert!(error.contains("lm_head.weight has the number 1000000"), "{error}");
    }
    assert_eq!(loaded(Some(Precision::Bf16)), Ok(()));
    assert_eq!(loaded(None), Ok(()));
}

/// Answers of an engine: with others, with what is cached, with few blocks so that sequences are preempted.
#[test]
fn answers_depend_on_nothing_else_under_any_kv_cache_dtype() {
    let prompt = |id: u64| (0..20 + 3 * id).map(move |i| (i % 40 + id * (i / 36)) as TokenId + 5);
    let requests: Vec<_> = (0..6)
        .map(|id| Request {
            id,
            prompt: prompt(id).collect(),
            sampling: SamplingParams {
                max_new_tokens: 24,
                temperature: 0.0,
                ignore_eos: true,
                ..SamplingParams::default()
            },
        })
        .collect();
    for kv_cache_dtype in KvCacheDtype::ALL {
        let config = EngineConfig {
            model_path: fixture("llama-gqa"),
            threads: 1,
            precision: Some(Precision::Q8_0),
            kv_cache_dtype: Some(kv_cache_dtype),
            ..EngineConfig::default()
        };
        let answers = |config: &EngineConfig, requests: &[Request]| {
            let mut engine = Engine::load(config).unwrap();
            let mut answers = BTreeMap::new();
            for request in requests {
                engine.add(request.clone()).unwrap();
            }
            while engine.has_unfinished() {
                for output in engine.step().unwrap() {
                    let StepOutput::Finished(done) = output else { panic!("{output:?}") };
                    answers.insert(done.id, done.token_ids);
                }
            }
            (answers, engine.stats())
        };
        let alone: BTreeMap<_, _> = requests
            .iter()
            .flat_map(|request| answers(&config, std::slice::from_ref(request)).0)
            .collect();
        let (together, stats) = answers(&config, &requests);
        assert_eq!(together, alone, "{kv_cache_dtype}");
        assert!(stats.generation_tokens == 6 * 24, "{stats:?}");
        let options =
            RunnerOptions { kv_cache_dtype: Some(kv_cache_dtype), ..RunnerOptions::default() };
        let runner = Runner::load(&config.model_path, &options).unwrap();
        let few = EngineConfig {
            kv_cache_memory_bytes: Some(9 * runner.kv_bytes_per_block() as u64),
            max_num_batched_tokens: 19,
            ..config
        };
        let (preempted, stats) = answers(&few, &requests);
        assert_eq!(preempted, alone, "{kv_cache_dtype} with few blocks");
        assert!(stats.num_preemptions > 0, "{kv_cache_dtype}");
        assert_eq!(stats.kv_blocks_total, 9, "{kv_cache_dtype}");
    }
}

/// What docs/precision.md says of the shipped model: run it with `--nocapture`.
#[test]
fn the_shipped_model_is_near_to_itself_in_every_precision() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flotilla-reader");
    let corpus = std::fs::read_dir(path.join("heldout/corpus")).unwrap();
    let mut packages: Vec<_> = corpus.map(|entry| entry.unwrap().path()).collect();
    packages.sort();
    let text = std::fs::read_to_string(packages[0].join("1.0.0.jsonl")).unwrap();
    let tokens = Tokenizer::load(&path).unwrap().encode(&text, false).unwrap();
    let tokens = &tokens[..300];
    let logits_in = |precision, dtype| {
        let options =
            RunnerOptions { precision, kv_cache_dtype: Some(dtype), ..RunnerOptions::default() };
        let mut runner = Runner::load(&path, &options).unwrap();
        runner.allocate_kv_cache(20).unwrap();
        let bytes = runner.weight_bytes();
        let mut sequence = Sequence::contiguous(tokens.to_vec(), 0, 300);
        (run(&mut runner, &mut sequence, 1), bytes)
    };
    let (exact, _) = logits_in(None, KvCacheDtype::Fp32);
    // What is stored is bfloat16, whose products are a matrix unit's where there is one.
    let vector_bound = if InstructionSet::detect().has_matrix_unit() { 1e-4 } else { 1e-9 };
    let bounds = [vector_bound, 1e-4, 1e-9, 0.06, 0.1, 0.2, 0.6];
    let weights = Precision::ALL.into_iter().zip(bounds);
    let weights = weights.map(|(precision, bound)| (Some(precision), KvCacheDtype::Fp32, bound));
    let caches = KvCacheDtype::ALL.into_iter().zip([1e-9, 1e-2, 0.06, 0.1]);
    let caches = caches.map(|(dtype, bound)| (None, dtype, bound));
    for (precision, dtype, bound) in weights.chain(caches) {
        let (logits, bytes) = logits_in(precision, dtype);
        let error = relative_error(&logits.concat(), &exact.concat());
        let same = logits.iter().zip(&exact).filter(|(a, b)| argmax(a) == argmax(b)).count();
        let share = same as f64 / exact.len() as f64;
        let what = precision.map_or("as stored", Precision::name);
        eprintln!("{what}, KV cache {dtype}: {bytes} bytes, error {error:.1e}, {share:.3} alike");
        assert!(error < bound && share > 0.75, "{what}, KV cache {dtype}: {error}, {share}");
    }
}
