//! What a model can be loaded from: folders and GGUF files, as people have them, and damaged ones.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/driver.rs"]
mod driver;
#[path = "../common/synthetic.rs"]
#[expect(dead_code, reason = "only its random numbers are needed")]
mod synthetic;

mod blocks;
mod folders;
mod gguf;
