//! A decode step of an engine that has seen as much work before allocates nothing but the scheduler's list.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use flotilla_engine::step::BLOCK_SIZE;
use flotilla_engine::{Engine, EngineConfig, Request, SamplingParams, TokenId};

/// The system's allocator, counted.
struct Counting;

static NUM_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

#[expect(unsafe_code, reason = "an allocator")]
// SAFETY: all of it is the system's allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        NUM_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        NUM_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const NUM_SEQUENCES: usize = 8;
const PROMPT_LEN: usize = 21;
const NEW_TOKENS: usize = 70;

/// The list of what is scheduled grows to four and to eight.
const PLAN: usize = 2;

/// Texts of whole letters, chosen greedily or drawn, with stop strings that never come.
fn request(round: usize, index: usize) -> Request {
    let letters = [70, 71, 72].map(|token| (token, 100.0));
    let sampling = SamplingParams {
        max_new_tokens: NEW_TOKENS,
        temperature: if index.is_multiple_of(2) { 0.0 } else { 0.9 },
        top_k: if index % 4 == 1 { 20 } else { 0 },
        top_p: if index > 3 { 0.9 } else { 1.0 },
        logit_bias: letters.into(),
        stop: vec!["never that".to_owned()],
        ignore_eos: true,
        seed: index as u64,
        ..SamplingParams::default()
    };
    let first = (round * 100 + index * 10) % 200;
    let prompt = (0..PROMPT_LEN).map(|i| (20 + (first + i * 7) % 250) as TokenId).collect();
    Request { id: (round * NUM_SEQUENCES + index) as u64, prompt, sampling }
}

/// Allocations of each step, by the tokens of a sequence before it.
fn count(engine: &mut Engine, round: usize) -> Vec<(usize, usize)> {
    for index in 0..NUM_SEQUENCES {
        engine.add(request(round, index)).unwrap();
    }
    let mut counts = Vec::with_capacity(NEW_TOKENS);
    while engine.has_unfinished() {
        let before = NUM_ALLOCATIONS.load(Ordering::Relaxed);
        let outputs = engine.step().unwrap();
        let num_allocations = NUM_ALLOCATIONS.load(Ordering::Relaxed) - before;
        counts.push((PROMPT_LEN + counts.len(), num_allocations));
        drop(outputs);
    }
    assert_eq!(counts.len(), NEW_TOKENS, "a prefill of all and then decodes");
    counts
}

#[test]
fn decoding_allocates_nothing_step_by_step() {
    let model_path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-gqa");
    for threads in [1, 2] {
        let config = EngineConfig { model_path: model_path.clone(), threads, ..Default::default() };
        let mut engine = Engine::load(&config).unwrap();
        count(&mut engine, 0);
        let counts = count(&mut engine, 1);
        // The first step computes the prompts, the second one follows the first text, the last one ends all.
        let decodes = &counts[2..NEW_TOKENS - 1];
        let mut num_handed_over = 0;
        for &(num_tokens, num_allocations) in decodes {
            if num_tokens % BLOCK_SIZE < 2 {
                // Block tables grow, and full blocks become findable.
                assert!(num_allocations <= PLAN + 3 * NUM_SEQUENCES, "{counts:?}");
            } else {
                assert!(num_allocations == PLAN || threads > 1, "{threads} threads: {counts:?}");
                num_handed_over += num_allocations - PLAN;
            }
        }
        // Work handed to other threads is queued in pieces of memory for some sixty each.
        let most = if threads > 1 { decodes.len() / 8 } else { 0 };
        assert!(num_handed_over <= most, "{threads} threads: {counts:?}");
    }
}
