//! The device's choice of tokens: beside the definition of each parameter, and in an engine.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::device::{Device, Memory};
use super::super::kernels::{Kernels, Shape};
use super::{Place, device, fixture, on_every_device, shipped_model};
use crate::runner::Runner;
use crate::sampler::PlainChoice;
use crate::{Engine, EngineConfig, Precision, Request, SamplingParams, StepOutput};

on_every_device!(
    tokens_are_chosen_as_the_parameters_are_defined,
    an_engine_on_a_device_answers_as_with_the_samplers_of_the_host,
    the_shipped_model_answers_on_a_device_as_on_the_processor,
);

/// What a token of probability 1 weighs.
const ONE: f32 = (1_u64 << 40) as f32;

const NOT_A_NUMBER: i32 = -1;
const NOTHING_POSSIBLE: i32 = -2;

/// What the kernel is to choose, by putting everything in order.
fn choose(logits: &[f32], choice: &PlainChoice) -> i32 {
    if logits.iter().any(|logit| logit.is_nan()) {
        return NOT_A_NUMBER;
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap().then(a.cmp(b)));
    let best = logits[order[0]];
    if best == f32::NEG_INFINITY {
        return NOTHING_POSSIBLE;
    }
    if choice.temperature <= 0.0 || choice.top_k == 1 {
        return order[0] as i32;
    }
    let weight = |token: usize| match logits[token] {
        logit if logit == best => ONE as u64,
        logit => (((logit - best) / choice.temperature).exp() * ONE) as u64,
    };
    if choice.top_k > 0 {
        order.truncate(choice.top_k);
    }
    if choice.top_p < 1.0 {
        let total: u64 = order.iter().map(|token| weight(*token)).sum();
        let wanted = ((f64::from(choice.top_p) * total as f64).ceil() as u64).max(1);
        let mut mass = 0;
        let len = order.iter().take_while(|token| {
            let is_in = mass < wanted;
            mass += weight(**token);
            is_in
        });
        let len = len.count();
        order.truncate(len);
    }
    order.retain(|token| weight(*token) >= (choice.min_p * ONE) as u64);
    order.sort_unstable();
    let total: u64 = order.iter().map(|token| weight(*token)).sum();
    let target = ((u128::from(total) * u128::from(choice.draw)) >> 64) as u64;
    let mut mass = 0;
    let reached = order.iter().find(|token| {
        mass += weight(**token);
        mass > target
    });
    *reached.unwrap() as i32
}

fn on_the_device(
    device: &Arc<dyn Device>,
    shape: &Shape,
    logits: &[f32],
    choice: &PlainChoice,
) -> i32 {
    let bytes = |numbers: Vec<[u8; 4]>| {
        let bytes = numbers.concat();
        let memory = Memory::new(device, bytes.len()).unwrap();
        memory.write(&bytes).unwrap();
        memory
    };
    // The row in question is the second of two.
    let rows = bytes(logits.iter().chain(logits).map(|logit| logit.to_le_bytes()).collect());
    let item = [
        1_u32,
        choice.top_k as u32,
        choice.temperature.to_bits(),
        choice.top_p.to_bits(),
        choice.min_p.to_bits(),
        choice.draw as u32,
        (choice.draw >> 32) as u32,
    ];
    let item = bytes(item.into_iter().map(u32::to_le_bytes).collect());
    let token = Memory::new(device, 4).unwrap();
    let kernels = Kernels { device: device.as_ref(), shape, eps: 0.0 };
    let logits = (rows.address(), logits.len());
    kernels.sample(logits, (item.address(), 1), token.address()).unwrap();
    let mut bytes = [0; 4];
    token.read(&mut bytes).unwrap();
    i32::from_le_bytes(bytes)
}

/// Rows with equal, infinite and impossible logits, shorter and longer than a block has threads.
fn rows() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        8 => -20.0_f32..20.0,
        2 => (-3_i8..3).prop_map(f32::from),
        1 => prop_oneof![Just(f32::NEG_INFINITY), Just(f32::INFINITY), Just(0.0_f32), Just(-0.0)],
    ];
    let rare_nan = (prop::collection::vec(logit, 1..3000), 0..40_usize);
    rare_nan.prop_map(|(mut row, place)| {
        if place == 0 {
            row[0] = f32::NAN;
        }
        row
    })
}

fn choices() -> impl Strategy<Value = PlainChoice> {
    let temperature = prop_oneof![1 => Just(0.0_f32), 6 => 0.1_f32..2.0];
    let top_k = prop_oneof![Just(0_usize), 1..50_usize, 1..5000_usize];
    let top_p = prop_oneof![Just(1.0_f32), 0.01_f32..1.0];
    let min_p = prop_oneof![Just(0.0_f32), 0.0_f32..1.0];
    (temperature, top_k, top_p, min_p, any::<u64>()).prop_map(
        |(temperature, top_k, top_p, min_p, draw)| PlainChoice {
            temperature,
            top_k,
            top_p,
            min_p,
            draw,
        },
    )
}

fn tokens_are_chosen_as_the_parameters_are_defined(place: Place) {
    let shape = Shape::SMALLEST;
    let device = place.open(&shape);
    let config = ProptestConfig { cases: 150, failure_persistence: None, ..Default::default() };
    proptest!(config, |(row in rows(), choice in choices())| {
        let given = on_the_device(&device, &shape, &row, &choice);
        prop_assert_eq!(given, choose(&row, &choice), "{:?}", choice);
    });
}

/// Whose tokens are the device's, unless everything is left to the host's samplers.
fn answers(place: Place, sampling: &SamplingParams) -> Vec<Vec<u32>> {
    let model = fixture("llama-f16");
    let config = EngineConfig {
        model_path: model.clone(),
        threads: 1,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        ..EngineConfig::default()
    };
    let backend = Box::new(device(place, &model, Precision::Fp16));
    let mut engine = Engine::with_runner(&config, Runner::with_backend(backend, 64)).unwrap();
    for id in 0..6 {
        let prompt = (5..30 + 9 * id as u32).collect();
        let sampling = SamplingParams { seed: id, ..sampling.clone() };
        engine.add(Request { id, prompt, sampling }).unwrap();
    }
    let mut answers = vec![Vec::new(); 6];
    while engine.has_unfinished() {
        for output in engine.step().unwrap() {
            let StepOutput::Finished(done) = output else { panic!("{output:?}") };
            answers[done.id as usize] = done.token_ids;
        }
    }
    answers
}

fn an_engine_on_a_device_answers_as_with_the_samplers_of_the_host(place: Place) {
    let greedy =
        SamplingParams { max_new_tokens: 10, ignore_eos: true, ..SamplingParams::default() };
    // Log-probabilities need the host's samplers.
    let by_host = SamplingParams { logprobs: Some(1), ..greedy.clone() };
    assert_eq!(answers(place, &greedy), answers(place, &by_host));
    let drawn = SamplingParams { temperature: 0.8, top_k: 40, top_p: 0.9, ..greedy.clone() };
    let first = answers(place, &drawn);
    assert_eq!(first, answers(place, &drawn));
    assert_ne!(first, answers(place, &greedy));
}

fn the_shipped_model_answers_on_a_device_as_on_the_processor(place: Place) {
    let model = shipped_model();
    let config = EngineConfig { model_path: model.clone(), threads: 1, ..EngineConfig::default() };
    let answer = |mut engine: Engine| {
        let prompt = engine
            .tokenizer()
            .encode("numpy.argsort: Returns the indices that would sort an array.", true)
            .unwrap();
        let sampling = SamplingParams { max_new_tokens: 12, ..SamplingParams::default() };
        engine.add(Request { id: 0, prompt, sampling }).unwrap();
        loop {
            if let Some(StepOutput::Finished(done)) = engine.step().unwrap().pop() {
                return done.token_ids;
            }
        }
    };
    let backend = Box::new(device(place, &model, Precision::Bf16));
    let on_device = Engine::with_runner(&config, Runner::with_backend(backend, 512)).unwrap();
    assert_eq!(answer(on_device), answer(Engine::load(&config).unwrap()));
}
