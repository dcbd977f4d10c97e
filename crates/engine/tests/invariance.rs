//! Batch invariance: the tokens of a sequence, and the probabilities that they were chosen by, do not depend
//! on what else is in the step, to the last bit. Every way in which the engine puts a step together is tried on
//! 200 prompts, each of which it has answered alone before.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;

use flotilla_engine::{
    Engine, EngineConfig, KvCacheDtype, Precision, Request, Runner, RunnerOptions, SamplingParams,
    StepOutput, TokenId, TokenLogprobs,
};

/// The shipped model: its matrices have the formats and the widths that the fast kernels are made for.
const MODEL: &str = "../../models/flotilla-reader";
const VOCAB_SIZE: u64 = 4096;
const NUM_PROMPTS: u64 = 200;

/// Numbers that look random and are the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
        (self.0 >> 33) % end
    }
}

/// Prompts of 1 to 48 tokens, a third of which begin with the same 33.
fn requests(num_prompts: u64) -> Vec<Request> {
    let mut random = Random(5);
    let mut tokens = |len| -> Vec<TokenId> {
        (0..len).map(|_| 3 + random.below(VOCAB_SIZE - 3) as TokenId).collect()
    };
    let shared = tokens(33);
    let mut lengths = Random(6);
    (0..num_prompts)
        .map(|id| {
            let prompt = if id % 3 == 0 {
                [shared.clone(), tokens(1 + lengths.below(15))].concat()
            } else {
                tokens(1 + lengths.below(48))
            };
            let sampling = SamplingParams {
                // A few go on for long: the cache gets full under them.
                max_new_tokens: if id % 10 == 5 { 60 } else { 2 + id as usize % 3 },
                ignore_eos: true,
                logprobs: Some(2),
                ..SamplingParams::default()
            };
            Request { id, prompt, sampling }
        })
        .collect()
}

/// How steps are put together.
#[derive(Clone, Copy, Debug)]
struct Setting {
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    /// Blocks of the KV cache; more than are needed if not given.
    num_blocks: Option<u64>,
    prefix_caching: bool,
    /// Whether requests come while others run.
    trickle: bool,
}

const PLAIN: Setting = Setting {
    max_num_seqs: 1,
    max_num_batched_tokens: 512,
    num_blocks: None,
    prefix_caching: false,
    trickle: false,
};

fn settings() -> [Setting; 8] {
    let batch = |max_num_seqs| Setting { max_num_seqs, ..PLAIN };
    [
        batch(2),
        batch(7),
        batch(64),
        Setting { trickle: true, ..batch(24) },
        // Steps that hold a part of a prompt and a few tokens of others.
        Setting { max_num_batched_tokens: 19, trickle: true, ..batch(16) },
        Setting { prefix_caching: true, ..batch(32) },
        Setting { prefix_caching: true, num_blocks: Some(14), trickle: true, ..batch(33) },
        Setting { max_num_batched_tokens: 40, num_blocks: Some(9), ..batch(8) },
    ]
}

/// Tokens and the log-probabilities of each.
type Answers = BTreeMap<u64, (Vec<TokenId>, Vec<TokenLogprobs>)>;

/// How the weights and the cache are kept.
type Kept = (Option<Precision>, KvCacheDtype);

fn engine(setting: Setting, (precision, kv_cache_dtype): Kept, block_bytes: u64) -> Engine {
    Engine::load(&EngineConfig {
        model_path: Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL),
        max_num_seqs: setting.max_num_seqs,
        max_num_batched_tokens: setting.max_num_batched_tokens,
        kv_cache_memory_bytes: Some(setting.num_blocks.unwrap_or(1000) * block_bytes),
        enable_prefix_caching: setting.prefix_caching,
        threads: 2,
        precision,
        kv_cache_dtype: Some(kv_cache_dtype),
        ..EngineConfig::default()
    })
    .unwrap()
}

fn step(engine: &mut Engine, answers: &mut Answers) {
    for output in engine.step().unwrap() {
        match output {
            StepOutput::Finished(done) => {
                answers.insert(done.id, (done.token_ids, done.logprobs.unwrap()));
            }
            StepOutput::Failed { id, reason } => panic!("{id} failed: {reason}"),
        }
    }
}

/// Each request when there is no other.
fn alone(engine: &mut Engine, requests: &[Request]) -> Answers {
    let mut answers = Answers::new();
    for request in requests {
        engine.add(request.clone()).unwrap();
        while engine.has_unfinished() {
            step(engine, &mut answers);
        }
    }
    answers
}

/// All of them, in random order.
fn together(
    engine: &mut Engine,
    requests: &[Request],
    setting: Setting,
    random: &mut Random,
) -> Answers {
    let mut answers = Answers::new();
    let mut left = requests.to_vec();
    while !left.is_empty() || engine.has_unfinished() {
        let arriving = if setting.trickle { random.below(6) } else { u64::MAX };
        for _ in 0..arriving.min(left.len() as u64) {
            let index = random.below(left.len() as u64) as usize;
            engine.add(left.swap_remove(index)).unwrap();
        }
        step(engine, &mut answers);
    }
    answers
}

/// Checks that so many prompts are answered in every setting as they are alone.
fn check(num_prompts: u64, settings: &[Setting], kept: Kept) {
    let options = RunnerOptions { kv_cache_dtype: Some(kept.1), ..RunnerOptions::default() };
    let model_path = Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL);
    let block_bytes = Runner::load(&model_path, &options).unwrap().kv_bytes_per_block() as u64;
    let requests = requests(num_prompts);
    let expected = alone(&mut engine(PLAIN, kept, block_bytes), &requests);
    assert_eq!(expected.len() as u64, num_prompts);
    for (seed, setting) in settings.iter().enumerate() {
        let mut engine = engine(*setting, kept, block_bytes);
        let answers = together(&mut engine, &requests, *setting, &mut Random(seed as u64));
        for (id, expected) in &expected {
            assert_eq!(&answers[id], expected, "request {id} with {kept:?} in {setting:?}");
        }
        let stats = engine.stats();
        assert_eq!(stats.cached_prompt_tokens > 0, setting.prefix_caching, "{setting:?}");
        if num_prompts == NUM_PROMPTS {
            assert_eq!(stats.num_preemptions > 0, setting.num_blocks.is_some(), "{setting:?}");
        }
    }
}

#[test]
fn two_hundred_prompts_are_answered_in_any_company_as_alone() {
    check(NUM_PROMPTS, &settings(), (None, KvCacheDtype::Fp32));
}

#[test]
fn so_they_are_in_other_precisions() {
    let all = settings();
    for precision in [Precision::Fp32, Precision::Q8_0, Precision::Int8, Precision::Q4K] {
        check(40, &[all[2], all[4]], (Some(precision), KvCacheDtype::Fp32));
    }
}

#[test]
fn so_they_are_with_other_caches() {
    let all = settings();
    for kv_cache_dtype in [KvCacheDtype::Fp16, KvCacheDtype::Bf16, KvCacheDtype::Q8] {
        check(40, &[all[3], all[6]], (Some(Precision::Bf16), kv_cache_dtype));
    }
}
