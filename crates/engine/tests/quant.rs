//! Block formats against the gguf package's numbers, and how well weights are quantised.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use flotilla_engine::quant::BlockFormat;

#[derive(serde::Deserialize)]
struct Fixtures {
    formats: BTreeMap<String, Decoded>,
    weights: String,
    weights_in_q8_0: String,
}

#[derive(serde::Deserialize)]
struct Decoded {
    blocks: String,
    numbers: String,
}

fn fixtures() -> Fixtures {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/quant/blocks.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn floats(hex: &str) -> Vec<f32> {
    bytes(hex).as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn decode(format: BlockFormat, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / format.block_bytes() * format.block_len()];
    format.decode(bytes, &mut out);
    out
}

fn quantised(format: BlockFormat, weights: &[f32]) -> Vec<f32> {
    let mut bytes = vec![0; weights.len() / format.block_len() * format.block_bytes()];
    format.encode(weights, &mut bytes);
    decode(format, &bytes)
}

fn rms_error(numbers: &[f32], weights: &[f32]) -> f64 {
    assert_eq!(numbers.len(), weights.len());
    let squares = numbers.iter().zip(weights).map(|(x, w)| (f64::from(*x) - f64::from(*w)).powi(2));
    (squares.sum::<f64>() / weights.len() as f64).sqrt()
}

/// What the largest and the smallest weight of each group alone would lead to.
fn plain(group_len: usize, bits: i32, has_min: bool, weights: &[f32]) -> Vec<f32> {
    let group = |group: &[f32]| -> Vec<f32> {
        let high = group.iter().fold(0.0, |high: f32, x| high.max(*x));
        let low = group.iter().fold(0.0, |low: f32, x| low.min(*x));
        let (scale, low) = if has_min {
            ((high - low) / (2f32.powi(bits) - 1.0), low)
        } else {
            (high.max(-low) / (2f32.powi(bits - 1) - 1.0), 0.0)
        };
        group.iter().map(|x| ((x - low) / scale).round() * scale + low).collect()
    };
    weights.chunks(group_len).flat_map(group).collect()
}

#[test]
fn every_block_format_is_decoded_to_the_numbers_of_ggml() {
    let fixtures = fixtures();
    for format in BlockFormat::ALL {
        let want = &fixtures.formats[format.name()];
        let want_numbers = floats(&want.numbers);
        let numbers = decode(format, &bytes(&want.blocks));
        assert_eq!(numbers.len(), want_numbers.len());
        for (i, (x, want)) in numbers.iter().zip(&want_numbers).enumerate() {
            assert!(x == want, "{format}: number {i} is {x}, expected {want}");
        }
    }
    assert_eq!(fixtures.formats.len(), BlockFormat::ALL.len());
}

#[test]
fn quantised_weights_are_nearer_than_the_plain_choice_and_the_reference() {
    let fixtures = fixtures();
    let weights = floats(&fixtures.weights);
    let reference =
        rms_error(&decode(BlockFormat::Q8_0, &bytes(&fixtures.weights_in_q8_0)), &weights);
    for (format, group_len, bits, has_min, at_most) in [
        (BlockFormat::Q8_0, 32, 8, false, 1.0),
        (BlockFormat::Q6K, 16, 6, false, 0.95),
        (BlockFormat::Q4K, 32, 4, true, 0.95),
    ] {
        let error = rms_error(&quantised(format, &weights), &weights);
        let plain = rms_error(&plain(group_len, bits, has_min, &weights), &weights);
        eprintln!("{format}: {error:.3e}, {:.3} of the plain choice", error / plain);
        assert!(error <= at_most * plain, "{format}: {error}, {plain} by the plain choice");
        if format == BlockFormat::Q8_0 {
            eprintln!("{format}: {:.3} of the reference", error / reference);
            assert!(error <= reference, "{error}, {reference} by the reference");
        }
    }
}

#[test]
fn what_is_a_block_already_is_quantised_to_itself_or_nearly() {
    let fixtures = fixtures();
    for format in [BlockFormat::Q8_0, BlockFormat::Q6K, BlockFormat::Q4K] {
        let numbers = decode(format, &bytes(&fixtures.formats[format.name()].blocks));
        let error = rms_error(&quantised(format, &numbers), &numbers);
        let size = rms_error(&numbers, &vec![0.0; numbers.len()]);
        eprintln!("{format}: {:.2e}", error / size);
        assert!(error < 0.02 * size, "{format}: {error} of {size}");
    }
}

#[test]
fn extreme_blocks_are_quantised_to_finite_numbers() {
    for format in [BlockFormat::Q8_0, BlockFormat::Q6K, BlockFormat::Q4K] {
        let mut one = vec![0.0; 256];
        one[77] = -3.0;
        let ramp = |by: f32| (0..256).map(|i| (i as f32 - 90.0) * by).collect::<Vec<_>>();
        for weights in
            [vec![0.0; 256], vec![-1.5; 256], vec![1.5; 256], one, ramp(1e-4), ramp(100.0)]
        {
            let size = weights.iter().fold(0.0f32, |size, x| size.max(x.abs()));
            for (x, want) in quantised(format, &weights).iter().zip(&weights) {
                let near = (x - want).abs() <= 0.05 * size + 1e-7;
                assert!(near, "{format}: {x}, expected {want} of up to {size}");
            }
        }
    }
}
