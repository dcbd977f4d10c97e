//! What loading a model takes: no more than the model itself and one of its tensors.

use std::fs::File;
use std::io::Write as _;

use flotilla_tests::{Workplace, repository};
use serde_json::{Value, json};

const HIDDEN: usize = 1024;
const INNER: usize = 4096;
const VOCABULARY: usize = 320;
const LAYERS: usize = 4;
const MIB: u64 = 1 << 20;

/// Names and shapes of the tensors.
fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let parts = [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.v_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
        ];
        tensors.extend(
            parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)),
        );
    }
    tensors
}

/// Writes a model of zeros, in bfloat16, without taking the room on the disk; its size.
fn write_model(place: &Workplace) -> u64 {
    let fixture = repository().join("crates/engine/tests/fixtures/llama-gqa");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        place.write(&format!("model/{name}"), std::fs::read(fixture.join(name)).unwrap());
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 8, "vocab_size": VOCABULARY,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    place.write("model/config.json", config.to_string());
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors() {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(place.path("model/model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
    end
}

#[test]
fn loading_takes_the_model_and_one_tensor() {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 1);
    let size = write_model(&place);
    assert!(size > 120 * MIB);
    place.run_expecting(
        0,
        "run --queries-file queries.jsonl --output-file results.jsonl --statistics-file s.json \
         --model-path model --max-new-tokens 1 --kv-cache-memory 8 --max-num-batched-tokens 64",
    );
    let statistics: Value = serde_json::from_str(&place.read("s.json")).unwrap();
    let peak = statistics["peak_memory_bytes"].as_u64().unwrap();
    // The largest tensor has 8 MiB; the program with its cache and threads takes some 40 MiB.
    let bound = size + 8 * MIB + 56 * MIB;
    assert!(peak > size && peak < bound, "{} MiB for a model of {} MiB", peak / MIB, size / MIB);
}
