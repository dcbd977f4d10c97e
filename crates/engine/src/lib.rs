//! Tokens in, tokens out: the inference engine.
pub mod step;

mod error;

pub use error::Error;

pub mod block_manager;
pub mod sampler;
pub mod scheduler;
pub mod sequence;

pub use sampler::SamplingParams;

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
