//! Tokens in, tokens out: the inference engine.
pub mod step;

mod error;

pub use error::Error;

pub mod block_manager;
mod chat_template;
mod detokenizer;
mod engine;
mod generation_config;
mod prompt;
mod sampler;
pub mod scheduler;
pub mod sequence;
mod tokenizer;

pub use chat_template::{ChatTemplate, Message, TemplateVariables, UserFields, UserTemplate};
pub use detokenizer::Detokenizer;
pub use engine::{
    Engine, EngineConfig, FinishReason, Finished, Request, Stats, StepOutput, Timing, model_name,
};
pub use generation_config::GenerationConfig;
pub use prompt::{Prompt, PromptFormat};
pub use sampler::{MAX_LOGPROBS, SamplingParams, TokenLogprobs};
pub use step::TokenId;
pub use tokenizer::Tokenizer;

mod attention;
mod config;
#[cfg(any(test, feature = "cuda"))]
mod cuda;
mod footprint;
mod gpu;
mod kernels;
mod kv_cache;
mod machine;
mod memory;
mod model;
mod model_files;
#[doc(hidden)]
pub mod parts;
mod precision;
pub mod quant;
mod runner;
mod weights;

pub use config::{Activation, Architecture, ExpertsConfig, LayerConfig, ModelConfig};
pub use footprint::Footprint;
pub use gpu::{Device, Gpu, GpuId, GpuUuid, UnknownDevice};
pub use kernels::Simd as InstructionSet;
pub use machine::MachineLimits;
pub use memory::available_memory;
pub use model::rope::{Rope, RopeScaling};
pub use model_files::ModelFiles;
pub use precision::{KvCacheDtype, MatrixRole, Precision, UnknownName};
pub use runner::{Logits, Runner, RunnerOptions};
pub use weights::Format;
