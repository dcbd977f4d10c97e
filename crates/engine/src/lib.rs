//! Tokens in, tokens out: the inference engine.
pub mod step;
