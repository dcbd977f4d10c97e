//! Finds the documents for a query: by exact name, by a part of a name, by BM25.
//!
//! Each way is tried in turn until one finds something. What is found is put into the context in
//! that order, as much of it as the budget of tokens holds.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use shared::{Context, DocumentRef, Query, RetrievalMethod};

use crate::config::RetrievalConfig;
use crate::error::{Error, IndexError};
use crate::index::{Chain, Index};
use crate::stats::Stats;
use crate::tokens::TokenCounter;

mod bm25;
mod budget;
mod exact;
mod scope;
mod string;

use string::LowerNames;

/// Score of a document that was found by its name.
const NAMED_SCORE: f32 = 1.0;

/// Looks up contexts; shared by all threads.
pub struct Retriever {
    index: Index,
    counter: TokenCounter,
    max_documents: usize,
    max_tokens: usize,
    /// The names for [`string`], where that is asked for.
    lower_names: Option<LowerNames>,
    /// Packages and versions that were warned about: written and read by [`scope`].
    warned: Mutex<HashSet<String>>,
    /// Where lookups are counted.
    stats: Option<Arc<Stats>>,
}

/// A document that was found, by its number, with its score.
type Found = (u32, f32);

impl Retriever {
    /// Opens the index of the configured corpus, building it where there is none.
    ///
    /// Tokens are counted with a model's tokenizer (the text of its `tokenizer.json`), or
    /// estimated at four characters each.
    pub fn open(config: &RetrievalConfig, tokenizer: Option<&str>) -> Result<Self, Error> {
        config.validate()?;
        let counter = match tokenizer {
            Some(text) => TokenCounter::from_json(text)?,
            None => TokenCounter::estimate(),
        };
        let index = Index::open(config, &counter)?;
        Ok(Self {
            lower_names: config.enable_str_match.then(|| LowerNames::new(&index.catalog)),
            index,
            counter,
            max_documents: config.max_documents,
            max_tokens: config.max_tokens,
            warned: Mutex::default(),
            stats: None,
        })
    }

    /// Counts lookups and their time into `stats`.
    pub fn with_stats(self, stats: Arc<Stats>) -> Self {
        Self { stats: Some(stats), ..self }
    }

    /// Most tokens of a context.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Number of documents in the corpus.
    pub fn num_documents(&self) -> u32 {
        self.index.catalog.num_documents()
    }

    /// The context for a query. Finding nothing is no failure; an index that can't be read is.
    pub fn retrieve(&self, query: Query) -> Context {
        let start = Instant::now();
        let result = self.look_up(&query);
        let mut context = Context::empty(query);
        match result {
            Ok((method, assembled)) if !assembled.documents.is_empty() => {
                context.retrieval_method = method;
                context.context_length = assembled.text.chars().count();
                context.context = assembled.text;
                context.documents = assembled.documents;
            }
            Ok(_) => {}
            Err(error) => {
                context.success = false;
                context.error = Some(format!("retrieval failed: {}", Chain(&error)));
            }
        }
        let took = start.elapsed();
        context.retrieval_time = took.as_secs_f64();
        if let Some(stats) = &self.stats {
            stats.add_retrieval(took);
        }
        context
    }

    fn look_up(&self, query: &Query) -> Result<(RetrievalMethod, budget::Assembled), IndexError> {
        let (method, found) = self.find(query)?;
        Ok((method, self.assemble(&found)?))
    }

    fn find(&self, query: &Query) -> Result<(RetrievalMethod, Vec<Found>), IndexError> {
        let scope = self.scope(&query.dependencies);
        let target = query.target_api.as_deref().map(api_name).unwrap_or_default();
        if !target.is_empty() {
            let mut found = self.find_exact(target, &scope);
            if found.is_empty() && scope.has_missing && !scope.exact_only {
                found = self.find_exact(target, &self.whole_corpus());
            }
            if !found.is_empty() {
                return Ok((RetrievalMethod::ExactApiMatch, found));
            }
            let found = self.find_containing(target, &scope);
            if !found.is_empty() {
                return Ok((RetrievalMethod::RagStringMatch, found));
            }
        }
        let question = format!("{} {target}", query.query);
        let found = self.find_bm25(&question, &scope)?;
        Ok((RetrievalMethod::RagFallback, found))
    }

    fn reference(&self, (document, score): Found) -> DocumentRef {
        DocumentRef { path: self.index.catalog.path(document).to_owned(), score }
    }
}

/// A name as documents spell it: without quotes and a call's brackets.
fn api_name(target: &str) -> &str {
    let name = target.trim().trim_matches(['`', '"', '\'']);
    name.strip_suffix("()").unwrap_or(name).trim()
}
