//! What models are and take, as the engine says without loading them: against the known sizes of published models,
//! and against what it then takes for checkpoints of the same structure.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::path::Path;

use flotilla_engine::{
    Engine, EngineConfig, Footprint, Format, KvCacheDtype, ModelConfig, Precision, Request, Runner,
    RunnerOptions, SamplingParams, StepOutput,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value};

fn fixtures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Published models: their names, `config.json`s and known numbers.
fn published() -> Map<String, Value> {
    let text = std::fs::read_to_string(fixtures().join("published.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn config(model: &Value) -> ModelConfig {
    ModelConfig::parse(&model["config"].to_string()).unwrap()
}

#[test]
fn published_models_have_their_known_sizes() {
    for (name, model) in published() {
        let footprint = Footprint::of(config(&model), Format::Bf16).unwrap();
        let parameters = model["parameters"].as_u64().unwrap();
        assert_eq!(footprint.num_parameters(), parameters, "{name}");
        assert_eq!(footprint.config().max_position_embeddings as u64, model["window"], "{name}");
        for (precision, bits) in [
            (Precision::Fp32, 32.0),
            (Precision::Fp16, 16.0),
            (Precision::Bf16, 16.0),
            (Precision::Q8_0, 8.5),
            (Precision::Q6K, 6.6),
            (Precision::Q4K, 4.9),
        ] {
            let bytes = footprint.weight_bytes(Some(precision)) as f64;
            let per_weight = 8.0 * bytes / parameters as f64;
            // Rows of Gemma 3 are no whole blocks of 256: most are kept in 8 bits.
            let most =
                if name == "gemma-3-1b-it" { f64::max(1.06 * bits, 8.1) } else { 1.06 * bits };
            let range = 0.94 * bits..most;
            assert!(range.contains(&per_weight), "{name} {precision}: {per_weight}");
        }
        let stored = footprint.weight_bytes(None);
        let bf16 = footprint.weight_bytes(Some(Precision::Bf16));
        // Routers, which are small, are kept in fp32 at every precision.
        let has_routers = footprint.config().experts.is_some();
        assert_eq!(bf16 > stored, has_routers, "{name}");
        assert!(bf16 - stored < stored / 1000, "{name}");
    }
}

#[test]
fn published_models_take_their_known_memory() {
    let footprint = |name: &str| Footprint::of(config(&published()[name]), Format::F16).unwrap();
    // 32 layers of 8 key and 8 value heads of 128.
    let mistral = footprint("Mistral-7B-Instruct-v0.2");
    assert_eq!(mistral.kv_bytes_per_token(KvCacheDtype::Fp16), 131_072);
    assert_eq!(mistral.kv_bytes(KvCacheDtype::Fp16, 32_768), 4 << 30);
    assert_eq!(mistral.kv_bytes(KvCacheDtype::Fp32, 1), 16 * 262_144);
    assert_eq!(mistral.weight_bytes(Some(Precision::Fp32)), 4 * 7_241_732_096);
    let llama = footprint("Llama-2-7b-chat-hf");
    assert_eq!(llama.kv_bytes_per_token(KvCacheDtype::Fp32), 32 * 2 * 4096 * 4);
    // The norms are kept in 32 bits.
    assert_eq!(llama.weight_bytes(None), 2 * 6_738_415_616 + 2 * (65 * 4096));
    // A tied embedding is there once.
    let qwen = footprint("Qwen2.5-Math-1.5B-Instruct");
    assert_eq!(qwen.weight_bytes(Some(Precision::Fp32)), 4 * 1_543_714_304);
}

/// The configuration with the same flags and small numbers.
fn scaled_down(config: &Value) -> Value {
    let mut config = config.clone();
    let has_groups = config["num_key_value_heads"] != config["num_attention_heads"];
    let kv_heads = match config["num_key_value_heads"].as_u64().unwrap() {
        1 => 1,
        _ if has_groups => 2,
        _ => 4,
    };
    let small = [
        ("hidden_size", 256),
        ("intermediate_size", 512),
        ("moe_intermediate_size", 256),
        ("num_hidden_layers", 7),
        ("num_attention_heads", 4),
        ("num_key_value_heads", kv_heads),
        ("head_dim", 32),
        ("vocab_size", 384),
        ("max_position_embeddings", 256),
        ("original_max_position_embeddings", 256),
        ("sliding_window", 24),
        ("max_window_layers", 3),
        ("query_pre_attn_scalar", 32),
        ("num_experts", 4),
        ("num_local_experts", 4),
        ("num_experts_per_tok", 2),
        ("eos_token_id", 1),
        ("bos_token_id", 0),
        ("pad_token_id", 0),
    ];
    for (name, number) in small {
        if config.get(name).is_some_and(|value| !value.is_null()) {
            config[name] = number.into();
        }
    }
    if config["rope_scaling"].is_object() {
        config["rope_scaling"]["original_max_position_embeddings"] = 64.into();
    }
    config
}

/// Writes a checkpoint of a configuration, with random weights.
fn write_checkpoint(folder: &Path, config: &Value) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::copy(fixtures().join("chat/tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    let parsed = ModelConfig::parse(&config.to_string()).unwrap();
    let footprint = Footprint::of(parsed, Format::F32).unwrap();
    let (dtype, encode): (_, fn(f32) -> Vec<u8>) = match config["torch_dtype"].as_str().unwrap() {
        "bfloat16" => (Dtype::BF16, |x| half::bf16::from_f32(x).to_le_bytes().to_vec()),
        "float16" => (Dtype::F16, |x| half::f16::from_f32(x).to_le_bytes().to_vec()),
        _ => (Dtype::F32, |x| x.to_le_bytes().to_vec()),
    };
    let mut state = 1_u32;
    let mut random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from((state >> 16) as u16) / 65_536.0 - 0.5
    };
    let tensors: HashMap<String, (Vec<usize>, Vec<u8>)> = footprint
        .tensors()
        .map(|(name, shape)| {
            let scale = 3.0 / (*shape.last().unwrap() as f32).sqrt();
            let numbers = (0..shape.iter().product()).flat_map(|_| encode(random() * scale));
            (name.to_owned(), (shape.to_vec(), numbers.collect()))
        })
        .collect();
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name.as_str(), TensorView::new(dtype, shape.clone(), bytes).unwrap())
    });
    let path = folder.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
}

/// Greedy tokens of a prompt.
fn answer(folder: &Path) -> Vec<u32> {
    let model_path = folder.to_owned();
    let config = EngineConfig { model_path, threads: 1, ..EngineConfig::default() };
    let mut engine = Engine::load(&config).unwrap();
    let sampling =
        SamplingParams { max_new_tokens: 40, temperature: 0.0, ..SamplingParams::default() };
    let prompt = (20..60).collect();
    engine.add(Request { id: 1, prompt, sampling }).unwrap();
    loop {
        match engine.step().unwrap().pop() {
            Some(StepOutput::Finished(finished)) => return finished.token_ids,
            Some(StepOutput::Failed { reason, .. }) => panic!("{reason}"),
            None => {}
        }
    }
}

#[test]
fn models_of_published_structure_run_and_take_what_was_said() {
    for (name, model) in published() {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), &scaled_down(&model["config"]));
        let footprint = Footprint::open(folder.path()).unwrap();
        let load = |precision, kv_cache_dtype| {
            let kv_cache_dtype = Some(kv_cache_dtype);
            let options = RunnerOptions { precision, kv_cache_dtype, ..RunnerOptions::default() };
            Runner::load(folder.path(), &options).unwrap()
        };
        for precision in [None].into_iter().chain(Precision::ALL.map(Some)) {
            let runner = load(precision, KvCacheDtype::Fp32);
            let said = footprint.weight_bytes(precision);
            assert_eq!(runner.weight_bytes(), said, "{name} {precision:?}");
        }
        for dtype in KvCacheDtype::ALL {
            let block = load(None, dtype).kv_bytes_per_block() as u64;
            assert_eq!(block, footprint.kv_bytes(dtype, 16), "{name} {dtype}");
        }
        let token_ids = answer(folder.path());
        assert!(!token_ids.is_empty() && token_ids.iter().all(|id| *id < 384), "{name}");
        assert_eq!(token_ids, answer(folder.path()), "{name}");
    }
}

#[test]
fn every_fixture_takes_what_was_said() {
    let mut num_models = 0;
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let path = entry.unwrap().path();
        if !path.join("config.json").is_file() {
            continue;
        }
        num_models += 1;
        let footprint = Footprint::open(&path).unwrap();
        let file_bytes: u64 = std::fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
            .map(|path| path.metadata().unwrap().len())
            .sum();
        assert_eq!(footprint.num_file_bytes(), file_bytes, "{}", path.display());
        let options =
            RunnerOptions { threads: 1, max_num_batched_tokens: 16, ..RunnerOptions::default() };
        let runner = Runner::load(&path, &options).unwrap();
        assert_eq!(runner.weight_bytes(), footprint.weight_bytes(None), "{}", path.display());
    }
    assert!(num_models > 10);
}

#[test]
fn a_checkpoint_that_lacks_a_tensor_is_known_without_loading_it() {
    let folder = tempfile::tempdir().unwrap();
    let source = fixtures().join("llama-tied");
    for entry in std::fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["num_hidden_layers"] = 3.into();
    std::fs::write(&path, config.to_string()).unwrap();
    let error = Footprint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("model.layers.2.input_layernorm.weight"), "{error}");
}
