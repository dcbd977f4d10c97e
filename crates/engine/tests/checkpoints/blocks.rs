//! GGUF files whose matrices are in blocks, of every format, against folders with the numbers that the blocks stand
//! for. The files are written here, with random blocks.

use std::path::Path;

use crate::driver::{Sequence, argmax, generate, run};
use crate::synthetic::Random;
use flotilla_engine::quant::BlockFormat;
use flotilla_engine::step::TokenId;
use flotilla_engine::{InstructionSet, Precision, Runner, RunnerOptions};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;

/// A format with its number in GGUF files, where its half precision scales are in a block, and their size in a
/// block of weights as a model has them.
const FORMATS: [(BlockFormat, u32, &[usize], f32); 10] = [
    (BlockFormat::Q4_0, 2, &[0], 0.01),
    (BlockFormat::Q4_1, 3, &[0, 2], 0.01),
    (BlockFormat::Q5_0, 6, &[0], 0.005),
    (BlockFormat::Q5_1, 7, &[0, 2], 0.005),
    (BlockFormat::Q8_0, 8, &[0], 8e-4),
    (BlockFormat::Q2K, 10, &[80, 82], 4e-3),
    (BlockFormat::Q3K, 11, &[108], 1e-3),
    (BlockFormat::Q4K, 12, &[0, 2], 2e-4),
    (BlockFormat::Q5K, 13, &[0, 2], 1e-4),
    (BlockFormat::Q6K, 14, &[208], 3e-5),
];

const HIDDEN: usize = 256;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const INTERMEDIATE: usize = 512;
const LAYERS: usize = 2;
const VOCABULARY: usize = 90;
const EXPERTS: usize = 3;

/// A tensor of both: its name in the file, those in the folder, and its shape as the folder has it.
struct Spec {
    own: String,
    /// One, or one for each expert.
    names: Vec<String>,
    shape: Vec<usize>,
    /// Heads whose rows alternate between their halves in the file.
    interleaved: Option<usize>,
}

fn specs(has_experts: bool) -> Vec<Spec> {
    let spec = |own: &str, name: &str, shape: &[usize]| Spec {
        own: format!("{own}.weight"),
        names: vec![format!("{name}.weight")],
        shape: shape.to_vec(),
        interleaved: None,
    };
    let mut specs = vec![
        spec("token_embd", "model.embed_tokens", &[VOCABULARY, HIDDEN]),
        spec("output_norm", "model.norm", &[HIDDEN]),
        spec("output", "lm_head", &[VOCABULARY, HIDDEN]),
    ];
    let kv = HIDDEN / HEADS * KV_HEADS;
    for layer in 0..LAYERS {
        let in_layer = |own: &str, name: &str, shape: &[usize]| {
            spec(&format!("blk.{layer}.{own}"), &format!("model.layers.{layer}.{name}"), shape)
        };
        let heads = |heads, spec| Spec { interleaved: Some(heads), ..spec };
        specs.extend([
            in_layer("attn_norm", "input_layernorm", &[HIDDEN]),
            in_layer("ffn_norm", "post_attention_layernorm", &[HIDDEN]),
            heads(HEADS, in_layer("attn_q", "self_attn.q_proj", &[HIDDEN, HIDDEN])),
            heads(KV_HEADS, in_layer("attn_k", "self_attn.k_proj", &[kv, HIDDEN])),
            in_layer("attn_v", "self_attn.v_proj", &[kv, HIDDEN]),
            in_layer("attn_output", "self_attn.o_proj", &[HIDDEN, HIDDEN]),
        ]);
        let (up, down) = ([INTERMEDIATE, HIDDEN], [HIDDEN, INTERMEDIATE]);
        let matrices = [("gate", "w1", up), ("up", "w3", up), ("down", "w2", down)];
        for (own, name, shape) in matrices {
            specs.push(if has_experts {
                let moe = format!("model.layers.{layer}.block_sparse_moe.experts");
                Spec {
                    own: format!("blk.{layer}.ffn_{own}_exps.weight"),
                    names: (0..EXPERTS).map(|n| format!("{moe}.{n}.{name}.weight")).collect(),
                    shape: shape.to_vec(),
                    interleaved: None,
                }
            } else {
                in_layer(&format!("ffn_{own}"), &format!("mlp.{own}_proj"), &shape)
            });
        }
        if has_experts {
            specs.push(in_layer("ffn_gate_inp", "block_sparse_moe.gate", &[EXPERTS, HIDDEN]));
        }
    }
    specs
}

/// The file and the folder.
#[derive(Default)]
struct Both {
    infos: Vec<u8>,
    data: Vec<u8>,
    num_tensors: u64,
    tensors: Vec<(String, Vec<usize>, Vec<u8>)>,
}

impl Both {
    /// Adds a tensor of random blocks, or of plain numbers.
    fn add(&mut self, spec: &Spec, format: Option<usize>, random: &mut Random) {
        let (rows, width) = match *spec.shape {
            [rows, width] => (rows, width),
            _ => (1, spec.shape[0]),
        };
        self.num_tensors += 1;
        self.infos.extend(text(&spec.own));
        let mut dimensions: Vec<usize> = spec.shape.iter().rev().copied().collect();
        if spec.names.len() > 1 {
            dimensions.push(spec.names.len());
        }
        self.infos.extend((dimensions.len() as u32).to_le_bytes());
        for len in dimensions {
            self.infos.extend((len as u64).to_le_bytes());
        }
        self.infos.extend(format.map_or(0, |format| FORMATS[format].1).to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        for name in &spec.names {
            let own: Vec<Vec<f32>> =
                (0..rows).map(|_| self.add_row(width, format, random)).collect();
            let half = spec.interleaved.map(|heads| rows / heads / 2);
            let number = |row: usize| match half {
                None => row,
                // The folder has the first halves of a head's rows one behind the other, then the second ones.
                Some(half) => {
                    let (head, row) = (row / (2 * half), row % (2 * half));
                    2 * half * head + 2 * (row % half) + row / half
                }
            };
            let numbers = (0..rows).flat_map(|row| &own[number(row)]);
            let bytes = numbers.flat_map(|number| number.to_le_bytes()).collect();
            self.tensors.push((name.clone(), spec.shape.clone(), bytes));
        }
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    /// Adds a row to the file's data; its numbers.
    fn add_row(&mut self, width: usize, format: Option<usize>, random: &mut Random) -> Vec<f32> {
        let Some(format) = format else {
            let numbers: Vec<f32> = (0..width).map(|_| 1.0 + random.signed() / 4.0).collect();
            self.data.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            return numbers;
        };
        let (format, _, halves, size) = FORMATS[format];
        let start = self.data.len();
        for _ in 0..width / format.block_len() {
            let mut block: Vec<u8> =
                (0..format.block_bytes()).map(|_| random.next() as u8).collect();
            for at in halves {
                let scale = half::f16::from_f32(size * random.signed());
                block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
            self.data.extend(block);
        }
        let mut numbers = vec![0.0; width];
        format.decode(&self.data[start..], &mut numbers);
        numbers
    }

    fn write(&self, file: &Path, folder: &Path, has_experts: bool) {
        let settings = settings(has_experts);
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(self.num_tensors.to_le_bytes());
        bytes.extend((settings.len() as u64).to_le_bytes());
        bytes.extend(settings.concat());
        bytes.extend(&self.infos);
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        std::fs::write(file, bytes).unwrap();
        let class = if has_experts { "MixtralForCausalLM" } else { "LlamaForCausalLM" };
        let config = json!({
            "architectures": [class], "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "vocab_size": VOCABULARY, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0, "tie_word_embeddings": false, "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
        });
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let view = |shape: &[usize], bytes| TensorView::new(Dtype::F32, shape.to_vec(), bytes);
        let views =
            self.tensors.iter().map(|(name, shape, bytes)| (name, view(shape, bytes).unwrap()));
        serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn settings(has_experts: bool) -> Vec<Vec<u8>> {
    let number = |key: &str, value: usize| {
        [text(&format!("llama.{key}")), [4, value as u32].map(u32::to_le_bytes).concat()].concat()
    };
    let name = [text("general.architecture"), 8u32.to_le_bytes().to_vec(), text("llama")].concat();
    let eps = text("llama.attention.layer_norm_rms_epsilon");
    let eps = [eps, 6u32.to_le_bytes().to_vec(), 1e-5f32.to_le_bytes().to_vec()].concat();
    let mut settings = vec![
        name,
        eps,
        number("context_length", 256),
        number("embedding_length", HIDDEN),
        number("block_count", LAYERS),
        number("feed_forward_length", INTERMEDIATE),
        number("attention.head_count", HEADS),
        number("attention.head_count_kv", KV_HEADS),
    ];
    if has_experts {
        settings.extend([number("expert_count", EXPERTS), number("expert_used_count", 2)]);
    }
    settings
}

/// Logits of a prompt, and greedy tokens behind it.
fn outputs(
    model: &Path,
    precision: Option<Precision>,
    instruction_set: InstructionSet,
) -> (Vec<f32>, Vec<TokenId>) {
    let options = RunnerOptions {
        max_num_batched_tokens: 64,
        precision,
        instruction_set: Some(instruction_set),
        ..RunnerOptions::default()
    };
    let mut runner = Runner::load(model, &options).unwrap();
    runner.allocate_kv_cache(8).unwrap();
    let prompt = (3..40).collect();
    let mut sequence = Sequence::contiguous(prompt, 0, 128);
    let logits = run(&mut runner, &mut sequence, 64).remove(0);
    sequence.push(argmax(&logits));
    (logits, generate(&mut runner, &mut [&mut sequence], 63).remove(0))
}

/// Writes both, with `format` telling that of each matrix in turn, and compares what they give.
fn compare(name: &str, has_experts: bool, format: impl Fn(usize) -> usize) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    let (mut both, mut random) = (Both::default(), Random(7));
    for (number, spec) in specs(has_experts).iter().enumerate() {
        // Vectors and routers are never in blocks.
        let is_plain = spec.shape.len() == 1 || spec.shape[0] == EXPERTS;
        both.add(spec, (!is_plain).then(|| format(number)), &mut random);
    }
    both.write(&file, folder.path(), has_experts);
    // What a matrix unit decodes is rounded to bfloat16.
    let (matrix_units, vector_units): (Vec<_>, Vec<_>) =
        InstructionSet::available().into_iter().partition(|set| set.has_matrix_unit());
    let vector_unit = vector_units[0];
    let (want, want_tokens) = outputs(folder.path(), None, vector_unit);
    let scale = want.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    assert!(scale > 0.1 && scale.is_finite(), "{name}: logits of up to {scale}");
    for precision in [None, Some(Precision::Fp32)] {
        let apart_of = |logits: &[f32]| {
            want.iter().zip(logits).fold(0.0f32, |max, (a, b)| max.max((a - b).abs()))
        };
        for matrix_unit in &matrix_units {
            let apart = apart_of(&outputs(&file, precision, *matrix_unit).0);
            let bound = if precision.is_none() { 2e-2 } else { 1e-5 };
            assert!(apart <= bound * scale, "{name}, {precision:?}, {matrix_unit}: {apart} apart");
        }
        let (logits, tokens) = outputs(&file, precision, vector_unit);
        let apart = apart_of(&logits);
        assert!(apart <= 1e-5 * scale, "{name}, {precision:?}: logits {apart} apart, of {scale}");
        assert_eq!(tokens, want_tokens, "{name}, {precision:?}");
    }
}

#[test]
fn a_file_in_blocks_gives_what_its_numbers_give() {
    for (number, (format, ..)) in FORMATS.iter().enumerate() {
        compare(&format.to_string(), false, |_| number);
    }
    assert_eq!(FORMATS.len(), BlockFormat::ALL.len());
}

#[test]
fn a_file_may_have_another_format_for_each_matrix() {
    // As files called Q4_K_M and the like have.
    compare("mixed", false, |matrix| matrix % FORMATS.len());
    compare("mixed experts", true, |matrix| 5 + matrix % 5);
}
