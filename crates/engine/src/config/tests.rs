//! What a config.json means, field by field.

use super::*;
use crate::model::rope::RopeScaling;

fn base() -> Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "eos_token_id": 2
    })
}

#[expect(clippy::needless_pass_by_value, reason = "called with literals")]
fn with(changes: Value) -> Result<ModelConfig, Error> {
    let mut config = base();
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    ModelConfig::parse(&config.to_string())
}

#[test]
fn left_out_fields_have_their_defaults() {
    let config = with(serde_json::json!({})).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim), (4, 16));
    assert_eq!(config.ropes[0], Rope { dim: 16, theta: 10_000.0, scaling: RopeScaling::None });
    assert_eq!(config.eos_token_ids, [2]);
    assert!(!config.tie_word_embeddings && !config.qkv_bias);
}

#[test]
fn both_dialects_of_rope_mean_the_same() {
    let scaling = serde_json::json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64
    });
    let old = with(serde_json::json!({"rope_theta": 5e5, "rope_scaling": scaling})).unwrap();
    let mut parameters = scaling;
    parameters["rope_theta"] = 5e5.into();
    let new = with(serde_json::json!({"rope_parameters": parameters})).unwrap();
    assert_eq!(old, new);
    assert_eq!(old.ropes[0].theta, 5e5);
    let linear =
        with(serde_json::json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap();
    assert_eq!(linear.ropes[0].scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn what_older_and_bare_configs_say_is_understood() {
    let config = with(serde_json::json!({"pad_token_id": -1, "eos_token_id": [2, 3]})).unwrap();
    assert_eq!((config.pad_token_id, &*config.eos_token_ids), (None, &[2, 3][..]));
    let bare = with(serde_json::json!({"architectures": ["LlamaModel"]})).unwrap();
    assert_eq!(bare.architecture, Architecture::Llama);
    let other = with(serde_json::json!({"architectures": ["LlamaForSequenceClassification"]}));
    assert!(other.unwrap_err().to_string().contains("LlamaForSequenceClassification"));
    for (name, activation) in [
        ("gelu_fast", Activation::GeluTanh),
        ("quick_gelu", Activation::QuickGelu),
        ("relu", Activation::Relu),
    ] {
        let config = with(serde_json::json!({"hidden_act": name})).unwrap();
        assert_eq!(config.activation, activation);
    }
}

/// A config with nothing but the class's name and these fields.
fn sparse(class: &str, fields: &Value) -> Result<ModelConfig, Error> {
    let mut config = serde_json::json!({"architectures": [class], "num_hidden_layers": 3});
    for (name, value) in fields.as_object().unwrap() {
        config[name] = value.clone();
    }
    ModelConfig::parse(&config.to_string())
}

#[test]
fn each_class_has_its_own_defaults() {
    let read = |class| sparse(class, &serde_json::json!({})).unwrap();
    let windows = |config: &ModelConfig| -> Vec<Option<usize>> {
        config.layers.iter().map(|layer| layer.sliding_window).collect()
    };
    let llama = read("LlamaForCausalLM");
    assert_eq!((llama.hidden_size, llama.head_dim, llama.num_key_value_heads), (4096, 128, 32));
    assert_eq!((llama.bos_token_id, &*llama.eos_token_ids), (Some(1), &[2][..]));
    let mistral = read("MistralForCausalLM");
    assert_eq!((windows(&mistral), mistral.num_key_value_heads), (vec![Some(4096); 3], 8));
    let mixtral = read("MixtralForCausalLM");
    assert_eq!((windows(&mixtral), mixtral.ropes[0].theta), (vec![None; 3], 1e6));
    let qwen2 = read("Qwen2ForCausalLM");
    assert!(qwen2.qkv_bias && !qwen2.attention_output_bias && qwen2.eos_token_ids.is_empty());
    assert_eq!(windows(&qwen2), [None; 3]);
    let qwen3 = read("Qwen3ForCausalLM");
    assert!(qwen3.qk_norm && !qwen3.qkv_bias && qwen3.head_dim == 128);
    let phi3 = read("Phi3ForCausalLM");
    assert_eq!((phi3.head_dim, phi3.rms_norm_eps, phi3.eos_token_ids), (96, 1e-5, vec![32_000]));
    let gemma2 = read("Gemma2ForCausalLM");
    assert!(gemma2.tie_word_embeddings && gemma2.sandwich_norms && !gemma2.qk_norm);
    assert_eq!((gemma2.attention_softcap, gemma2.output_softcap), (Some(50.0), Some(30.0)));
    assert_eq!((gemma2.head_dim, gemma2.attention_scale), (256, 0.0625));
    assert_eq!(windows(&gemma2), [Some(4096), None, Some(4096)]);
    let gemma3 = read("Gemma3ForCausalLM");
    assert!(gemma3.tie_word_embeddings && gemma3.qk_norm && gemma3.norm_offset == 1.0);
    assert_eq!((gemma3.attention_softcap, gemma3.output_softcap), (None, None));
    assert_eq!(windows(&gemma3), [Some(4096); 3]);
    assert_eq!([gemma3.ropes[0].theta, gemma3.ropes[1].theta], [1e6, 1e4]);
    assert_eq!(gemma3.architecture.name(), "Gemma3ForCausalLM");
}

#[test]
fn null_takes_a_default_away() {
    let fields = serde_json::json!({"sliding_window": null, "eos_token_id": null});
    let mistral = sparse("MistralForCausalLM", &fields).unwrap();
    assert!(mistral.layers.iter().all(|layer| layer.sliding_window.is_none()));
    assert!(mistral.eos_token_ids.is_empty());
    let fields = serde_json::json!({"final_logit_softcapping": null, "head_dim": 12});
    let gemma2 = sparse("Gemma2ForCausalLM", &fields).unwrap();
    assert_eq!((gemma2.output_softcap, gemma2.head_dim), (None, 12));
}

#[test]
fn layers_are_local_or_global_as_either_dialect_says() {
    let windows = |class, fields| -> Vec<usize> {
        let config = sparse(class, &fields).unwrap();
        let layers = config.layers.iter();
        layers.map(|layer| layer.sliding_window.unwrap_or(0) + 100 * layer.rope).collect()
    };
    let types = ["sliding_attention", "full_attention", "sliding_attention"];
    let old = serde_json::json!({"sliding_window": 7, "sliding_window_pattern": 2});
    let new = serde_json::json!({"sliding_window": 7, "layer_types": types});
    assert_eq!(windows("Gemma3ForCausalLM", old), [107, 0, 107]);
    assert_eq!(windows("Gemma3ForCausalLM", new.clone()), [107, 0, 107]);
    assert_eq!(windows("Gemma2ForCausalLM", new), [7, 0, 7]);
    let qwen = serde_json::json!({
        "use_sliding_window": true, "sliding_window": 7, "max_window_layers": 2,
    });
    assert_eq!(windows("Qwen2ForCausalLM", qwen.clone()), [0, 0, 7]);
    assert_eq!(windows("Qwen3MoeForCausalLM", qwen), [7, 7, 7]);
}

#[test]
fn text_of_a_model_with_images_is_read_from_its_own_object() {
    let config = sparse(
        "Gemma3ForConditionalGeneration",
        &serde_json::json!({
            "model_type": "gemma3", "eos_token_id": [1, 106], "vision_config": {"hidden_size": 8},
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 6,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        }),
    )
    .unwrap();
    assert_eq!(
        (config.hidden_size, config.num_hidden_layers, config.vocab_size),
        (2560, 6, 262_208)
    );
    assert_eq!(config.eos_token_ids, [1, 106]);
    assert_eq!(config.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(config.ropes[1].scaling, RopeScaling::None);
}

#[test]
fn longrope_has_its_factors_and_its_length() {
    let factors = vec![1.5; 36];
    let fields = serde_json::json!({
        "max_position_embeddings": 131_072, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "su", "short_factor": factors, "long_factor": factors},
    });
    let config = sparse("Phi3ForCausalLM", &fields).unwrap();
    assert_eq!((config.ropes[0].dim, config.long_context_beyond()), (72, Some(4096)));
    let RopeScaling::Longrope { attention_factor, .. } = config.ropes[0].scaling else {
        panic!("{:?}", config.ropes);
    };
    assert!((attention_factor - 1.190_238).abs() < 1e-6, "{attention_factor}");
}

#[test]
fn what_is_wrong_is_named() {
    let cases = [
        (
            serde_json::json!({"architectures": ["GPT2LMHeadModel"]}),
            "GPT2LMHeadModel is not supported",
        ),
        (serde_json::json!({"hidden_act": "mish"}), "hidden_act"),
        (serde_json::json!({"hidden_size": 63}), "not a multiple"),
        (serde_json::json!({"hidden_size": "64"}), "hidden_size is \"64\""),
        (serde_json::json!({"model_type": "gemma2"}), "model_type is gemma2"),
        (
            serde_json::json!({
                "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "layer_types": 3,
            }),
            "layer_types",
        ),
        (
            serde_json::json!({"architectures": ["Gemma2ForCausalLM"], "sliding_window": null}),
            "no sliding_window",
        ),
        (
            serde_json::json!({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": true}),
            "use_bidirectional_attention",
        ),
        (
            serde_json::json!({
                "architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"rope_type": "default"},
            }),
            "expected full_attention and sliding_attention",
        ),
        (
            serde_json::json!({
                "rope_parameters": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5},
            }),
            "partial_rotary_factor",
        ),
        (serde_json::json!({"vocab_size": 0}), "vocab_size is 0"),
        (serde_json::json!({"vocab_size": 1e18}), "vocab_size"),
        (serde_json::json!({"num_hidden_layers": 100_000}), "num_hidden_layers"),
        (serde_json::json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        (serde_json::json!({"head_dim": 15}), "expected an even number"),
        (serde_json::json!({"rms_norm_eps": -1}), "rms_norm_eps"),
        (serde_json::json!({"rope_scaling": {"rope_type": "longrope"}}), "short_factor is null"),
        (serde_json::json!({"rope_scaling": {"rope_type": "su"}}), "rope_type is \"su\""),
        (
            serde_json::json!({"rope_scaling": {"rope_type": "linear"}}),
            "rope_scaling.factor is missing",
        ),
        (serde_json::json!({"rope_scaling": 4}), "expected an object"),
        (serde_json::json!({"eos_token_id": "x"}), "eos_token_id"),
        (serde_json::json!({"quantization_config": {"bits": 4}}), "quantized"),
    ];
    for (changes, want) in cases {
        let error = with(changes.clone()).unwrap_err().to_string();
        assert!(error.contains(want), "{changes}: {error}");
    }
    assert!(ModelConfig::parse("[1]").unwrap_err().to_string().contains("JSON object"));
}
