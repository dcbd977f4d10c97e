//! The samplers against their definitions: written anew here, drawn from many times, and as transformers has
//! them.

use proptest::prelude::*;

use super::*;

mod reference;

use reference::{reference, softmax};

/// The state of a sequence of this prompt and these generated tokens, with end-of-sequence token 0.
fn state(params: &SamplingParams, prompt: &[TokenId], generated: &[TokenId]) -> SamplingState {
    let mut state = SamplingState::new(params.clone(), prompt, &[0]);
    for token in generated {
        state.push(*token);
    }
    state
}

/// The token of a position whose sequence has no penalty.
fn sample(logits: &[f32], params: &SamplingParams, position: usize) -> Result<u32, SampleError> {
    let state = state(params, &[], &vec![1; position]);
    Sampler::default().sample(logits, &state).map(|chosen| chosen.token)
}

/// The probability of each token to be drawn.
fn distribution(logits: &[f32], state: &SamplingState) -> Vec<f64> {
    let mut sampler = Sampler::default();
    let logits = state.adjust(logits, &mut sampler.adjusted).unwrap_or(logits);
    let best = logits[argmax(sampler.simd, logits).unwrap().unwrap() as usize];
    sampler.candidates.restrict(sampler.simd, logits, best, state.params());
    let mut probabilities = sampler.candidates.weights(logits.len());
    let total: f64 = probabilities.iter().sum();
    probabilities.iter_mut().for_each(|probability| *probability /= total);
    probabilities
}

#[track_caller]
fn assert_close(given: &[f64], expected: &[f64], what: &str) {
    for (id, (given, expected)) in given.iter().zip(expected).enumerate() {
        assert!((given - expected).abs() < 1e-5, "{what}: token {id}: {given} for {expected}");
    }
}

/// Parameters that sample, without restrictions.
fn plain() -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: 7, ..SamplingParams::default() }
}

/// One of each, and combinations.
fn kinds() -> Vec<SamplingParams> {
    let bias = [(2, -100.0), (5, 2.5), (7, -1.0)].into();
    vec![
        plain(),
        SamplingParams { temperature: 0.5, ..plain() },
        SamplingParams { temperature: 2.0, ..plain() },
        SamplingParams { top_k: 9, ..plain() },
        SamplingParams { top_p: 0.8, ..plain() },
        SamplingParams { min_p: 0.2, ..plain() },
        SamplingParams { typical_p: 0.6, ..plain() },
        SamplingParams { repetition_penalty: 1.5, ..plain() },
        SamplingParams { repetition_penalty: 0.7, ..plain() },
        SamplingParams { presence_penalty: 1.2, ..plain() },
        SamplingParams { frequency_penalty: 0.6, ..plain() },
        SamplingParams { frequency_penalty: -0.4, presence_penalty: -0.3, ..plain() },
        SamplingParams { logit_bias: bias, ..plain() },
        SamplingParams { min_new_tokens: 100, stop_token_ids: vec![9], ..plain() },
        SamplingParams { min_new_tokens: 100, ignore_eos: true, ..plain() },
        SamplingParams { temperature: 1.5, top_p: 0.7, top_k: 20, ..plain() },
        SamplingParams { temperature: 1.3, top_p: 0.9, min_p: 0.1, typical_p: 0.8, ..plain() },
        SamplingParams {
            temperature: 0.8,
            top_k: 25,
            top_p: 0.95,
            min_p: 0.02,
            typical_p: 0.9,
            repetition_penalty: 1.2,
            presence_penalty: 0.3,
            frequency_penalty: 0.2,
            logit_bias: [(4, 1.0), (0, 3.0)].into(),
            min_new_tokens: 100,
            ..plain()
        },
    ]
}

#[test]
fn draws_follow_the_definitions() {
    let logits: Vec<f32> = (0..40).map(|id| ((id * 7) % 40) as f32 / 8.0 - 1.0).collect();
    let (prompt, generated) = ([3, 3, 11, 28], [17, 11, 17, 23, 17]);
    for params in kinds() {
        let expected = reference(&logits, &params, (&prompt, &generated));
        let mut counts = vec![0.0; logits.len()];
        let mut sampler = Sampler::default();
        let num_draws = 60_000;
        for seed in 0..num_draws {
            let params = SamplingParams { seed, ..params.clone() };
            let state = state(&params, &prompt, &generated);
            counts[sampler.sample(&logits, &state).unwrap().token as usize] += 1.0;
        }
        let mut chi_square = 0.0;
        let mut categories = 0.0;
        for (count, probability) in counts.iter().zip(&expected) {
            let mean = probability * num_draws as f64;
            // Forbidden, or by a bias so unlikely that no test can tell it from forbidden.
            if mean < 1e-6 {
                assert_eq!(*count, 0.0);
                continue;
            }
            chi_square += (count - mean) * (count - mean) / mean;
            categories += 1.0;
        }
        // Mean is categories - 1, deviation sqrt(2 (categories - 1)); five deviations is 1 in millions.
        let degrees: f64 = categories - 1.0;
        let limit = degrees + 5.0 * (2.0 * degrees).sqrt();
        assert!(degrees >= 2.0 && chi_square < limit, "{params:?}: {chi_square} against {limit}");
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_equals_and_heeds_bias_and_penalties() {
    let logits = [0.5, 2.0, 2.0, f32::NEG_INFINITY, 1.9];
    let greedy = SamplingParams::default();
    assert_eq!(sample(&logits, &greedy, 0), Ok(1));
    let choose = |params: SamplingParams, prompt: &[TokenId], generated: &[TokenId]| {
        Sampler::default().sample(&logits, &state(&params, prompt, generated)).unwrap().token
    };
    let repetition = SamplingParams { repetition_penalty: 1.1, ..greedy.clone() };
    assert_eq!(choose(repetition.clone(), &[1], &[]), 2);
    assert_eq!(choose(repetition, &[1], &[2]), 4);
    let presence = SamplingParams { presence_penalty: 0.2, ..greedy.clone() };
    assert_eq!(choose(presence.clone(), &[1, 2], &[]), 1);
    assert_eq!(choose(presence, &[], &[1, 2]), 4);
    let frequency = SamplingParams { frequency_penalty: 0.06, ..greedy.clone() };
    assert_eq!(choose(frequency.clone(), &[], &[1, 2]), 1);
    assert_eq!(choose(frequency, &[], &[1, 2, 1, 2]), 4);
    let forbidden = [(1, -100.0), (2, f32::MIN)].into();
    assert_eq!(choose(SamplingParams { logit_bias: forbidden, ..greedy.clone() }, &[], &[]), 4);
    let forced = [(0, 100.0)].into();
    assert_eq!(choose(SamplingParams { logit_bias: forced, ..greedy.clone() }, &[], &[]), 0);
    // Nothing makes the impossible possible.
    let impossible = [(3, f32::MAX)].into();
    assert_eq!(choose(SamplingParams { logit_bias: impossible, ..greedy.clone() }, &[], &[]), 1);
    let all = (0..5).map(|token| (token, f32::MIN)).collect();
    let params = SamplingParams { logit_bias: all, temperature: 1.0, ..greedy };
    let state = state(&params, &[], &[]);
    assert!(Sampler::default().sample(&logits, &state).is_ok(), "finite biases forbid no row");
}

#[test]
fn nan_is_an_error_wherever_it_stands() {
    for position in 0..3 {
        let mut logits = [1.0, f32::INFINITY, 0.0];
        logits[position] = f32::NAN;
        for temperature in [0.0, 1.0] {
            // Token 0 ends the answer, which is forbidden here.
            let params = SamplingParams { temperature, min_new_tokens: 1, ..plain() };
            assert_eq!(sample(&logits, &params, 0), Err(SampleError::NotANumber));
        }
    }
}

#[test]
fn infinities_are_ordinary_values() {
    let none = [f32::NEG_INFINITY; 3];
    assert_eq!(sample(&none, &plain(), 0), Err(SampleError::NothingPossible));
    assert_eq!(sample(&[], &plain(), 0), Err(SampleError::NothingPossible));
    let two = [0.0, f32::INFINITY, 5.0, f32::INFINITY];
    for params in [
        plain(),
        SamplingParams { top_p: 0.99, min_p: 0.5, ..plain() },
        SamplingParams { typical_p: 0.9, ..plain() },
    ] {
        let mut seen = [0; 4];
        for position in 0..100 {
            seen[sample(&two, &params, position).unwrap() as usize] += 1;
        }
        assert_eq!((seen[0], seen[2]), (0, 0));
        assert!(seen[1] > 20 && seen[3] > 20, "{params:?}: {seen:?}");
    }
}

#[test]
fn distributions_are_those_of_transformers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/sampling.json");
    let text = std::fs::read_to_string(path).unwrap();
    let fixture: serde_json::Value = serde_json::from_str(&text).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    };
    let ids = |value: &serde_json::Value| -> Vec<TokenId> {
        numbers(value).into_iter().map(|id| id as TokenId).collect()
    };
    let cases = fixture["cases"].as_array().unwrap();
    for case in cases {
        let row = &fixture["rows"][case["row"].as_u64().unwrap() as usize];
        let logits: Vec<f32> = numbers(&row["logits"]).into_iter().map(|x| x as f32).collect();
        let settings = &case["settings"];
        let number = |name: &str, neutral: f32| {
            settings.get(name).map_or(neutral, |value| value.as_f64().unwrap() as f32)
        };
        let bias = settings.get("sequence_bias").and_then(|bias| bias.as_object());
        let bias = bias
            .into_iter()
            .flatten()
            .map(|(token, bias)| (token.parse().unwrap(), bias.as_f64().unwrap() as f32));
        let params = SamplingParams {
            temperature: number("temperature", 1.0),
            top_k: number("top_k", 0.0) as usize,
            top_p: number("top_p", 1.0),
            min_p: number("min_p", 0.0),
            typical_p: number("typical_p", 1.0),
            repetition_penalty: number("repetition_penalty", 1.0),
            min_new_tokens: number("min_new_tokens", 0.0) as usize,
            logit_bias: bias.collect(),
            ..SamplingParams::default()
        };
        let (prompt, generated) = (ids(&row["prompt"]), ids(&row["generated"]));
        let state = state(&params, &prompt, &generated);
        let mut expected = vec![0.0; logits.len()];
        for entry in case["kept"].as_array().unwrap() {
            let entry = numbers(entry);
            expected[entry[0] as usize] = entry[1];
        }
        let given = distribution(&logits, &state);
        assert_close(&given, &expected, &settings.to_string());
        let kept = given.iter().filter(|probability| **probability > 1e-7).count();
        let wanted = expected.iter().filter(|probability| **probability > 1e-7).count();
        assert_eq!(kept, wanted, "{settings}");
        assert_close(&reference(&logits, &params, (&prompt, &generated)), &expected, "reference");
    }
    assert!(cases.len() >= 40, "{}", cases.len());
}

#[test]
fn a_sampler_used_before_chooses_as_a_new_one() {
    let long: Vec<f32> = (0..500).map(|id| ((id * 31) % 97) as f32 / 9.0).collect();
    let short = &long[100..140];
    let mut used = Sampler::default();
    for params in kinds() {
        for logits in [&long[..], short, &long[..], short] {
            let state = state(&params, &[3], &[17, 5]);
            let new = Sampler::default().sample(logits, &state);
            assert_eq!(used.sample(logits, &state), new, "{params:?}");
        }
    }
}

#[test]
fn logprobs_are_the_models_own_and_change_no_token() {
    let logits: Vec<f32> = (0..40).map(|id| ((id * 7) % 40) as f32 / 8.0).collect();
    let of_model = softmax(&logits.iter().map(|logit| f64::from(*logit)).collect::<Vec<_>>());
    for params in kinds() {
        let silent = state(&params, &[3], &[17, 5]);
        let asked = SamplingParams { logprobs: Some(5), ..params };
        let asked = state(&asked, &[3], &[17, 5]);
        let mut sampler = Sampler::default();
        let chosen = sampler.sample(&logits, &asked).unwrap();
        assert_eq!(chosen.token, sampler.sample(&logits, &silent).unwrap().token);
        let logprobs = chosen.logprobs.unwrap();
        let expected = of_model[chosen.token as usize].ln();
        assert!((f64::from(logprobs.logprob) - expected).abs() < 1e-5);
        assert_eq!(logprobs.top.len(), 5);
        assert!(logprobs.top.is_sorted_by(|a, b| a.1 >= b.1));
    }
}

prop_compose! {
    fn some_params()(
        temperature in 0.2_f32..3.0,
        top_k in prop_oneof![Just(0_usize), 1_usize..250],
        top_p in prop_oneof![Just(1.0_f32), 0.01_f32..0.999],
        min_p in prop_oneof![Just(0.0_f32), 0.001_f32..1.0],
        typical_p in prop_oneof![Just(1.0_f32), 0.01_f32..0.999],
        repetition_penalty in prop_oneof![Just(1.0_f32), 0.5_f32..2.0],
        presence_penalty in prop_oneof![Just(0.0_f32), -2.0_f32..2.0],
        frequency_penalty in prop_oneof![Just(0.0_f32), -2.0_f32..2.0],
        logit_bias in prop::collection::btree_map(0_u32..400, -20.0_f32..20.0, 0..4),
    ) -> SamplingParams {
        SamplingParams {
            temperature, top_k, top_p, min_p, typical_p, repetition_penalty, presence_penalty,
            frequency_penalty, logit_bias, ..SamplingParams::default()
        }
    }
}

proptest! {
    #[test]
    fn penalties_and_bias_are_those_of_a_naive_reference(
        logits in prop::collection::vec(-8.0_f32..8.0, 1..400),
        params in some_params(),
        prompt in prop::collection::vec(0_u32..400, 0..30),
        generated in prop::collection::vec(0_u32..60, 0..30),
    ) {
        let params = SamplingParams {
            top_k: 0, top_p: 1.0, min_p: 0.0, typical_p: 1.0, ..params
        };
        let given = distribution(&logits, &state(&params, &prompt, &generated));
        let expected = reference(&logits, &params, (&prompt, &generated));
        for (given, expected) in given.iter().zip(&expected) {
            prop_assert!((given - expected).abs() < 1e-4, "{} for {}", given, expected);
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_with_the_probability(
        logits in prop::collection::vec(-8.0_f32..8.0, 1..700),
        top_p in 0.01_f32..0.999,
        temperature in 0.2_f32..3.0,
    ) {
        let whole = SamplingParams { temperature, ..SamplingParams::default() };
        let restricted = SamplingParams { top_p, ..whole.clone() };
        let all = distribution(&logits, &state(&whole, &[], &[]));
        let kept = distribution(&logits, &state(&restricted, &[], &[]));
        let in_set = |id: &usize| kept[*id] > 0.0;
        let mass: f64 = (0..all.len()).filter(in_set).map(|id| all[id]).sum();
        prop_assert!(mass >= f64::from(top_p) - 1e-9);
        let least = (0..all.len()).filter(in_set).map(|id| all[id]).fold(1.0, f64::min);
        prop_assert!(mass - least < f64::from(top_p) + 1e-9);
        prop_assert!((0..all.len()).all(|id| in_set(&id) || all[id] <= least));
    }

    #[test]
    fn typical_sampling_keeps_the_smallest_set_round_the_entropy(
        logits in prop::collection::vec(-8.0_f32..8.0, 1..400),
        typical_p in 0.01_f32..0.999,
        temperature in 0.2_f32..3.0,
    ) {
        let whole = SamplingParams { temperature, ..SamplingParams::default() };
        let restricted = SamplingParams { typical_p, ..whole.clone() };
        let all = distribution(&logits, &state(&whole, &[], &[]));
        let kept = distribution(&logits, &state(&restricted, &[], &[]));
        let entropy: f64 = all.iter().map(|p| -p * p.ln()).sum();
        let distance = |id: usize| (-all[id].ln() - entropy).abs();
        let (inside, outside): (Vec<usize>, Vec<usize>) =
            (0..all.len()).partition(|id| kept[*id] > 0.0);
        let farthest = inside.iter().map(|id| distance(*id)).fold(0.0, f64::max);
        prop_assert!(outside.iter().all(|id| distance(*id) >= farthest - 1e-9));
        let mass: f64 = inside.iter().map(|id| all[*id]).sum();
        prop_assert!(mass >= f64::from(typical_p) - 1e-9);
        let at_edge = inside.iter().filter(|id| distance(**id) >= farthest - 1e-9);
        let edge = at_edge.map(|id| all[*id]).fold(0.0, f64::max);
        prop_assert!(mass - edge < f64::from(typical_p) + 1e-9);
    }

    #[test]
    fn min_p_keeps_what_is_likely_enough(
        logits in prop::collection::vec(-8.0_f32..8.0, 1..400),
        min_p in 0.001_f32..1.0,
        temperature in 0.2_f32..3.0,
    ) {
        let whole = SamplingParams { temperature, ..SamplingParams::default() };
        let restricted = SamplingParams { min_p, ..whole.clone() };
        let all = distribution(&logits, &state(&whole, &[], &[]));
        let kept = distribution(&logits, &state(&restricted, &[], &[]));
        let threshold = all.iter().copied().fold(0.0, f64::max) * f64::from(min_p);
        for (p, kept) in all.iter().zip(&kept) {
            // Within rounding of the threshold either is right.
            if (p - threshold).abs() > 1e-12 {
                prop_assert_eq!(*p > threshold, *kept > 0.0, "{} at {}", p, threshold);
            }
        }
    }

    #[test]
    fn top_k_keeps_the_likeliest(
        logits in prop::collection::vec(-4_i8..4, 1..200),
        top_k in 1_usize..250,
        position in 0_usize..1000,
    ) {
        let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
        let token = sample(&logits, &SamplingParams { top_k, ..plain() }, position).unwrap();
        let before = (0..logits.len()).filter(|&id| {
            let (other, own) = (logits[id], logits[token as usize]);
            other > own || (other == own && id < token as usize)
        }).count();
        prop_assert!(before < top_k);
    }

    #[test]
    fn what_ends_an_answer_is_never_drawn_too_early(
        logits in prop::collection::vec(-4.0_f32..4.0, 8..60),
        params in some_params(),
        generated in prop::collection::vec(0_u32..60, 0..12),
        is_greedy: bool,
    ) {
        let min_new_tokens = 6;
        let params = SamplingParams {
            min_new_tokens,
            stop_token_ids: vec![3, 5],
            temperature: if is_greedy { 0.0 } else { params.temperature },
            // Nothing but these would be chosen.
            logit_bias: [(0, 100.0), (3, 100.0), (5, 100.0)].into(),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            typical_p: 1.0,
            ..params
        };
        let state = state(&params, &[], &generated);
        let token = Sampler::default().sample(&logits, &state).unwrap().token;
        prop_assert_eq!(state.is_end(token), generated.len() >= min_new_tokens);
    }
}
