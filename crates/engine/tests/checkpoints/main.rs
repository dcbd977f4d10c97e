//! What a model can be loaded from: folders and GGUF files, as people have them, and damaged ones.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/driver.rs"]
mod driver;
mod folders;
mod gguf;
