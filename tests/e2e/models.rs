//! `flotilla models`: what models are, and what is said of those that can't be loaded.

use std::fs;

use flotilla_tests::{Workplace, repository};
use serde_json::Value;

#[test]
fn the_shipped_model_is_told_with_what_it_takes() {
    let model = repository().join("models/flotilla-reader");
    let output = Workplace::new().run(&format!("models {} --json", model.display()));
    assert!(output.status.success());
    let view: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(view["problem"], Value::Null);
    let shape = &view["shape"];
    assert_eq!(shape["architecture"], "LlamaForCausalLM");
    let config = fs::read(model.join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(shape["window"], config["max_position_embeddings"]);
    assert_eq!(shape["layers"], config["num_hidden_layers"]);
    // Its weights are bfloat16, and little else is in the file.
    let parameters = shape["parameters"].as_u64().unwrap();
    assert_eq!(shape["stored"][0]["format"], "bfloat16");
    let surplus = shape["file_bytes"].as_u64().unwrap() - 2 * parameters;
    assert!(surplus < 16_384, "{surplus} bytes");
    assert_eq!(view["text"]["end_tokens"][0]["text"], "<|end|>");
    assert!(view["text"]["chat_roles"].as_array().unwrap().contains(&"user".into()));
    let weights = view["memory"]["weights"].as_array().unwrap();
    let bytes = |precision: Value| {
        let found = weights.iter().find(|weights| weights["precision"] == precision);
        found.unwrap()["bytes"].as_u64().unwrap()
    };
    assert_eq!(bytes("fp32".into()), 4 * parameters);
    assert!(bytes("fp16".into()) < bytes("fp32".into()));
    assert!(bytes("q4_k".into()) < bytes("q8_0".into()));
    assert_eq!(bytes(Value::Null), bytes("bf16".into()));
    assert!(weights[0]["fitting"][0]["sequences"].as_u64().unwrap() > 0);
}

#[test]
fn a_model_that_cannot_be_loaded_is_told_in_one_sentence_and_the_others_are_told_too() {
    let place = Workplace::new();
    for name in ["config", "unknown", "text"] {
        fs::create_dir(place.path(name)).unwrap();
    }
    let fixture = repository().join("crates/engine/tests/fixtures/llama-mha");
    for name in ["config", "text"] {
        fs::copy(fixture.join("config.json"), place.path(name).join("config.json")).unwrap();
    }
    fs::copy(fixture.join("model.safetensors"), place.path("text").join("model.safetensors"))
        .unwrap();
    place.write("unknown/config.json", r#"{"architectures": ["BertModel"]}"#);
    let (config, unknown) = (place.path("config"), place.path("unknown"));
    let paths = [&config, &unknown, &place.path("text"), &place.path("nowhere"), &fixture];
    let paths = paths.map(|path| path.display().to_string()).join(" ");
    let output = place.run(&format!("models --json {paths}"));
    assert_eq!(output.status.code(), Some(1));
    let views: Vec<Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let problems: Vec<&str> =
        views.iter().map(|view| view["problem"].as_str().unwrap_or_default()).collect();
    assert!(problems[0].contains("model.safetensors"), "{}", problems[0]);
    // What the configuration tells is told all the same.
    assert!(views[0]["shape"]["parameters"].as_u64().unwrap() > 10_000);
    assert!(problems[1].contains("BertModel"), "{}", problems[1]);
    assert!(problems[2].contains("no tokenizer.json"), "{}", problems[2]);
    assert!(problems[3].contains("is not a model"), "{}", problems[3]);
    assert_eq!(problems[4], "");
    assert!(problems.iter().all(|problem| !problem.contains('\n')));
    let output = place.run(&format!("models {paths}"));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("can't be loaded").count(), 4, "{text}");
    assert_eq!(text.matches("  architecture   LlamaForCausalLM").count(), 3, "{text}");
}
