//! Tokens in, tokens out: the inference engine.
pub mod step;

mod error;

pub use error::Error;

pub mod block_manager;
mod chat_template;
mod detokenizer;
mod engine;
mod prompt;
mod sampler;
pub mod scheduler;
pub mod sequence;
mod tokenizer;

pub use chat_template::{ChatTemplate, Message, UserFields, UserTemplate};
pub use detokenizer::Detokenizer;
pub use engine::{
    Engine, EngineConfig, FinishReason, Finished, Request, Stats, StepOutput, Timing, model_name,
};
pub use prompt::{Prompt, PromptFormat};
pub use sampler::{SampleError, SamplingParams, sample};
pub use step::TokenId;
pub use tokenizer::Tokenizer;

mod attention;
mod config;
mod kernels;
mod kv_cache;
mod model;
mod runner;
mod weights;

pub use config::ModelConfig;
pub use model::rope::{Rope, RopeScaling};
pub use runner::{Logits, Runner, RunnerOptions};
