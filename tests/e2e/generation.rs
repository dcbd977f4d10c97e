//! Settings of generation: on the query's line, on the command line, from the model, in this order.

use std::collections::BTreeMap;

use flotilla_tests::{Workplace, repository};
use serde_json::{Value, json};

const RUN: &str = "run --queries-file queries.jsonl --output-file";

fn query(id: &str, generation: &Value) -> Value {
    json!({"id": id, "query": "What does numpy.sort do?", "generation": generation})
}

fn write(place: &Workplace, queries: &[Value]) {
    let lines: Vec<String> = queries.iter().map(|query| format!("{query}\n")).collect();
    place.write("queries.jsonl", lines.concat());
}

/// The lines of an output by their ids, without what takes its time.
fn lines(place: &Workplace, name: &str) -> BTreeMap<String, Value> {
    let timeless = place.lines(name).into_iter().map(|mut line| {
        let fields = line.as_object_mut().unwrap();
        for varying in ["retrieval_time", "inference_time", "total_time", "worker_rank"] {
            fields.remove(varying).unwrap();
        }
        (fields["id"].as_str().unwrap().to_owned(), line)
    });
    timeless.collect()
}

#[test]
fn what_a_query_says_comes_before_the_command_line() {
    let place = Workplace::new();
    let long = json!({"max_tokens": 30, "ignore_eos": true});
    write(
        &place,
        &[
            query("plain", &Value::Null),
            query("short", &json!({"max_tokens": 3})),
            query("long", &long),
            query("stopped", &json!({"max_tokens": 30, "stop": "e"})),
            query("hot", &json!({"temperature": 3.0, "top_p": 1, "seed": 5})),
            query("forced", &json!({"logit_bias": {"300": 1000}, "ignore_eos": true})),
            query("scored", &json!({"logprobs": true, "top_logprobs": 2})),
            json!({"id": "nested", "target_dependency": {}, "generation": {"max_tokens": 5, "ignore_eos": true},
                "queries": [{"query": "a?"}, {"query": "b?", "generation": {"max_tokens": 2}}]}),
        ],
    );
    let examples = repository().join("examples");
    let corpus = format!("--corpus-path {}/corpus", examples.display());
    let options = "--temperature 0 --max-new-tokens 8";
    place.run_expecting(0, &format!("{RUN} one.jsonl {corpus} {options}"));
    let one = lines(&place, "one.jsonl");
    let tokens = |id: &str| one[id]["completion_tokens"].as_u64().unwrap();
    assert!(tokens("plain") <= 8);
    let counts = ["short", "long", "forced", "nested#0", "nested#1"].map(tokens);
    assert_eq!(counts, [3, 30, 8, 5, 2]);
    let answer = |id: &str| one[id]["answer"].as_str().unwrap();
    assert!(!answer("stopped").contains('e'));
    assert_ne!(answer("hot"), answer("plain"));
    assert_eq!(one["hot"]["seed"], 5);
    assert_eq!(answer("scored"), answer("plain"));

    // Each token with its log-probability; without being asked for there is no such field.
    assert!(one["plain"].get("logprobs").is_none());
    let scored = one["scored"]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(scored.len() as u64, tokens("scored"));
    let mut text = String::new();
    for entry in scored {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        // Greedy: the likeliest token is the chosen one.
        for field in ["token", "token_id", "logprob"] {
            assert_eq!(top[0][field], entry[field]);
        }
        assert!(top[1]["logprob"].as_f64() <= entry["logprob"].as_f64());
        text += entry["token"].as_str().unwrap();
    }
    assert!(text.trim_start().starts_with(answer("scored")), "{text}");

    // The same from options, from contexts made first, and for each query alone.
    let queries = "--queries-file queries.jsonl --output-file contexts.jsonl";
    place.run_expecting(0, &format!("contexts {queries} {corpus}"));
    let staged = "run --contexts-file contexts.jsonl --output-file staged.jsonl --batch-size 1";
    place.run_expecting(0, &format!("{staged} {options}"));
    assert_eq!(lines(&place, "staged.jsonl"), one);
    write(&place, &[query("long", &Value::Null)]);
    place.run_expecting(
        0,
        &format!("{RUN} options.jsonl {corpus} --temperature 0 --max-new-tokens 30 --ignore-eos"),
    );
    assert_eq!(lines(&place, "options.jsonl")["long"], one["long"]);
}

#[test]
fn a_wrong_setting_is_its_own_lines_failure() {
    let place = Workplace::new();
    let rows = [
        (json!({"temperature": -1}), "temperature: expected a number of at least 0, given -1"),
        (json!({"max_new_tokens": 0}), "whole number from 1 to 10000000, given 0"),
        (json!({"max_tokens": 1_000_000_000}), "given 1000000000"),
        (json!({"top_p": 0}), "top_p: expected a number above 0"),
        (json!({"tempreature": 1}), "given `tempreature`"),
        (json!("greedy"), "expected an object, given a text"),
        // Only the worker knows the vocabulary.
        (json!({"logit_bias": {"4000000": 1}}), "4000000 is outside of the vocabulary"),
        (json!({"max_tokens": 2, "min_tokens": 1, "ignore_eos": true}), ""),
    ];
    let queries: Vec<Value> = rows
        .iter()
        .enumerate()
        .map(|(number, (generation, _))| query(&number.to_string(), generation))
        .collect();
    write(&place, &queries);
    place.run_expecting(3, &format!("{RUN} results.jsonl --max-new-tokens 4"));
    let lines = lines(&place, "results.jsonl");
    assert_eq!(lines.len(), rows.len());
    for (number, (_, reason)) in rows.iter().enumerate() {
        let line = &lines[&number.to_string()];
        assert_eq!(line["success"], reason.is_empty(), "{line}");
        assert!(line["error"].as_str().unwrap_or_default().contains(reason), "{line}");
    }
}

#[test]
fn variables_of_the_chat_template_come_from_the_line_and_the_command_line() {
    let place = Workplace::new();
    copy_model(&place);
    // As Qwen 3 has it.
    place.write(
        "model/chat_template.jinja",
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\
         {% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}\
         {{ style | default('') }}{% endif %}",
    );
    let off = json!({"enable_thinking": false});
    write(
        &place,
        &[
            query("silent", &Value::Null),
            query("off", &json!({"chat_template_kwargs": off})),
            query("on", &json!({"chat_template_kwargs": {"enable_thinking": true}})),
            query("short", &json!({"chat_template_kwargs": {"style": "short"}})),
            query("wrong", &json!({"chat_template_kwargs": {"messages": []}})),
        ],
    );
    let run = |output: &str, more: &str, input: &str| {
        let command = format!(
            "run {input} --output-file {output} --model-path model --temperature 0 --max-new-tokens 2 {more}"
        );
        place.run_expecting(3, &command);
        let lines = lines(&place, output);
        let error = lines["wrong"]["error"].as_str().unwrap();
        assert!(error.contains("flotilla doesn't set itself, given messages"), "{error}");
        ["silent", "off", "on", "short"].map(|id| lines[id]["prompt_sha256"].clone())
    };
    let queries = "--queries-file queries.jsonl";
    let [silent, off, on, short] = run("plain.jsonl", "", queries);
    assert_eq!(silent, on);
    assert!(off != on && short != on && short != off);
    // An option stands for what a line doesn't say, variable by variable.
    let option = r#"--chat-template-kwargs {"enable_thinking":false}"#;
    let [silent_off, still_off, still_on, short_off] = run("option.jsonl", option, queries);
    assert_eq!((&silent_off, &still_off, &still_on), (&off, &off, &on));
    assert!(short_off != short && short_off != off);
    let corpus = repository().join("examples/corpus");
    let queries = format!("{queries} --corpus-path {}", corpus.display());
    place.run_expecting(3, &format!("contexts {queries} --output-file contexts.jsonl"));
    let staged = run("staged.jsonl", option, "--contexts-file contexts.jsonl");
    assert_eq!(staged, run("direct.jsonl", option, &queries));
    let output = place.run("models model");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("its variables  enable_thinking, style"), "{text}");
}

fn copy_model(place: &Workplace) {
    let model = place.path("model");
    std::fs::create_dir(&model).unwrap();
    let shipped = repository().join("models/flotilla-reader");
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(shipped.join(name), model.join(name)).unwrap();
    }
}

#[test]
fn the_models_own_settings_hold_where_nothing_else_is_said() {
    let place = Workplace::new();
    copy_model(&place);
    place.write(
        "model/generation_config.json",
        r#"{"do_sample": false, "eos_token_id": 2, "max_new_tokens": 6, "temperature": 2.5, "top_p": 1.0}"#,
    );
    write(
        &place,
        &[
            query("a", &json!({"ignore_eos": true})),
            query("b", &json!({"ignore_eos": true, "max_tokens": 3})),
        ],
    );
    let run = |output: &str, more: &str| {
        place.run_expecting(0, &format!("{RUN} {output} --model-path model {more}"));
        let lines = lines(&place, output);
        let parts = |id: &str| {
            let line = &lines[id];
            (line["completion_tokens"].as_u64().unwrap(), line["answer"].clone())
        };
        (parts("a"), parts("b"))
    };
    let (a, b) = run("model.jsonl", "");
    assert_eq!((a.0, b.0), (6, 3));
    assert_eq!(
        run("same.jsonl", "--temperature 2.5 --top-p 1 --max-new-tokens 6"),
        (a.clone(), b.clone())
    );
    let greedy = run("greedy.jsonl", "--temperature 0");
    assert_eq!((greedy.0.0, greedy.1.0), (6, 3));
    assert_ne!(greedy.0.1, a.1, "the model's temperature was not used");
    let (plain, _) = run("plain.jsonl", "--generation-config none");
    assert_eq!(plain.0, 512);
    let (said, _) = run("said.jsonl", "--temperature 0.2 --top-p 0.95 --max-new-tokens 512");
    assert_eq!(plain, said);
}
