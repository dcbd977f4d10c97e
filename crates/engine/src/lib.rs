//! Tokens in, tokens out: the inference engine.
pub mod step;

mod error;

pub use error::Error;
