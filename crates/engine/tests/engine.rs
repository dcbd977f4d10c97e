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
    let options =
        RunnerOptions { threads: 1, max_num_batched_tokens: 1, ..RunnerOptions::default() };
    let runner = Runner::load(&config.model_path, &options).unwrap();
    EngineConfig {
        kv_cache_dtype: options.kv_cache_dtype,
        kv_cache_memory_bytes: Some(num_blocks * runner.kv_bytes_per_block() as u64),
        ..config
    }
}

/// Greedy for even ids, sampled for odd ones; penalties, bias and log-probabilities for some of each.
fn sampling(id: u64) -> SamplingParams {
    SamplingParams {
        max_new_tokens: 20 + id as usize,
        temperature: if id.is_multiple_of(2) { 0.0 } else { 0.9 },
        top_p: if id.is_multiple_of(3) { 0.9 } else { 1.0 },
        top_k: if id.is_multiple_of(5) { 50 } else { 0 },
        min_p: if id % 4 == 1 { 0.01 } else { 0.0 },
        typical_p: if id % 4 == 3 { 0.95 } else { 1.0 },
        repetition_penalty: if id > 4 { 1.2 } else { 1.0 },
        presence_penalty: if id > 6 { 0.4 } else { 0.0 },
        frequency_penalty: if id > 8 { 0.2 } else { 0.0 },
        logit_bias: if id > 7 { [(id as TokenId, 0.5)].into() } else { BTreeMap::new() },
        logprobs: if id.is_multiple_of(3) { Some(id as usize / 2) } else { None },
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

/// Alone in the cache and with everything cached, chunked, and sent back for want of blocks; longrope's switch
/// to its long factors included.
#[test]
fn greedy_answers_are_those_of_transformers_for_every_architecture() {
    let mut num_checkpoints = 0;
    for entry in std::fs::read_dir(fixture("")).unwrap() {
        let model_path = entry.unwrap().path();
        let Ok(text) = std::fs::read_to_string(model_path.join("expected.json")) else {
            continue;
        };
        num_checkpoints += 1;
        let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
        let prompts = expected["prompts"].as_array().unwrap();
        let ids = |value: &serde_json::Value| -> Vec<TokenId> {
            let ids = value.as_array().unwrap().iter();
            ids.map(|id| id.as_u64().unwrap() as TokenId).collect()
        };
        for (num_blocks, max_num_batched_tokens) in [(64, 512), (11, 16)] {
            let config =
                EngineConfig { model_path: model_path.clone(), max_num_batched_tokens, ..config() };
            let mut engine = Engine::load(&with_blocks(num_blocks, config)).unwrap();
            for _ in 0..2 {
                for (id, prompt) in prompts.iter().enumerate() {
                    let max_new_tokens = prompt["greedy"].as_array().unwrap().len();
                    let sampling =
                        SamplingParams { max_new_tokens, ignore_eos: true, ..Default::default() };
                    let prompt = ids(&prompt["prompt"]);
                    engine.add(Request { id: id as u64, prompt, sampling }).unwrap();
                }
                for (id, answer) in finish(&mut engine) {
                    let want = ids(&prompts[id as usize]["greedy"]);
                    let setting = format!("{num_blocks} blocks, prompt {id}");
                    assert_eq!(answer.token_ids, want, "{}, {setting}", model_path.display());
                }
            }
            assert!(engine.stats().cached_prompt_tokens > 0);
            assert!(num_blocks > 11 || engine.stats().num_preemptions > 0);
        }
    }
    assert!(num_checkpoints > 30, "only {num_checkpoints}");
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
    let end = full.token_ids[3];
    let (_folder, other) = ending_with(end);
    let mut ending = request;
    let ignoring = &run(&other, std::slice::from_ref(&ending)).0[&2];
    assert_eq!(ignoring.token_ids, full.token_ids);
    ending.sampling.ignore_eos = false;
    let answer = &run(&other, std::slice::from_ref(&ending)).0[&2];
    let first = full.token_ids.iter().position(|id| *id == end).unwrap();
    assert_eq!(answer.finish_reason, FinishReason::Stop);
    assert_eq!(answer.token_ids, full.token_ids[..=first]);

    // A stop token ends it just so, where the model's own is ignored too.
    let mut stopping = ending.clone();
    stopping.sampling = SamplingParams { ignore_eos: true, ..stopping.sampling };
    stopping.sampling.stop_token_ids = vec![end];
    assert_eq!(run(&config(), &[stopping]).0[&2].token_ids, answer.token_ids);
    assert_eq!(&run(&other, std::slice::from_ref(&ending)).0[&2].text, &answer.text);

    // Neither does before `min_new_tokens`.
    ending.sampling.min_new_tokens = first + 3;
    let later = &run(&other, &[ending]).0[&2];
    assert!(later.completion_tokens >= first + 3, "{later:?}");
    assert!(!later.token_ids[..first + 3].contains(&end), "{later:?}");
}

/// The usual model with another end token.
fn ending_with(token: TokenId) -> (tempfile::TempDir, EngineConfig) {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("llama-gqa")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let end = format!(r#"{{"eos_token_id": [{token}]}}"#);
    std::fs::write(folder.path().join("generation_config.json"), end).unwrap();
    let config = EngineConfig { model_path: folder.path().to_owned(), ..config() };
    (folder, config)
}

#[test]
fn stop_strings_wait_for_the_least_number_of_tokens() {
    let sampling =
        SamplingParams { max_new_tokens: 40, ignore_eos: true, ..SamplingParams::default() };
    let request = Request { id: 1, prompt: vec![30, 40, 50], sampling };
    let full = &run(&config(), std::slice::from_ref(&request)).0[&1];
    let stop: String = full.text.chars().skip(1).take(2).collect();
    let end_of = |min_new_tokens| {
        let mut request = request.clone();
        request.sampling.stop = vec![stop.clone()];
        request.sampling.min_new_tokens = min_new_tokens;
        run(&config(), &[request]).0[&1].clone()
    };
    let at_once = end_of(0);
    assert_eq!(at_once.finish_reason, FinishReason::Stop);
    assert!(at_once.completion_tokens < 10, "{at_once:?}");
    let later = end_of(20);
    assert!(later.completion_tokens >= 20, "{later:?}");
    assert_eq!(later.token_ids, full.token_ids[..later.completion_tokens]);
    assert!(full.text.starts_with(&later.text) && later.text.len() > at_once.text.len());
}

/// The token that penalties make the best of those that were likeliest, by its definition.
fn penalised(top: &[(TokenId, f32)], generated: &[TokenId], params: &SamplingParams) -> TokenId {
    let score = |(token, logprob): &(TokenId, f32)| {
        let times = generated.iter().filter(|other| *other == token).count() as f32;
        let presence = if times > 0.0 { params.presence_penalty } else { 0.0 };
        logprob - times * params.frequency_penalty - presence
    };
    top.iter().max_by(|a, b| score(a).total_cmp(&score(b))).unwrap().0
}

#[test]
fn greedy_answers_obey_penalties_and_logprobs_are_the_models_own() {
    let plain = SamplingParams {
        max_new_tokens: 19,
        ignore_eos: true,
        logprobs: Some(20),
        ..SamplingParams::default()
    };
    let penalties =
        SamplingParams { presence_penalty: 0.7, frequency_penalty: 0.5, ..plain.clone() };
    let request = |id, sampling: &SamplingParams| Request {
        id,
        prompt: vec![30; 9],
        sampling: sampling.clone(),
    };
    let silent = SamplingParams { logprobs: None, ..penalties.clone() };
    let requests = [request(0, &plain), request(1, &penalties), request(2, &silent)];
    let (answers, _) = run(&config(), &requests);
    assert_eq!(answers[&2].token_ids, answers[&1].token_ids);
    assert_eq!(answers[&2].logprobs, None);
    assert_ne!(answers[&0].token_ids, answers[&1].token_ids);
    for (id, params) in [(0, &plain), (1, &penalties)] {
        let answer = &answers[&id];
        let logprobs = answer.logprobs.as_ref().unwrap();
        assert_eq!(logprobs.len(), answer.token_ids.len());
        for (index, (token, given)) in answer.token_ids.iter().zip(logprobs).enumerate() {
            // Fewer than 20 tokens are penalised, so the best is among the 20 likeliest.
            assert_eq!(*token, penalised(&given.top, &answer.token_ids[..index], params));
            let own = given.top.iter().find(|(other, _)| other == token).unwrap();
            assert_eq!(own.1, given.logprob);
            assert!(given.top.is_sorted_by(|a, b| a.1 >= b.1));
            let sum: f64 = given.top.iter().map(|entry| f64::from(entry.1).exp()).sum();
            assert!(sum > 0.0 && sum <= 1.0 + 1e-6, "{sum}");
        }
    }
}

#[test]
fn biases_force_and_forbid_tokens() {
    let params = SamplingParams { max_new_tokens: 12, ignore_eos: true, ..Default::default() };
    let request = |id, sampling| Request { id, prompt: vec![30, 40, 50], sampling };
    let (answers, _) = run(&config(), &[request(0, params.clone())]);
    let usual = &answers[&0].token_ids;
    let forced = SamplingParams { logit_bias: [(77, 1e6)].into(), ..params.clone() };
    let forbidden = SamplingParams {
        logit_bias: usual.iter().map(|token| (*token, -1e6)).collect(),
        temperature: 1.0,
        ..params
    };
    let (answers, _) = run(&config(), &[request(1, forced), request(2, forbidden)]);
    assert_eq!(answers[&1].token_ids, [77; 12]);
    assert!(answers[&2].token_ids.iter().all(|token| !usual.contains(token)));
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
    let outside = SamplingParams { stop_token_ids: vec![320], ..Default::default() };
    refuse(vec![5], outside, "320 is outside of the vocabulary of 320");
    let outside = SamplingParams { logit_bias: [(321, 1.0)].into(), ..Default::default() };
    refuse(vec![5], outside, "321 is outside");
    let never = SamplingParams { max_new_tokens: 4, min_new_tokens: 5, ..Default::default() };
    refuse(vec![5], never, "min_new_tokens must be at most max_new_tokens, got 5");
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
