use std::collections::BTreeMap;

use super::*;

use std::sync::atomic::{AtomicU64, Ordering};

fn config() -> EngineConfig {
    let model_path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-mha");
    EngineConfig { model_path, threads: 1, ..EngineConfig::default() }
}

fn request(id: u64) -> Request {
    let prompt = (5..25 + id as TokenId).collect();
    let sampling =
        SamplingParams { max_new_tokens: 8, ignore_eos: true, ..SamplingParams::default() };
    Request { id, prompt, sampling }
}

type Answers = BTreeMap<u64, Result<Vec<TokenId>, String>>;

fn finish(engine: &mut Engine) -> Answers {
    let mut answers = Answers::new();
    while engine.has_unfinished() {
        for output in engine.step().unwrap() {
            match output {
                StepOutput::Finished(done) => answers.insert(done.id, Ok(done.token_ids)),
                StepOutput::Failed { id, reason } => answers.insert(id, Err(reason)),
            };
        }
    }
    assert_eq!(engine.stats().kv_blocks_used, 0);
    answers
}

#[test]
fn logits_that_are_no_numbers_harm_their_own_sequence_alone() {
    let answers = |poisoned| {
        let mut engine = Engine::load(&config()).unwrap();
        engine.poisoned = poisoned;
        (0..3).for_each(|id| engine.add(request(id)).unwrap());
        finish(&mut engine)
    };
    let healthy = answers(None);
    let poisoned = answers(Some(1));
    assert_eq!((&poisoned[&0], &poisoned[&2]), (&healthy[&0], &healthy[&2]));
    assert!(poisoned[&1].as_ref().is_err_and(|reason| reason.contains("NaN")));
}

/// Bytes that are still free; once told, they count as taken.
static FREE: AtomicU64 = AtomicU64::new(0);

#[test]
fn a_cache_that_memory_runs_out_for_gets_smaller_and_answers_all_the_same() {
    let config = EngineConfig { enable_prefix_caching: false, ..config() };
    let answers = |num_blocks: u64| {
        let mut engine = Engine::load(&config).unwrap();
        // A quarter is left to others.
        FREE.store(
            (num_blocks * engine.runner.kv_bytes_per_block() as u64 * 4).div_ceil(3),
            Ordering::Relaxed,
        );
        engine.runner.available_memory = || Some(FREE.swap(0, Ordering::Relaxed));
        (0..6).for_each(|id| engine.add(request(id)).unwrap());
        let answers = finish(&mut engine);
        (answers, engine)
    };
    let (expected, ample) = answers(1000);
    assert_eq!(ample.stats().num_preemptions, 0);
    let (scarce, engine) = answers(7);
    assert_eq!(scarce, expected);
    let stats = engine.stats();
    assert!(stats.kv_blocks_total == 7 && stats.num_preemptions > 0, "{stats:?}");

    let mut none = Engine::load(&config).unwrap();
    none.runner.available_memory = || Some(0);
    none.add(request(0)).unwrap();
    assert!(matches!(none.step(), Err(Error::OutOfMemory(_))));
}
