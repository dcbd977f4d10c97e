//! GGUF files: the same model, tokens and prompts as the folder that they were made from; and files that are
//! damaged or lie about themselves.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::driver::{Sequence, argmax, generate, run};
use flotilla_engine::step::TokenId;
use flotilla_engine::{
    ChatTemplate, Engine, EngineConfig, Message, ModelConfig, Runner, RunnerOptions, Tokenizer,
    model_name,
};
use serde_json::Value;

fn fixtures(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The GGUF files below the fixtures, with the folders that they were made from.
fn pairs(folder: &str) -> Vec<(PathBuf, PathBuf)> {
    let files = std::fs::read_dir(fixtures(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut pairs: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .map(|path| (path.with_extension(""), path))
        .collect();
    assert!(!pairs.is_empty());
    pairs.sort();
    pairs
}

fn load(path: &Path) -> Runner {
    let options = RunnerOptions { max_num_batched_tokens: 256, ..RunnerOptions::default() };
    let mut runner = Runner::load(path, &options).unwrap();
    runner.allocate_kv_cache(32).unwrap();
    runner
}

fn prompt(case: &Value) -> Vec<TokenId> {
    let ids = case["prompt"].as_array().unwrap();
    ids.iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
}

#[test]
fn logits_and_greedy_tokens_are_those_of_the_folder() {
    for (folder, file) in pairs("") {
        let (mut own, mut other) = (load(&folder), load(&file));
        for case in json(&folder.join("expected.json"))["prompts"].as_array().unwrap() {
            let [want, got] = [&mut own, &mut other].map(|runner| {
                let mut sequence = Sequence::contiguous(prompt(case), 0, 256).of(runner);
                let logits = run(runner, &mut sequence, 256).remove(0);
                sequence.push(argmax(&logits));
                (logits, generate(runner, &mut [&mut sequence], 63).remove(0))
            });
            let name = file.display();
            let scale = want.0.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let error =
                want.0.iter().zip(&got.0).fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
            assert!(error <= 1e-5 * scale, "{name}: the logits are {error} apart, of {scale}");
            assert_eq!(want.1, got.1, "{name}");
        }
    }
}

#[test]
fn quantised_tensors_are_as_close_as_their_blocks_are() {
    let tokens: Vec<TokenId> = (5..70).collect();
    let [want, q8_0, q4_0] =
        ["llama-gqa", "quant/llama-gqa-Q8_0.gguf", "quant/llama-gqa-Q4_0.gguf"].map(|path| {
            let mut sequence = Sequence::contiguous(tokens.clone(), 0, 80);
            run(&mut load(&fixtures(path)), &mut sequence, 256).remove(0)
        });
    let error = |got: &[f32]| {
        let squares: f32 = want.iter().zip(got).map(|(a, b)| (a - b).powi(2)).sum();
        let all: f32 = want.iter().map(|x| x.powi(2)).sum();
        (squares / all).sqrt()
    };
    let (small, large) = (error(&q8_0), error(&q4_0));
    assert!(small > 0.0 && small < 0.03 && large < 0.5, "Q8_0 is {small} off, Q4_0 {large}");
    assert!(small * 3.0 < large, "Q8_0 is {small} off, Q4_0 {large}");
}

#[test]
fn an_answer_is_that_of_the_folder() {
    for (folder, file) in pairs("") {
        let engine = |model_path: &Path| {
            let model_path = model_path.to_owned();
            let config = EngineConfig {
                model_path,
                threads: 1,
                kv_cache_memory_bytes: Some(1 << 20),
                ..EngineConfig::default()
            };
            Engine::load(&config).unwrap()
        };
        let (own, other) = (engine(&folder), engine(&file));
        assert_eq!(own.model_name(), other.model_name());
        for user in ["Sort the array!", "  数据 🙂\n\n1234", "</s> <s>[assistant]"] {
            let [want, got] =
                [&own, &other].map(|engine| engine.prompt_format().render(Some("Be brief."), user));
            assert_eq!(want.unwrap(), got.unwrap(), "{}", file.display());
        }
        let [want, got] = [&own, &other].map(|engine| {
            let tokenizer = engine.tokenizer();
            (tokenizer.eos_token_ids().collect::<Vec<_>>(), tokenizer.encode("a b", true).unwrap())
        });
        assert_eq!(want, got, "{}", file.display());
    }
}

#[test]
fn text_becomes_the_tokens_of_the_original_tokenizer() {
    for (folder, file) in pairs("tokenizers") {
        let tokenizer = Tokenizer::load(&file).unwrap();
        let name = file.display();
        let cases = json(&folder.join("expected.json"));
        for case in cases["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = |field: &str| -> Option<Vec<TokenId>> {
                let ids = case[field].as_array()?;
                Some(ids.iter().map(|id| id.as_u64().unwrap() as TokenId).collect())
            };
            let expected = ids("ids").unwrap();
            assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{name}: {text:?}");
            if let Some(with_special) = ids("ids_with_special") {
                assert_eq!(tokenizer.encode(text, true).unwrap(), with_special, "{name}: {text:?}");
            }
            assert_eq!(tokenizer.decode(&expected).unwrap(), case["decoded"], "{name}: {text:?}");
        }
    }
}

#[test]
fn a_model_is_named_after_its_file_or_its_place_in_the_cache() {
    assert_eq!(model_name(&fixtures("llama-gqa.gguf")), "llama-gqa");
    assert_eq!(model_name(&fixtures("llama-gqa")), "llama-gqa");
    let cache = tempfile::tempdir().unwrap();
    let snapshot = cache.path().join("models--org--Some-1B/snapshots/0123456789abcdef");
    std::fs::create_dir_all(&snapshot).unwrap();
    assert_eq!(model_name(&snapshot), "Some-1B");
    // A link in the cache leads to a file without a name.
    std::fs::write(cache.path().join("blob"), "").unwrap();
    std::os::unix::fs::symlink("../../../blob", snapshot.join("some-q8_0.gguf")).unwrap();
    assert_eq!(model_name(&snapshot.join("some-q8_0.gguf")), "some-q8_0");
}

/// What is said when this is loaded as a GGUF file.
fn error(bytes: &[u8]) -> String {
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let options = RunnerOptions { max_num_batched_tokens: 16, ..RunnerOptions::default() };
    let error = match Runner::load(file.path(), &options) {
        Err(error) => error.to_string(),
        Ok(_) => Tokenizer::load(file.path()).unwrap_err().to_string(),
    };
    assert!(error.contains(file.path().to_str().unwrap()), "{error}");
    error
}

fn gqa() -> Vec<u8> {
    std::fs::read(fixtures("llama-gqa.gguf")).unwrap()
}

/// The file with some bytes, found by what is before them, in place of others.
fn changed(after: &str, skip: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = gqa();
    let at = file.windows(after.len()).position(|window| window == after.as_bytes()).unwrap();
    let at = at + after.len() + skip;
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

#[test]
fn a_file_that_ends_early_is_named() {
    let whole = gqa();
    let lens = (0..40).chain((40..whole.len()).step_by(997)).chain([whole.len() - 1]);
    for len in lens {
        let error = error(&whole[..len]);
        assert!(
            error.contains("GGUF") || error.contains("cut short") || error.contains("behind"),
            "{len}: {error}"
        );
    }
}

#[test]
fn what_a_file_says_of_itself_is_checked_before_it_is_believed() {
    let version = |number: u32| changed("GGUF", 0, &number.to_le_bytes());
    let huge = u64::MAX.to_le_bytes();
    let key = "llama.attention.head_count_kv";
    for (bytes, expected) in [
        (b"PK\x03\x04 an archive".to_vec(), "expected the letters GGUF"),
        (version(1), "version 1 of GGUF, expected 2 or 3"),
        (version(3 << 24), "for big-endian machines"),
        (changed("GGUF", 4, &huge), "dimensions, expected 1 to 4"),
        (changed("GGUF", 12, &huge), "cut short or damaged"),
        (changed("general.architecture", 4, &huge), "cut short or damaged"),
        (
            changed("general.architecture", 12, b"mamba"),
            "the architecture mamba, which is not supported",
        ),
        (changed("tokenizer.ggml.merges", 8, &huge), "cut short or damaged"),
        (changed("tokenizer.ggml.merges", 4, &77u32.to_le_bytes()), "the unknown type 77"),
        (changed("tokenizer.ggml.merges", 4, &9u32.to_le_bytes()), "lists of lists"),
        (changed(key, 0, &8u32.to_le_bytes()), "head_count_kv"),
        (changed(key, 4, &0u32.to_le_bytes()), "no heads"),
        (changed(key, 4, &3u32.to_le_bytes()), "head"),
        (changed("llama.block_count", 4, &7u32.to_le_bytes()), "model.layers.2."),
        (changed("tokenizer.ggml.model", 12, b"bert"), "a tokenizer of the kind bert"),
        (changed("tokenizer.ggml.pre", 12, b"gpt-X"), "by the rule gpt-X"),
        (changed("blk.0.attn_q.weight", 0, &9u32.to_le_bytes()), "9 dimensions, expected 1 to 4"),
        (changed("blk.0.attn_q.weight", 4, &huge), "attn_q.weight"),
        (changed("blk.0.attn_q.weight", 4, &64u64.to_le_bytes()), "expected [32, 32]"),
        (changed("blk.0.attn_q.weight", 20, &16u32.to_le_bytes()), "in IQ2_XXS, which is not read"),
        (changed("blk.0.attn_q.weight", 20, &12u32.to_le_bytes()), "rows are multiples of 256"),
        (changed("blk.0.attn_q.weight", 24, &huge), "attn_q.weight"),
        (changed("blk.0.attn_q.weight", 24, &1u64.to_le_bytes()), "expected a multiple of 32"),
    ] {
        let error = error(&bytes);
        assert!(error.contains(expected), "expected {expected}: {error}");
    }
}

#[test]
fn no_damage_of_the_header_is_more_than_an_error() {
    let whole = gqa();
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    std::fs::write(file.path(), &whole).unwrap();
    let last_name = whole.windows(4).rposition(|window| window == b"blk.").unwrap();
    for at in 0..last_name + 64 {
        for byte in [0, 0xff, whole[at] ^ 0x10] {
            file.as_file().write_all_at(&[byte], at as u64).unwrap();
            drop(ModelConfig::load(file.path()));
            if at % 16 == 0 {
                drop(Tokenizer::load(file.path()));
                drop(ChatTemplate::load(file.path()));
            }
        }
        file.as_file().write_all_at(&whole[at..=at], at as u64).unwrap();
    }
    ModelConfig::load(file.path()).unwrap();
}

#[test]
fn a_model_in_several_files_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let part = |number: usize| folder.path().join(format!("m-{number:05}-of-00002.gguf"));
    let parts = split(&gqa());
    std::fs::write(part(1), &parts[0]).unwrap();
    let error = |path: &Path| ModelConfig::load(path).unwrap_err().to_string();
    assert!(error(&part(1)).contains("m-00002-of-00002.gguf"), "{}", error(&part(1)));
    std::fs::write(part(2), &parts[1]).unwrap();
    assert!(error(&part(2)).contains("give the path of the first"), "{}", error(&part(2)));
    let tokens: Vec<TokenId> = (5..40).collect();
    let [want, got] = [fixtures("llama-gqa.gguf"), part(1)].map(|path| {
        let mut sequence = Sequence::contiguous(tokens.clone(), 0, 64);
        run(&mut load(&path), &mut sequence, 256).remove(0)
    });
    assert_eq!(want, got);
}

/// A file cut into two as llama.cpp does: each with the number of parts, the settings in the first, the tensors
/// in both.
fn split(whole: &[u8]) -> [Vec<u8>; 2] {
    let header = |num_tensors: u64, num_settings: u64| {
        [&b"GGUF"[..], &3u32.to_le_bytes(), &num_tensors.to_le_bytes(), &num_settings.to_le_bytes()]
            .concat()
    };
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let count =
        [text("split.count"), 2u32.to_le_bytes().to_vec(), 2u16.to_le_bytes().to_vec()].concat();
    let number = |at: usize| u64::from_le_bytes(whole[at..at + 8].try_into().unwrap());
    let (num_tensors, num_settings) = (number(8), number(16));
    // Where the first tensor's name begins: the length of the first name is right before it.
    let names = |name: &str| {
        let at = whole.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
        at - 8
    };
    let infos_at =
        names("token_embd.weight").min(names("output_norm.weight")).min(names("output.weight"));
    let infos_at = infos_at.min(names("blk.0.attn_q.weight"));
    let settings = &whole[24..infos_at];
    let mut at = infos_at;
    let mut infos = Vec::new();
    for _ in 0..num_tensors {
        let name_len = number(at) as usize;
        let dims = u32::from_le_bytes(whole[at + 8 + name_len..][..4].try_into().unwrap()) as usize;
        let end = at + 8 + name_len + 4 + 8 * dims + 4 + 8;
        infos.push(whole[at..end].to_vec());
        at = end;
    }
    let data = &whole[at.next_multiple_of(32)..];
    let make = |infos: &[Vec<u8>], head: Vec<u8>| {
        let mut file = [head, infos.concat()].concat();
        file.resize(file.len().next_multiple_of(32), 0);
        [&file, data].concat()
    };
    let (left, right) = infos.split_at(infos.len() / 2);
    let first =
        [header(left.len() as u64, num_settings + 1), settings.to_vec(), count.clone()].concat();
    let second = [header(right.len() as u64, 1), count].concat();
    [make(left, first), make(right, second)]
}

#[test]
fn special_tokens_and_the_template_come_from_the_file() {
    let template = ChatTemplate::load(&fixtures("llama-gqa.gguf")).unwrap().unwrap();
    let messages = [Message { role: "user", content: "hi" }];
    assert_eq!(template.render(&messages, true).unwrap(), "<s>[user] hi\n[assistant] ");
    let tokenizer = Tokenizer::load(&fixtures("llama-gqa.gguf")).unwrap();
    assert!(tokenizer.is_eos(2) && tokenizer.is_special(1) && !tokenizer.is_special(60));
}
