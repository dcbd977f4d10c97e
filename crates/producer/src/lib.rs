//! Queries in, contexts and jobs out.
//!
//! [`source`] reads queries (or finished contexts) from a file of any size, [`corpus`] reads the
//! documentation, [`Retriever`] finds for each query the documents that answer it, out of an
//! [`index`] that is built once and kept. Nothing here knows about queues or models, save for the
//! tokenizer that counts the budget of a context.

pub mod bench;
mod config;
pub mod corpus;
mod error;
mod index;
mod lines;
mod publish;
pub mod retrieve;
pub mod source;
mod tokens;

pub use config::{CorpusType, EmbeddingSource, RetrievalConfig, SourceConfig};
pub use error::Error;
pub use publish::{JobTemplate, Published, publish};
pub use retrieve::Retriever;
pub use source::{BadInput, Contexts, contexts, count};
pub use tokens::TokenCounter;
