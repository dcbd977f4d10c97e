//! `flotilla models`: what models are and take, or why they can't be loaded.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use engine::{ChatTemplate, Footprint, Format, ModelConfig, Precision, Tokenizer};
use serde::Serialize;

use crate::cli::ModelsOptions;
use crate::hub::{self, Need};
use crate::{FAILED, telemetry};

mod table;

/// A short sequence, beside one of the whole window.
const SHORT_SEQUENCE: usize = 1024;

/// Runs `flotilla models`.
pub(crate) fn main(options: &ModelsOptions) -> anyhow::Result<ExitCode> {
    let mut all_load = true;
    for (index, model) in options.models.iter().enumerate() {
        let view = View::of(model, || hub::find(model, &options.hub, Need::Model));
        all_load &= view.problem.is_none();
        let text = if options.json {
            serde_json::to_string(&view)? + "\n"
        } else {
            let gap = if index > 0 { "\n" } else { "" };
            gap.to_owned() + &table::table(&view)
        };
        telemetry::print(&text).context("cannot write to stdout")?;
    }
    Ok(if all_load { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// A model.
#[derive(Serialize)]
struct View {
    /// As it was named on the command line.
    model: String,
    /// Why it can't be loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shape: Option<Shape>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<Text>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
}

/// What a model looks like.
#[derive(Serialize)]
struct Shape {
    architecture: &'static str,
    parameters: u64,
    /// Numbers by the format that they are stored in; of a model without weights, none.
    stored: Vec<Stored>,
    file_bytes: u64,
    window: usize,
    /// Widths of the windows that some layers have, with the number of layers.
    sliding_windows: Vec<Sliding>,
    vocabulary: usize,
    hidden_size: usize,
    layers: usize,
    attention_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<Experts>,
}

#[derive(Serialize)]
struct Stored {
    format: &'static str,
    parameters: u64,
}

#[derive(Serialize)]
struct Sliding {
    window: usize,
    layers: usize,
}

#[derive(Serialize)]
struct Experts {
    experts: usize,
    per_token: usize,
    layers: usize,
}

/// How a model reads and writes.
#[derive(Serialize)]
struct Text {
    /// Roles that its chat template shows; none if it has no template.
    chat_roles: Option<Vec<&'static str>>,
    /// Variables of the template that `--chat-template-kwargs` can set.
    chat_variables: Vec<String>,
    /// Tokens that end an answer.
    end_tokens: Vec<EndToken>,
}

#[derive(Serialize)]
struct EndToken {
    id: u32,
    text: Option<String>,
}

/// What a model takes of this machine's memory.
#[derive(Serialize)]
struct Memory {
    /// Free memory, where the system tells.
    available_bytes: Option<u64>,
    kv_cache: Vec<KvBytes>,
    weights: Vec<Weights>,
}

#[derive(Serialize)]
struct KvBytes {
    dtype: &'static str,
    bytes_per_token: u64,
}

/// The weights at a precision.
#[derive(Serialize)]
struct Weights {
    /// None: as they are stored.
    precision: Option<&'static str>,
    bytes: u64,
    /// Sequences that fit beside them into the free memory.
    fitting: Vec<Fitting>,
}

#[derive(Serialize)]
struct Fitting {
    kv_cache_dtype: &'static str,
    tokens: usize,
    sequences: u64,
}

impl View {
    /// What can be known of a model, once it is found.
    fn of(model: &str, find: impl FnOnce() -> anyhow::Result<std::path::PathBuf>) -> Self {
        let mut view =
            Self { model: model.to_owned(), problem: None, shape: None, text: None, memory: None };
        view.problem = find().and_then(|path| view.fill(&path)).err().map(|error| {
            // One sentence, whatever the source made of it.
            format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ")
        });
        view
    }

    /// Fills in what there is; the error says why it can't be loaded.
    fn fill(&mut self, path: &Path) -> anyhow::Result<()> {
        let footprint = Footprint::open(path).inspect_err(|_error| {
            // Without usable weights, the configuration still tells much.
            let config = ModelConfig::load(path);
            if let Ok(footprint) = config.and_then(|config| Footprint::of(config, Format::Bf16)) {
                self.take(&footprint);
            }
        })?;
        self.take(&footprint);
        self.text = Some(Text::of(path)?);
        Ok(())
    }

    fn take(&mut self, footprint: &Footprint) {
        self.shape = Some(Shape::of(footprint));
        self.memory = Some(Memory::of(footprint, engine::available_memory()));
    }
}

impl Shape {
    fn of(footprint: &Footprint) -> Self {
        let config = footprint.config();
        let has_files = footprint.num_file_bytes() > 0;
        let stored = footprint.stored().into_iter().filter(|_| has_files);
        let stored =
            stored.map(|(format, parameters)| Stored { format: format.name(), parameters });
        let mut sliding_windows: Vec<Sliding> = Vec::new();
        for window in config.layers.iter().filter_map(|layer| layer.sliding_window) {
            match sliding_windows.iter_mut().find(|sliding| sliding.window == window) {
                Some(sliding) => sliding.layers += 1,
                None => sliding_windows.push(Sliding { window, layers: 1 }),
            }
        }
        Self {
            architecture: config.architecture.name(),
            parameters: footprint.num_parameters(),
            stored: stored.collect(),
            file_bytes: footprint.num_file_bytes(),
            window: config.max_position_embeddings,
            sliding_windows,
            vocabulary: config.vocab_size,
            hidden_size: config.hidden_size,
            layers: config.num_hidden_layers,
            attention_heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            experts: config.experts.map(|experts| Experts {
                experts: experts.num_experts,
                per_token: experts.num_experts_per_token,
                layers: config.layers.iter().filter(|layer| layer.experts).count(),
            }),
        }
    }
}

impl Text {
    fn of(path: &Path) -> anyhow::Result<Self> {
        let tokenizer = Tokenizer::load(path)?;
        let end_tokens = tokenizer.eos_token_ids();
        let template = ChatTemplate::load(path)?;
        let variables = template.iter().flat_map(ChatTemplate::variables);
        Ok(Self {
            chat_variables: variables.map(str::to_owned).collect(),
            chat_roles: template.map(|template| template.roles()),
            end_tokens: end_tokens.map(|id| EndToken { id, text: tokenizer.token(id) }).collect(),
        })
    }
}

impl Memory {
    fn of(footprint: &Footprint, available_bytes: Option<u64>) -> Self {
        let window = footprint.config().max_position_embeddings;
        let mut lengths = vec![SHORT_SEQUENCE, window];
        lengths.retain(|length| *length <= window);
        lengths.dedup();
        let weights = |precision: Option<Precision>| {
            let bytes = footprint.weight_bytes(precision);
            let left = available_bytes.map(|available| available.saturating_sub(bytes));
            let fitting = engine::KvCacheDtype::ALL.into_iter().flat_map(|dtype| {
                lengths.iter().filter_map(move |tokens| {
                    Some(Fitting {
                        kv_cache_dtype: dtype.name(),
                        tokens: *tokens,
                        sequences: left? / footprint.kv_bytes(dtype, *tokens),
                    })
                })
            });
            let precision = precision.map(Precision::name);
            Weights { precision, bytes, fitting: fitting.collect() }
        };
        let has_files = footprint.num_file_bytes() > 0;
        let stored = has_files.then_some(None);
        Self {
            available_bytes,
            kv_cache: engine::KvCacheDtype::ALL
                .into_iter()
                .map(|dtype| KvBytes {
                    dtype: dtype.name(),
                    bytes_per_token: footprint.kv_bytes_per_token(dtype),
                })
                .collect(),
            weights: stored.into_iter().chain(Precision::ALL.map(Some)).map(weights).collect(),
        }
    }
}
