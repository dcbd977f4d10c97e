//! The tokenizer files that a GGUF file stands for: `tokenizer.json` and what lies beside it.
//!
//! Two kinds of vocabulary are known: SentencePiece's pieces with scores (`llama`), and byte-level BPE with merges
//! (`gpt2`), whose rule for cutting a text into words is named and not written out in the file.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::Settings;
use crate::Error;

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";

/// What kinds of tokens are numbered in a file.
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// How texts are cut into words, by what the rule is known as.
const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Control tokens that end an answer whatever else the file names: files of chat models often name only the
/// token that ends a document.
const ENDS: [&str; 8] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<EOT>",
];

/// A vocabulary with what is known of its tokens.
struct Vocabulary<'a> {
    settings: Settings<'a>,
    tokens: Vec<&'a str>,
    types: Vec<f64>,
}

/// A rule for byte-level BPE.
struct WordRule {
    pattern: &'static str,
    /// Whether each digit is a word of its own, before the pattern.
    splits_digits: bool,
    /// Whether a word that is a token needs no merges.
    ignores_merges: bool,
    /// Whether texts are brought to Unicode's composed form.
    composes: bool,
    /// Whether texts begin with the first token unless the file says otherwise.
    adds_bos: bool,
}

impl<'a> Vocabulary<'a> {
    fn read(settings: Settings<'a>) -> Result<Self, Error> {
        let tokens = settings.texts(TOKENS)?.ok_or_else(|| settings.missing(TOKENS))?;
        let key = "tokenizer.ggml.token_type";
        let types = settings.numbers(key)?.unwrap_or_default();
        if !types.is_empty() && types.len() != tokens.len() {
            return Err(settings.wrong(&format!(
                "has {} entries of {key} for {} tokens",
                types.len(),
                tokens.len()
            )));
        }
        Ok(Self { settings, tokens, types })
    }

    fn is(&self, id: usize, kind: f64) -> bool {
        self.types.get(id) == Some(&kind)
    }

    /// The token that a setting names by its id.
    fn named(&self, name: &str) -> Result<Option<(usize, &'a str)>, Error> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.settings.unsigned(&key)? else { return Ok(None) };
        let id = usize::try_from(id).unwrap_or(usize::MAX);
        // Files have ids like 4294967295 for tokens that there aren't.
        Ok(self.tokens.get(id).map(|token| (id, *token)))
    }

    /// Tokens that are looked for before a text is cut into words.
    fn added_tokens(&self) -> Json {
        let named = |id: usize| {
            json!({
                "id": id,
                "content": self.tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": !self.is(id, USER_DEFINED),
            })
        };
        let added = |id: &usize| {
            [CONTROL, USER_DEFINED, UNKNOWN].iter().any(|kind| self.is(*id, *kind))
                && !self.tokens[*id].is_empty()
        };
        Json::Array((0..self.tokens.len()).filter(added).map(named).collect())
    }

    /// Tokens with their ids. Of a token that comes twice, the first counts.
    fn ids(&self) -> serde_json::Map<String, Json> {
        let mut ids = serde_json::Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            ids.entry(*token).or_insert_with(|| json!(id));
        }
        ids
    }

    /// What is put around a text when special tokens are asked for.
    fn post_processor(&self, adds_bos: bool) -> Result<Json, Error> {
        let setting =
            |name: &str| self.settings.boolean(&format!("tokenizer.ggml.add_{name}_token"));
        let bos = setting("bos")?.unwrap_or(adds_bos).then(|| self.named("bos")).transpose()?;
        let eos = setting("eos")?.unwrap_or(false).then(|| self.named("eos")).transpose()?;
        let (bos, eos) = (bos.flatten(), eos.flatten());
        if bos.is_none() && eos.is_none() {
            return Ok(Json::Null);
        }
        let special =
            |token: &(usize, &str)| json!({"SpecialToken": {"id": token.1, "type_id": 0}});
        let template = |sequences: &[&str]| -> Json {
            let mut pieces = Vec::new();
            for sequence in sequences {
                pieces.extend(bos.iter().map(special));
                pieces.push(json!({"Sequence": {"id": sequence, "type_id": 0}}));
                pieces.extend(eos.iter().map(special));
            }
            Json::Array(pieces)
        };
        let tokens: serde_json::Map<_, _> = bos
            .iter()
            .chain(&eos)
            .map(|(id, token)| {
                ((*token).to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}))
            })
            .collect();
        Ok(json!({
            "type": "TemplateProcessing",
            "single": template(&["A"]),
            "pair": template(&["A", "B"]),
            "special_tokens": tokens,
        }))
    }
}

/// Writes `tokenizer.json`.
pub(super) fn tokenizer(settings: &Settings<'_>) -> Result<Json, Error> {
    let vocabulary = Vocabulary::read(*settings)?;
    let kind = settings.text(MODEL)?.ok_or_else(|| settings.missing(MODEL))?;
    let mut parts = match kind {
        "llama" => pieces(&vocabulary)?,
        "gpt2" => byte_level(&vocabulary)?,
        other => {
            return Err(settings.wrong(&format!(
                "has a tokenizer of the kind {other}, which is not supported, expected llama or gpt2"
            )));
        }
    };
    parts["version"] = json!("1.0");
    parts["truncation"] = Json::Null;
    parts["padding"] = Json::Null;
    parts["added_tokens"] = vocabulary.added_tokens();
    Ok(parts)
}

/// SentencePiece's way: spaces are written as `▁`, and the two neighbours that make the piece with the best score
/// are joined, again and again.
fn pieces(vocabulary: &Vocabulary<'_>) -> Result<Json, Error> {
    let settings = vocabulary.settings;
    let key = "tokenizer.ggml.scores";
    let scores = settings.numbers(key)?.ok_or_else(|| settings.missing(key))?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(settings.wrong(&format!(
            "has {} entries of {key} for {} tokens",
            scores.len(),
            vocabulary.tokens.len()
        )));
    }
    let adds_space = settings.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let prepend = json!({"type": "Prepend", "prepend": "\u{2581}"});
    let normalizers = if adds_space { vec![prepend, replace] } else { vec![replace] };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if adds_space {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = match vocabulary.named("unknown")? {
        Some((_, token)) => Some(token),
        None => (0..vocabulary.tokens.len())
            .find(|id| vocabulary.is(*id, UNKNOWN))
            .map(|id| vocabulary.tokens[id]),
    };
    Ok(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": vocabulary.post_processor(true)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary.ids(),
            "merges": merges(vocabulary, &scores),
        },
    }))
}

/// Every way to make a piece of two others, the best pieces first.
fn merges(vocabulary: &Vocabulary<'_>, scores: &[f64]) -> Vec<[String; 2]> {
    let tokens = &vocabulary.tokens;
    let mut ids: HashMap<&str, usize> = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        ids.entry(token).or_insert(id);
    }
    let is_text = |id: usize| ![UNKNOWN, CONTROL].iter().any(|kind| vocabulary.is(id, *kind));
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| is_text(*id)) {
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(left), Some(right)) = (ids.get(left), ids.get(right)) {
                merges.push((id, *left, *right));
            }
        }
    }
    merges.sort_by(|a, b| {
        let by_score = scores[b.0].total_cmp(&scores[a.0]);
        by_score.then(a.0.cmp(&b.0)).then((a.1, a.2).cmp(&(b.1, b.2)))
    });
    let text = |id: usize| tokens[id].to_owned();
    merges.into_iter().map(|(_, left, right)| [text(left), text(right)]).collect()
}

/// Byte-level BPE: each byte is written as a letter, and pairs are joined in the order of the merges.
fn byte_level(vocabulary: &Vocabulary<'_>) -> Result<Json, Error> {
    let settings = vocabulary.settings;
    let key = "tokenizer.ggml.merges";
    let merges = settings.texts(key)?.ok_or_else(|| settings.missing(key))?;
    let merges: Vec<_> = merges
        .iter()
        .map(|merge| merge.split_once(' ').map(|(left, right)| [left, right]))
        .collect::<Option<_>>()
        .ok_or_else(|| settings.wrong(&format!("has {key} that are not two tokens each")))?;
    let rule = word_rule(&settings)?;
    let mut steps = Vec::new();
    if rule.splits_digits {
        steps.push(json!({"type": "Digits", "individual_digits": true}));
    }
    steps.push(json!({
        "type": "Split",
        "pattern": {"Regex": rule.pattern},
        "behavior": "Isolated",
        "invert": false,
    }));
    steps.push(json!({
        "type": "ByteLevel",
        "add_prefix_space": settings.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(false),
        "trim_offsets": false,
        "use_regex": false,
    }));
    let normalizer = if rule.composes { json!({"type": "NFC"}) } else { Json::Null };
    Ok(json!({
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": vocabulary.post_processor(rule.adds_bos)?,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": true,
            "use_regex": true,
        },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": rule.ignores_merges,
            "vocab": vocabulary.ids(),
            "merges": merges,
        },
    }))
}

/// The rule that the file names.
fn word_rule(settings: &Settings<'_>) -> Result<WordRule, Error> {
    let plain = WordRule {
        pattern: GPT_2,
        splits_digits: false,
        ignores_merges: false,
        composes: false,
        adds_bos: false,
    };
    Ok(match settings.text("tokenizer.ggml.pre")?.unwrap_or("default") {
        "default" | "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" => plain,
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" => {
            WordRule { pattern: LLAMA_3, ignores_merges: true, adds_bos: true, ..plain }
        }
        "dbrx" | "smaug-bpe" | "chatglm-bpe" | "glm4" => WordRule { pattern: LLAMA_3, ..plain },
        "qwen2" | "deepseek-r1-qwen" | "hunyuan" | "megrez" => {
            WordRule { pattern: QWEN_2, composes: true, ..plain }
        }
        "stablelm2" => WordRule { pattern: QWEN_2, ..plain },
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
            WordRule { splits_digits: true, ..plain }
        }
        "tekken" => WordRule { pattern: TEKKEN, ignores_merges: true, adds_bos: true, ..plain },
        "gpt-4o" | "llama4" => WordRule { pattern: GPT_4O, ..plain },
        other => {
            return Err(settings.wrong(&format!(
                "cuts texts into words by the rule {other} (tokenizer.ggml.pre), which is not known"
            )));
        }
    })
}

/// Writes `tokenizer_config.json`: the chat template, and the tokens that it can name.
pub(super) fn tokenizer_config(settings: &Settings<'_>) -> Result<Json, Error> {
    let vocabulary = Vocabulary::read(*settings)?;
    let mut config = json!({"chat_template": settings.text("tokenizer.chat_template")?});
    for (field, name) in [
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("pad_token", "padding"),
    ] {
        config[field] = json!(vocabulary.named(name)?.map(|(_, token)| token));
    }
    Ok(config)
}

/// Writes `generation_config.json`: every token that ends an answer.
pub(super) fn generation_config(settings: &Settings<'_>) -> Result<Json, Error> {
    let vocabulary = Vocabulary::read(*settings)?;
    let mut ends = Vec::new();
    for name in ["eos", "eot", "eom"] {
        ends.extend(vocabulary.named(name)?.map(|(id, _)| id));
    }
    let is_end = |id: &usize| vocabulary.is(*id, CONTROL) && ENDS.contains(&vocabulary.tokens[*id]);
    ends.extend((0..vocabulary.tokens.len()).filter(is_end));
    ends.sort_unstable();
    ends.dedup();
    Ok(json!({"eos_token_id": ends}))
}
