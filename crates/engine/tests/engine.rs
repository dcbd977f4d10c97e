//! The whole engine on small models: an answer depends on nothing but its request.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flotilla_engine::{
    Engine, EngineConfig, Error, FinishReason, Finished, Request, Runner, RunnerOptions,
    SamplingParams, StepOutput, TokenId,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn config() -> EngineConfig {
    EngineConfig { model_path: fixture("llama-gqa"), threads: 2, ..EngineConfig::default() }
}

/// A cache of so many blocks.
fn with_blocks(num_blocks: u64, config: EngineConfig) -> EngineConfig {
    let options = RunnerOptions { threads: 1, max_num_batched_tokens: 1 };
    let runner = Runner::load(&config.model_path, &options).unwrap();
    EngineConfig {
        kv_cache_memory_bytes: Some(num_blocks * runner.kv_bytes_per_block() as u64),
        ..config
    }
}

/// Greedy for even ids, sampled for odd ones.
fn sampling(id: u64) -> SamplingParams {
    SamplingParams {
        max_new_tokens: 20 + id as usize,
        temperature: if id.is_multiple_of(2) { 0.0 } else { 0.9 },
        top_p: if id.is_multiple_of(3) { 0.9 } else { 1.0 },
        top_k: if id.is_multiple_of(5) { 50 } else { 0 },
        seed: id,
        ignore_eos: true,
        ..SamplingParams::default()
    }
}

/// Prompts of all kinds of lengths; every third begins like the others of its kind.
fn requests() -> Vec<Request> {
    let prompt = |id: u64| -> Vec<TokenId> {
        let length = [3, 16, 17, 40, 64, 75, 1, 33][id as usize % 8];
        let shared = if id.is_multiple_of(3) { 40 } else { 0 };
        let own = (0..length).map(|index| 10 + ((id * 37 + index * 11) % 300) as TokenId);
        (0..shared).map(|index| 20 + index % 7 * 13).chain(own).collect()
    };
    (0..12).map(|id| Request { id, prompt: prompt(id), sampling: sampling(id) }).collect()
}

type Answers = BTreeMap<u64, Finished>;

fn finish(engine: &mut Engine) -> Answers {
    let mut answers = Answers::new();
    while engine.has_unfinished() {
        for output in engine.step().unwrap() {
            collect(output, &mut answers);
        }
    }
    let stats = engine.stats();
    assert_eq!((stats.kv_blocks_used, stats.num_running, stats.num_waiting), (0, 0, 0));
    answers
}

fn collect(output: StepOutput, answers: &mut Answers) {
    match output {
        StepOutput::Finished(finished) => drop(answers.insert(finished.id, finished)),
        StepOutput::Failed { id, reason } => panic!("{id} failed: {reason}"),
    }
}

fn run(config: &EngineConfig, requests: &[Request]) -> (Answers, Engine) {
    let mut engine = Engine::load(config).unwrap();
    for request in requests {
        engine.add(request.clone()).unwrap();
    }
    let answers = finish(&mut engine);
    (answers, engine)
}

/// What each request gets in an engine for itself.
fn alone() -> Answers {
    let alone = |request: Request| run(&config(), &[request]).0;
    requests().into_iter().flat_map(alone).collect()
}

/// Everything but what prefix caching spared.
#[track_caller]
fn assert_same(answers: &Answers, expected: &Answers) {
    assert_eq!(answers.len(), expected.len());
    for (id, answer) in answers {
        let cached_tokens = expected[id].cached_tokens;
        let timing = expected[id].timing;
        assert_eq!(Finished { cached_tokens, timing, ..answer.clone() }, expected[id]);
    }
}

#[test]
fn a_batch_gives_what_each_gets_alone() {
    let (answers, engine) = run(&config(), &requests());
    assert_same(&answers, &alone());
    let stats = engine.stats();
    let prompt_tokens: usize = requests().iter().map(|request| request.prompt.len()).sum();
    assert_eq!(stats.prompt_tokens, prompt_tokens as u64);
    assert_eq!(stats.generation_tokens, (0..12).map(|id| 20 + id).sum::<u64>());
    assert!(stats.cached_prompt_tokens > 0);
}

#[test]
fn arrival_in_any_order_and_at_any_time_changes_nothing() {
    let expected = alone();
    for seed in 0..4_u64 {
        let mut engine = Engine::load(&config()).unwrap();
        let mut waiting = requests();
        let mut answers = Answers::new();
        let mut turn = seed;
        while !waiting.is_empty() || engine.has_unfinished() {
            turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            if !waiting.is_empty() && (turn >> 33).is_multiple_of(3) {
                let index = (turn >> 40) as usize % waiting.len();
                engine.add(waiting.swap_remove(index)).unwrap();
            }
            for output in engine.step().unwrap() {
                collect(output, &mut answers);
            }
        }
        assert_same(&answers, &expected);
    }
}

#[test]
fn prefix_caching_changes_nothing_but_the_work() {
    let off = EngineConfig { enable_prefix_caching: false, ..config() };
    let (expected, engine) = run(&off, &requests());
    assert_eq!(engine.stats().cached_prompt_tokens, 0);
    let (answers, mut engine) = run(&config(), &requests());
    assert_same(&answers, &expected);
    // A second time, with everything in the cache.
    for request in requests() {
        engine.add(request).unwrap();
    }
    let again = finish(&mut engine);
    assert_same(&again, &expected);
    assert!(again.values().all(|answer| answer.prompt_tokens <= 16 || answer.cached_tokens > 0));
}

#[test]
fn preempted_sequences_resume_with_the_same_tokens() {
    for num_blocks in [9, 12, 20] {
        let (answers, engine) = run(&with_blocks(num_blocks, config()), &requests());
        assert_same(&answers, &alone());
        assert!(num_blocks == 20 || engine.stats().num_preemptions > 0, "{num_blocks} blocks");
    }
}

#[test]
fn chunked_prompts_give_what_whole_ones_give() {
    let expected = alone();
    for max_num_batched_tokens in [1, 16, 23] {
        let chunked = EngineConfig { max_num_batched_tokens, ..config() };
        assert_same(&run(&chunked, &requests()).0, &expected);
        let few = EngineConfig { max_num_seqs: 3, ..chunked };
        assert_same(&run(&few, &requests()).0, &expected);
    }
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    for name in ["llama-gqa", "llama-tied", "llama-rope-llama3", "llama-bf16"] {
        let text = std::fs::read_to_string(fixture(name).join("expected.json")).unwrap();
        let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut engine =
            Engine::load(&EngineConfig { model_path: fixture(name), ..config() }).unwrap();
        let prompts = expected["prompts"].as_array().unwrap();
        let ids = |value: &serde_json::Value| -> Vec<TokenId> {
            let ids = value.as_array().unwrap().iter();
            ids.map(|id| id.as_u64().unwrap() as TokenId).collect()
        };
        for (id, prompt) in prompts.iter().enumerate() {
            let max_new_tokens = prompt["greedy"].as_array().unwrap().len();
            let sampling =
                SamplingParams { max_new_tokens, ignore_eos: true, ..Default::default() };
            let request = Request { id: id as u64, prompt: ids(&prompt["prompt"]), sampling };
            engine.add(request).unwrap();
        }
        for (id, answer) in finish(&mut engine) {
            assert_eq!(answer.token_ids, ids(&prompts[id as usize]["greedy"]), "{name}");
        }
    }
}

#[test]
fn an_aborted_request_leaves_nothing_and_harms_nobody() {
    let mut engine = Engine::load(&config()).unwrap();
    for request in requests() {
        engine.add(request).unwrap();
    }
    let mut answers = Answers::new();
    for _ in 0..3 {
        for output in engine.step().unwrap() {
            collect(output, &mut answers);
        }
    }
    for id in [0, 3, 4, 11] {
        engine.abort(id);
    }
    engine.abort(99);
    answers.extend(finish(&mut engine));
    let mut expected = alone();
    expected.retain(|id, _| ![0, 3, 4, 11].contains(id));
    assert_same(&answers, &expected);
}

#[test]
fn answers_end_at_end_tokens_stop_strings_and_the_window() {
    let request = Request { id: 2, prompt: vec![30, 40, 50], sampling: sampling(2) };
    let (full, _) = run(&config(), std::slice::from_ref(&request));
    let full = &full[&2];
    assert_eq!((full.finish_reason, full.completion_tokens), (FinishReason::Length, 22));

    let middle = full.text.char_indices().nth(full.text.chars().count() / 2).unwrap().0;
    let stop: String = full.text[middle..].chars().take(3).collect();
    let mut stopped = request.clone();
    stopped.sampling.stop = vec![stop.clone()];
    let answer = &run(&config(), &[stopped]).0[&2];
    assert_eq!(answer.finish_reason, FinishReason::Stop);
    assert_eq!(answer.text, full.text[..full.text.find(&stop).unwrap()]);
    assert!(answer.completion_tokens < full.completion_tokens);
    assert_eq!(answer.token_ids, full.token_ids[..answer.completion_tokens]);

    let window = EngineConfig { max_model_len: Some(10), ..config() };
    let answer = &run(&window, std::slice::from_ref(&request)).0[&2];
    assert_eq!((answer.finish_reason, answer.completion_tokens), (FinishReason::Length, 7));
    assert_eq!(answer.token_ids, full.token_ids[..7]);

    // The model with another end token: the fourth that it generates.
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("llama-gqa")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let end = format!(r#"{{"eos_token_id": [{}]}}"#, full.token_ids[3]);
    std::fs::write(folder.path().join("generation_config.json"), end).unwrap();
    let other = EngineConfig { model_path: folder.path().to_owned(), ..config() };
    let mut ending = request;
    ending.sampling.ignore_eos = false;
    let answer = &run(&other, &[ending]).0[&2];
    let first = full.token_ids.iter().position(|id| *id == full.token_ids[3]).unwrap();
    assert_eq!(answer.finish_reason, FinishReason::Stop);
    assert_eq!(answer.token_ids, full.token_ids[..=first]);
}

#[test]
fn requests_that_can_never_be_served_are_rejected_at_once() {
    let mut engine = Engine::load(&with_blocks(4, config())).unwrap();
    assert_eq!(engine.max_model_len(), 64);
    let mut refuse = |prompt: Vec<TokenId>, sampling: SamplingParams, what: &str| {
        let error = engine.add(Request { id: 1, prompt, sampling }).unwrap_err();
        assert!(matches!(&error, Error::Reject(reason) if reason.contains(what)), "{error}");
    };
    refuse(vec![], SamplingParams::default(), "empty");
    refuse(vec![5; 64], SamplingParams::default(), "64 tokens");
    refuse(vec![320], SamplingParams::default(), "vocabulary");
    refuse(vec![5], SamplingParams { top_p: 2.0, ..Default::default() }, "top_p");
    assert!(!engine.has_unfinished());
    let request = Request { id: 1, prompt: vec![5; 63], sampling: SamplingParams::default() };
    engine.add(request.clone()).unwrap();
    let twice = engine.add(request).unwrap_err();
    assert!(twice.to_string().contains("already"), "{twice}");
    assert_eq!(finish(&mut engine)[&1].completion_tokens, 1);
}

#[test]
fn settings_that_make_no_sense_are_all_named() {
    let wrong = EngineConfig { threads: 0, max_num_seqs: 0, max_model_len: Some(1), ..config() };
    let text = wrong.validate().unwrap_err().to_string();
    for name in ["threads", "max_num_seqs", "max_model_len"] {
        assert!(text.contains(name), "{text}");
    }
    let missing = EngineConfig { model_path: fixture("nowhere"), ..config() };
    assert!(Engine::load(&missing).is_err());
    assert!(matches!(Engine::load(&with_blocks(0, config())), Err(Error::OutOfMemory(_))));
}
