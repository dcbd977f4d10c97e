//! The main job: a file of queries, a corpus and a model give one answer a query.

use std::collections::BTreeMap;

use flotilla_tests::{Workplace, repository};
use serde_json::Value;

/// The command of the README, over the examples.
fn demo(output: &str, more: &str) -> String {
    let examples = repository().join("examples");
    let examples = examples.display();
    format!(
        "run --queries-file {examples}/queries.jsonl --corpus-path {examples}/corpus \
         --output-file {output} --temperature 0 {more}"
    )
}

/// What of a line must not depend on who computed it, by id.
fn answers(place: &Workplace, name: &str) -> BTreeMap<String, Value> {
    let lines = place.lines(name).into_iter().map(|mut line| {
        let fields = line.as_object_mut().unwrap();
        for varying in ["retrieval_time", "inference_time", "total_time", "worker_rank"] {
            fields.remove(varying).unwrap();
        }
        (fields["id"].as_str().unwrap().to_owned(), line)
    });
    lines.collect()
}

#[test]
fn examples_are_answered_from_their_documentation() {
    let place = Workplace::new();
    place.run_expecting(0, &demo("results.jsonl", ""));
    let lines = place.lines("results.jsonl");
    assert!(lines.len() >= 10);
    let mut exact = 0;
    let mut right = 0;
    for line in &lines {
        assert_eq!(line["success"], true, "{line}");
        let context = line["context"].as_str().unwrap();
        assert_eq!(line["context_length"], context.chars().count(), "{line}");
        assert_eq!(line["attempts"], 1);
        assert_eq!(line["prompt_sha256"].as_str().unwrap().len(), 64);
        assert!(line["completion_tokens"].as_u64().unwrap() > 0, "{line}");
        if line["retrieval_method"] == "exact_api_match" {
            exact += 1;
            right += usize::from(context.contains(line["answer"].as_str().unwrap()));
        }
    }
    // The model reads: a wrong cache or mask would give text that is in no document.
    assert!(
        exact >= 5 && right * 10 >= exact * 8,
        "{right} of {exact} answers are in their context"
    );
}

#[test]
fn answers_do_not_depend_on_workers_batches_or_the_cache() {
    let place = Workplace::new();
    place.run_expecting(0, &demo("one.jsonl", ""));
    let one = answers(&place, "one.jsonl");
    for (name, more) in [
        ("workers", "--workers 2"),
        ("alone", "--batch-size 1"),
        ("chunked", "--max-num-batched-tokens 32"),
        ("uncached", "--no-prefix-caching --threads 1"),
        ("squeezed", "--kv-cache-memory 24"),
    ] {
        let output = format!("{name}.jsonl");
        place.run_expecting(0, &demo(&output, more));
        assert_eq!(answers(&place, &output), one, "{name}");
    }
}

#[test]
fn sampled_answers_repeat_with_the_seed_and_change_with_it() {
    let place = Workplace::new();
    let sampled = |output: &str, more: &str| {
        place.run_expecting(
            0,
            &(demo(output, "") + " --max-new-tokens 16 " + more)
                .replace("--temperature 0", "--temperature 1.5 --top-p 1"),
        );
        answers(&place, output)
    };
    let one = sampled("one.jsonl", "--seed 1");
    assert_eq!(sampled("same.jsonl", "--seed 1 --batch-size 2"), one);
    let other = sampled("other.jsonl", "--seed 2");
    let changed = one.iter().filter(|(id, line)| other[*id]["answer"] != line["answer"]).count();
    assert!(changed > one.len() / 2, "{changed}");
}

#[test]
fn contexts_made_first_give_the_same_answers() {
    let place = Workplace::new();
    place.run_expecting(0, &demo("direct.jsonl", ""));
    let examples = repository().join("examples");
    let examples = examples.display();
    place.run_expecting(
        0,
        // The underscores of the older scripts.
        &format!("contexts --queries_file {examples}/queries.jsonl --corpus_path {examples}/corpus --output_file contexts.jsonl"),
    );
    place.run_expecting(
        0,
        "run --contexts_file contexts.jsonl --output_file staged.jsonl --temperature 0",
    );
    assert_eq!(answers(&place, "staged.jsonl"), answers(&place, "direct.jsonl"));
}

#[test]
fn prompt_template_and_system_prompt_change_the_prompt() {
    let place = Workplace::new();
    place.write("template.jinja", "{{ id }}: {{ query }}");
    place.run_expecting(0, &demo("plain.jsonl", "--max-new-tokens 1"));
    place.run_expecting(
        0,
        &demo("own.jsonl", "--max-new-tokens 1 --prompt-template template.jinja"),
    );
    let (plain, own) = (answers(&place, "plain.jsonl"), answers(&place, "own.jsonl"));
    for (id, line) in &plain {
        assert_ne!(line["prompt_sha256"], own[id]["prompt_sha256"]);
        assert!(line["prompt_tokens"].as_u64() > own[id]["prompt_tokens"].as_u64());
    }
}

#[test]
fn queries_can_come_through_a_pipe() {
    let place = Workplace::new();
    place.write_queries("queries.jsonl", 40);
    let run = "run --queries-file /dev/stdin --output-file results.jsonl --max-new-tokens 2";
    let queries = std::fs::File::open(place.path("queries.jsonl")).unwrap();
    let mut cat = std::process::Command::new("cat")
        .stdin(queries)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let piped = cat.stdout.take().unwrap();
    let status = place.command(run).stdin(piped).status().unwrap();
    assert!(status.success() && cat.wait().unwrap().success());
    place.assert_each_once("results.jsonl", 40);
}
