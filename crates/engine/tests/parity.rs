//! The runner against transformers, and against itself: whatever else is in the step, however a prompt is
//! cut, wherever its blocks lie, the logits are the same.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/driver.rs"]
mod driver;
#[path = "common/synthetic.rs"]
mod synthetic;

use std::path::{Path, PathBuf};

use driver::{Sequence, generate, run, step};
use flotilla_engine::step::{BLOCK_SIZE, BlockId, SequenceInput, StepInput, TokenId};
use flotilla_engine::{Architecture, Runner, RunnerOptions};
use synthetic::{Random, Shape};

const NUM_BLOCKS: usize = 128;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn load(path: &Path, threads: usize) -> Runner {
    let options =
        RunnerOptions { threads, max_num_batched_tokens: 1024, ..RunnerOptions::default() };
    let mut runner = Runner::load(path, &options).unwrap();
    runner.allocate_kv_cache(NUM_BLOCKS).unwrap();
    runner
}

/// Large enough that several threads share its work.
const SHAPE: Shape = Shape {
    architecture: Architecture::Llama,
    hidden_size: 160,
    intermediate_size: 336,
    num_hidden_layers: 3,
    num_attention_heads: 8,
    num_key_value_heads: 2,
    vocab_size: 1021,
    max_position_embeddings: 512,
    bf16: false,
};

struct Synthetic {
    folder: tempfile::TempDir,
    random: Random,
}

impl Synthetic {
    fn new(shape: Shape) -> Self {
        let folder = tempfile::tempdir().unwrap();
        shape.write(folder.path(), 1);
        Self { folder, random: Random(2) }
    }

    fn runner(&self, threads: usize) -> Runner {
        load(self.folder.path(), threads)
    }

    fn prompt(&mut self, len: usize) -> Vec<TokenId> {
        (0..len).map(|_| self.random.below(SHAPE.vocab_size) as TokenId).collect()
    }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

#[track_caller]
fn assert_same_bits(left: &[f32], right: &[f32], what: &str) {
    assert!(bits(left) == bits(right), "{what}: the logits differ");
}

#[derive(serde::Deserialize)]
struct Expected {
    prompts: Vec<ExpectedPrompt>,
}

#[derive(Clone, serde::Deserialize)]
struct ExpectedPrompt {
    prompt: Vec<TokenId>,
    last_logits: Vec<f32>,
    middle_position: usize,
    middle_logits: Vec<f32>,
    greedy: Vec<TokenId>,
}

#[track_caller]
fn assert_close(logits: &[f32], expected: &[f32], what: &str) {
    let scale = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    assert_eq!(logits.len(), expected.len(), "{what}");
    for (i, (x, want)) in logits.iter().zip(expected).enumerate() {
        assert!((x - want).abs() <= 1e-4 * scale, "{what}: logit {i} is {x}, expected {want}");
    }
}

/// Every checkpoint with what transformers makes of it: all architectures, both dialects, all variants, and
/// those of a folder that is named by `FLOTILLA_MORE_FIXTURES` (scripts/fuzz_fixtures.py).
fn for_each_checkpoint(mut check: impl FnMut(&str, &mut Runner, &Expected)) {
    let more = std::env::var_os("FLOTILLA_MORE_FIXTURES").map(PathBuf::from);
    let folders = more.into_iter().chain([fixtures()]);
    let mut num_checkpoints = 0;
    for path in folders.flat_map(|folder| std::fs::read_dir(folder).unwrap()) {
        let path = path.unwrap().path();
        let Ok(text) = std::fs::read_to_string(path.join("expected.json")) else {
            continue;
        };
        let expected: Expected = serde_json::from_str(&text).unwrap();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        check(&name, &mut load(&path, 2), &expected);
        num_checkpoints += 1;
    }
    assert!(num_checkpoints > 30, "only {num_checkpoints} in {}", fixtures().display());
}

/// The greedy answers of transformers to prompts, computed in one batch.
fn assert_greedy(
    runner: &mut Runner,
    mut sequences: Vec<Sequence>,
    expected: &Expected,
    what: &str,
) {
    let num_tokens = expected.prompts[0].greedy.len();
    let mut batch: Vec<_> = sequences.iter_mut().collect();
    let generated = generate(runner, &mut batch, num_tokens);
    for (index, (tokens, want)) in generated.iter().zip(&expected.prompts).enumerate() {
        assert_eq!(tokens, &want.greedy, "{what}, prompt {index}");
    }
}

#[test]
fn logits_are_those_of_transformers() {
    for_each_checkpoint(|name, runner, expected| {
        for (index, want) in expected.prompts.iter().enumerate() {
            let name = format!("{name} prompt {index}");
            let mut sequence = Sequence::contiguous(want.prompt.clone(), 0, 256).of(runner);
            let middle = step(runner, &mut [&mut sequence], want.middle_position + 1);
            assert_close(&middle[0], &want.middle_logits, &name);
            sequence.num_computed = 0;
            let last = run(runner, &mut sequence, 1024);
            assert_close(&last[0], &want.last_logits, &name);
        }
    });
}

#[test]
fn greedy_tokens_are_those_of_transformers_alone_and_in_a_batch() {
    for_each_checkpoint(|name, runner, expected| {
        for want in &expected.prompts {
            let alone = Expected { prompts: vec![want.clone()] };
            let sequence = Sequence::contiguous(want.prompt.clone(), 0, 256).of(runner);
            assert_greedy(runner, vec![sequence], &alone, name);
        }
        let batch = expected.prompts.iter().enumerate().map(|(index, want)| {
            Sequence::contiguous(want.prompt.clone(), 16 * index as u32, 256).of(runner)
        });
        let batch = batch.collect();
        assert_greedy(runner, batch, expected, &format!("{name} in a batch"));
    });
}

#[test]
fn every_architecture_computes_the_same_bits_however_a_prompt_is_cut_and_placed() {
    for_each_checkpoint(|name, runner, expected| {
        let longest = expected.prompts.iter().max_by_key(|want| want.prompt.len()).unwrap();
        let tokens = [&longest.prompt[..], &longest.greedy[..]].concat();
        let sequence = |first| Sequence::contiguous(tokens.clone(), first, tokens.len()).of(runner);
        let (mut whole, mut scattered) = (sequence(0), sequence(20));
        let mut pieces: Vec<_> = [1, 7, 16, 33].map(|chunk| (chunk, sequence(40))).into();
        let mut shared = sequence(60);
        let whole_logits = run(runner, &mut whole, 1024).remove(0);
        for (chunk, sequence) in &mut pieces {
            let last = run(runner, sequence, *chunk).pop().unwrap();
            assert_same_bits(&last, &whole_logits, &format!("{name} in chunks of {chunk}"));
        }
        scattered.blocks.reverse();
        let logits = run(runner, &mut scattered, 1024).remove(0);
        assert_same_bits(&logits, &whole_logits, &format!("{name} scattered"));
        // The first three blocks were computed by another sequence.
        shared.blocks[..3].copy_from_slice(&whole.blocks[..3]);
        shared.num_computed = 3 * BLOCK_SIZE;
        let logits = run(runner, &mut shared, 1024).remove(0);
        assert_same_bits(&logits, &whole_logits, &format!("{name} with a cached prefix"));
    });
}

#[test]
fn batch_gives_each_sequence_what_it_gets_alone() {
    let mut model = Synthetic::new(SHAPE);
    let mut runner = model.runner(2);
    let prompts: Vec<_> =
        [1, 5, 16, 17, 64, 100, 33, 2].into_iter().map(|len| model.prompt(len)).collect();
    let alone: Vec<_> = prompts
        .iter()
        .map(|prompt| {
            let mut sequence = Sequence::contiguous(prompt.clone(), 3, 128);
            let tokens = generate(&mut runner, &mut [&mut sequence], 10).remove(0);
            sequence.num_computed = 0;
            (run(&mut runner, &mut sequence, 1024).remove(0), tokens)
        })
        .collect();
    let mut sequences: Vec<_> = prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| Sequence::contiguous(prompt.clone(), 8 * i as u32, 128))
        .collect();
    let mut together: Vec<_> = sequences.iter_mut().collect();
    let tokens = generate(&mut runner, &mut together, 10);
    for sequence in &mut together {
        sequence.num_computed = 0;
    }
    let logits = step(&mut runner, &mut together, 1024);
    for (i, (alone_logits, alone_tokens)) in alone.iter().enumerate() {
        assert_eq!(&tokens[i], alone_tokens, "sequence {i}");
        assert_same_bits(&logits[i], alone_logits, &format!("sequence {i}"));
    }
}

#[test]
fn chunked_prefill_is_the_whole_prefill() {
    for bf16 in [false, true] {
        let mut model = Synthetic::new(Shape { bf16, ..SHAPE });
        let mut runner = model.runner(2);
        let prompt = model.prompt(150);
        let whole = run(&mut runner, &mut Sequence::contiguous(prompt.clone(), 0, 160), 1024);
        for chunk in [1, 7, 16, 33] {
            let mut sequence = Sequence::contiguous(prompt.clone(), 20, 160);
            let last = run(&mut runner, &mut sequence, chunk).pop().unwrap();
            assert_same_bits(&last, &whole[0], &format!("chunks of {chunk}"));
        }
    }
}

#[test]
fn blocks_may_lie_anywhere() {
    let mut model = Synthetic::new(SHAPE);
    let mut runner = model.runner(1);
    let prompt = model.prompt(200);
    let contiguous = run(&mut runner, &mut Sequence::contiguous(prompt.clone(), 0, 208), 1024);
    for round in 0..4 {
        let mut blocks: Vec<_> = (0..NUM_BLOCKS as u32).map(BlockId).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, model.random.below(i + 1));
        }
        blocks.truncate(13);
        let mut sequence =
            Sequence { tokens: prompt.clone(), num_computed: 0, blocks, long_beyond: None };
        let paged = run(&mut runner, &mut sequence, 1024);
        assert_same_bits(&paged[0], &contiguous[0], &format!("round {round}"));
    }
}

#[test]
fn cached_prefix_is_as_good_as_computed() {
    let mut model = Synthetic::new(SHAPE);
    let mut runner = model.runner(2);
    let prefix = model.prompt(48);
    let mut first = Sequence::contiguous([prefix.clone(), model.prompt(9)].concat(), 0, 64);
    run(&mut runner, &mut first, 1024);
    let tokens = [prefix, model.prompt(30)].concat();
    let whole = run(&mut runner, &mut Sequence::contiguous(tokens.clone(), 50, 80), 1024);
    let blocks = [&first.blocks[..3], &[BlockId(90), BlockId(70)]].concat();
    let mut shared = Sequence { tokens, num_computed: 48, blocks, long_beyond: None };
    let cached = run(&mut runner, &mut shared, 1024);
    assert_same_bits(&cached[0], &whole[0], "shared prefix");
}

#[test]
fn number_of_threads_changes_no_bit() {
    for architecture in [Architecture::Llama, Architecture::Gemma2] {
        let mut model = Synthetic::new(Shape { architecture, ..SHAPE });
        let prompts = [model.prompt(480), model.prompt(470)];
        let logits = [1, 2, 3].map(|threads| {
            let mut runner = model.runner(threads);
            let [mut first, mut second] =
                [0, 1].map(|i| Sequence::contiguous(prompts[i].clone(), 30 * i as u32, 480));
            step(&mut runner, &mut [&mut first, &mut second], 1024).concat()
        });
        assert_same_bits(&logits[0], &logits[1], "two threads");
        assert_same_bits(&logits[0], &logits[2], "three threads");
    }
}

#[test]
fn what_cannot_be_computed_is_refused_and_harms_nothing() {
    let mut model = Synthetic::new(SHAPE);
    let mut runner = model.runner(1);
    let prompt = model.prompt(20);
    let before = run(&mut runner, &mut Sequence::contiguous(prompt.clone(), 0, 32), 1024);
    let sequence = SequenceInput {
        num_scheduled_tokens: 20,
        num_computed_tokens: 0,
        block_table: vec![BlockId(0), BlockId(1)],
        is_long: false,
        wants_logits: true,
    };
    let with = |change: &dyn Fn(&mut SequenceInput)| {
        let mut sequence = sequence.clone();
        change(&mut sequence);
        StepInput { token_ids: prompt.clone(), sequences: vec![sequence] }
    };
    let mut foreign_token = with(&|_| ());
    foreign_token.token_ids[3] = SHAPE.vocab_size as TokenId;
    let cases = [
        (foreign_token, "vocabulary"),
        (with(&|sequence| sequence.num_scheduled_tokens = 19), "its sequences 19"),
        (with(&|sequence| sequence.num_scheduled_tokens = 0), "no tokens"),
        (with(&|sequence| sequence.num_computed_tokens = 13), "2 blocks for 33 tokens"),
        (with(&|sequence| sequence.num_computed_tokens = 500), "reaches 520 tokens"),
        (with(&|sequence| sequence.num_computed_tokens = usize::MAX), "reaches"),
        (with(&|sequence| sequence.block_table[1] = BlockId(4000)), "block 4000"),
    ];
    for (input, want) in cases {
        let error = runner.forward(&input).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let after = run(&mut runner, &mut Sequence::contiguous(prompt, 0, 32), 1024);
    assert_same_bits(&before[0], &after[0], "after refusals");
}

#[test]
fn damaged_checkpoints_are_named() {
    let model = Synthetic::new(SHAPE);
    let weights = model.folder.path().join("model.safetensors");
    let config = model.folder.path().join("config.json");
    let (bytes, text) =
        (std::fs::read(&weights).unwrap(), std::fs::read_to_string(&config).unwrap());
    let options =
        RunnerOptions { threads: 1, max_num_batched_tokens: 16, ..RunnerOptions::default() };
    let error = || Runner::load(model.folder.path(), &options).unwrap_err().to_string();
    for len in [0, 3, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&weights, &bytes[..len]).unwrap();
        assert!(error().contains("model.safetensors"), "{len} bytes: {}", error());
    }
    let mut garbled = bytes.clone();
    garbled[..16].fill(0xff);
    std::fs::write(&weights, &garbled).unwrap();
    assert!(error().contains("damaged"), "{}", error());
    std::fs::write(&weights, &bytes).unwrap();
    for (from, to, want) in [
        ("\"num_hidden_layers\":3", "\"num_hidden_layers\":4", "model.layers.3."),
        ("\"vocab_size\":1021", "\"vocab_size\":1024", "expected [1024, 160]"),
        ("\"rms_norm_eps\"", "\"attention_bias\":true,\"rms_norm_eps\"", "q_proj.bias"),
        ("Llama", "Mamba", "MambaForCausalLM"),
    ] {
        assert!(text.contains(from), "{text}");
        std::fs::write(&config, text.replace(from, to)).unwrap();
        assert!(error().contains(want), "{}", error());
    }
    std::fs::remove_file(&weights).unwrap();
    std::fs::write(&config, &text).unwrap();
    assert!(error().contains("neither"), "{}", error());
}
