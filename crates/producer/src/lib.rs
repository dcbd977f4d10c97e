//! Queries in, contexts and jobs out.
//!
//! [`source`] reads queries (or finished contexts) from a file of any size, from standard input or
//! from a file that grows; [`listen`] takes them over HTTP. [`corpus`] reads the documentation,
//! [`Retriever`] finds for each query the documents that answer it, out of an [`index`] that is
//! built once and kept. [`publish()`] puts jobs on a queue, whichever it is. Nothing here knows
//! about models, save for the tokenizer that counts the budget of a context.

pub mod bench;
mod config;
pub mod corpus;
mod error;
mod index;
mod known;
mod lines;
pub mod listen;
mod publish;
mod read_ahead;
pub mod retrieve;
pub mod source;
mod stats;
mod tokens;

pub use config::{CorpusType, EmbeddingSource, FollowConfig, RetrievalConfig, SourceConfig};
pub use error::Error;
pub use known::{Known, MAX_ASKED};
pub use listen::{ListenConfig, ListenError, Server};
pub use publish::{JobTemplate, PublishError, Published, Publisher, publish};
pub use retrieve::Retriever;
pub use source::{BadInput, Contexts, contexts, contexts_from, count, follow};
pub use stats::{Snapshot, Stats};
pub use tokens::TokenCounter;
