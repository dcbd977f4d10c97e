//! The messages that flotilla's roles exchange, from a query to its outcome.
//!
//! One noun a stage: [`Query`] → [`Context`] → [`Job`] → [`Outcome`]. A `Job` carries the whole
//! context and an `Outcome` carries it back, so that the collector needs nothing but the outcome
//! to write the line. The line itself belongs to the collector.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::generation::{self, Generation};

/// Version of the wire format. A worker leaves a job with a version it doesn't know to a newer one.
pub const WIRE_VERSION: u16 = 1;

/// The user's own id of a query. Any non-empty text; never part of a queue subject.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub String);

impl JobId {
    /// First 16 bytes of the id's SHA-256: what deduplication keeps instead of the id.
    pub fn digest(&self) -> IdDigest {
        IdDigest(truncated_sha256(&[self.0.as_bytes()]))
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The 16 bytes that stand for a [`JobId`] wherever very many ids are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IdDigest(pub [u8; 16]);

/// Name of a run: a set of jobs with one output.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(pub String);

/// Packages a query is about, each with the version it asks for, or `None` for any version.
pub type Dependencies = BTreeMap<String, Option<String>>;

/// One query, checked: the id isn't empty and every field has the right type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Query {
    /// The user's id.
    pub id: JobId,
    /// The question itself.
    pub query: String,
    /// Path of the API that the question is about, such as `numpy.argsort`.
    pub target_api: Option<String>,
    /// Packages and versions to search.
    pub dependencies: Dependencies,
    /// What the query itself says about how it is answered.
    #[serde(default, skip_serializing_if = "Generation::is_empty")]
    pub generation: Generation,
}

impl Query {
    /// A question that says nothing more.
    pub fn new(id: JobId, query: String) -> Self {
        Self {
            id,
            query,
            target_api: None,
            dependencies: Dependencies::new(),
            generation: Generation::default(),
        }
    }
}

/// How a context was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetrievalMethod {
    /// `target_api` is the path or an alias of a document.
    ExactApiMatch,
    /// The path or an alias of the documents contains the name.
    RagStringMatch,
    /// BM25 over the packages and versions that the query names.
    RagFallback,
    /// Nothing was found, or nothing was searched.
    None,
}

/// A document that went into a context.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DocumentRef {
    /// The document's path in the corpus, such as `numpy.argsort`.
    pub path: String,
    /// BM25 score, or 1 for an exact or string match.
    pub score: f32,
}

/// A query with what retrieval found for it; as JSON, one line of a contexts file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Context {
    /// The user's id.
    pub id: JobId,
    /// The question itself.
    pub query: String,
    /// Path of the API that the question is about.
    #[serde(default)]
    pub target_api: Option<String>,
    /// Packages and versions searched.
    #[serde(default)]
    pub dependencies: Dependencies,
    /// How the context was found.
    pub retrieval_method: RetrievalMethod,
    /// The text that goes into the prompt; empty if nothing was found.
    pub context: String,
    /// Length of `context` in characters (Unicode scalar values).
    pub context_length: usize,
    /// Seconds that retrieval took.
    pub retrieval_time: f64,
    /// Whether retrieval worked. Finding nothing is not a failure.
    pub success: bool,
    /// Why it failed, where it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The documents in `context`, in its order.
    #[serde(default)]
    pub documents: Vec<DocumentRef>,
    /// What the query itself says about how it is answered; moves into the job.
    #[serde(default, skip_serializing_if = "Generation::is_empty")]
    pub generation: Generation,
}

impl Context {
    /// A context without documents, for a query that nothing was found for.
    pub fn empty(query: Query) -> Self {
        Self {
            id: query.id,
            query: query.query,
            target_api: query.target_api,
            dependencies: query.dependencies,
            retrieval_method: RetrievalMethod::None,
            context: String::new(),
            context_length: 0,
            retrieval_time: 0.0,
            success: true,
            error: None,
            documents: Vec::new(),
            generation: query.generation,
        }
    }

    /// The context of a query that could not be read or retrieved for; its job fails with `error`.
    pub fn failed(id: JobId, query: String, error: String) -> Self {
        Self { success: false, error: Some(error), ..Self::empty(Query::new(id, query)) }
    }
}

/// The seed of one job: the same for a run's seed and an id, whichever worker computes it.
///
/// 63 bits, so that it survives readers of JSON with signed 64-bit integers.
pub fn job_seed(run_seed: u64, id: &JobId) -> u64 {
    let digest = truncated_sha256(&[&run_seed.to_le_bytes(), id.0.as_bytes()]);
    let (head, _) = digest.split_at(8);
    head.iter().fold(0_u64, |seed, &byte| seed << 8 | u64::from(byte)) >> 1
}

/// What a worker is asked to do: answer one query.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Wire version, [`WIRE_VERSION`].
    pub version: u16,
    /// The run it belongs to.
    pub run: RunId,
    /// The query and its context.
    pub context: Context,
    /// Template of the user message; `None` for the model's own, or flotilla's.
    pub prompt_template: Option<String>,
    /// System prompt.
    pub system_prompt: Option<String>,
    /// How to generate; the seed is the job's own.
    #[serde(with = "generation::wire")]
    pub generation: Generation,
}

impl Job {
    /// The user's id.
    pub fn id(&self) -> &JobId {
        &self.context.id
    }

    /// The seed of its random numbers.
    pub fn seed(&self) -> u64 {
        self.generation.seed.unwrap_or_default()
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-text token or a stop text.
    Stop,
    /// `max_new_tokens`, or the end of the model's window.
    Length,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Completed {
    /// The generated text.
    pub answer: String,
    /// Why generation ended.
    pub finish_reason: FinishReason,
    /// Tokens of the rendered prompt.
    pub prompt_tokens: u32,
    /// Tokens generated, an end-of-text token included.
    pub completion_tokens: u32,
    /// SHA-256 of the prompt's text, in hexadecimal.
    pub prompt_sha256: String,
    /// Whether the context was cut to fit the model's window.
    pub context_truncated: bool,
    /// Log-probabilities of the generated tokens, where the job asks for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Logprobs>,
}

/// Log-probabilities of an answer's tokens, in the shape of OpenAI's chat completions: the model's own, before
/// bias, penalties and temperature.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// One entry for each generated token, an end-of-text token and those of a stop text included.
    pub content: Vec<GeneratedToken>,
}

/// A generated token and those that were most likely in its place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GeneratedToken {
    /// The token.
    #[serde(flatten)]
    pub token: TokenLogprob,
    /// The most likely tokens, as many as asked for, most likely first.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A token with its log-probability.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Its text; U+FFFD stands for bytes that are no whole character.
    pub token: String,
    /// Its number in the vocabulary.
    pub token_id: u32,
    /// Natural logarithm of its probability, at least -9999.
    pub logprob: f32,
}

/// What became of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// It was answered.
    Completed(Completed),
    /// It can't be answered; the reason.
    Failed(String),
}

/// A job's outcome on the wire, with all that its output line needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settled {
    /// Wire version, [`WIRE_VERSION`].
    pub version: u16,
    /// The run it belongs to.
    pub run: RunId,
    /// The query and its context.
    pub context: Context,
    /// Name of the model that answered; `None` if it never became a job.
    pub model: Option<String>,
    /// The job's seed.
    pub seed: u64,
    /// Worker that settled it.
    pub worker_rank: u32,
    /// Deliveries it took, 1 for a job that was never redelivered; 0 if it never became a job.
    pub attempts: u32,
    /// Seconds from its delivery to its outcome: rendering, waiting for a slot, inference.
    pub inference_time: f64,
    /// What became of it.
    pub outcome: Outcome,
}

fn truncated_sha256(parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    let full = hasher.finalize();
    let mut digest = [0; 16];
    digest.copy_from_slice(&full[..16]);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_differ_by_id_and_run_and_repeat() {
        let (a, b) = (JobId("a".into()), JobId("b".into()));
        assert_eq!(job_seed(7, &a), job_seed(7, &a));
        assert_ne!(job_seed(7, &a), job_seed(7, &b));
        assert_ne!(job_seed(7, &a), job_seed(8, &a));
        assert!(job_seed(7, &a) <= i64::MAX as u64);
    }

    #[test]
    fn outcomes_with_and_without_logprobs_are_read_by_newer_and_older_collectors() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct OldCompleted {
            answer: String,
            finish_reason: FinishReason,
            prompt_tokens: u32,
            completion_tokens: u32,
            prompt_sha256: String,
            context_truncated: bool,
        }
        let token = |token: &str, token_id, logprob| TokenLogprob {
            token: token.to_owned(),
            token_id,
            logprob,
        };
        let entry = GeneratedToken {
            token: token("a", 1, -0.1),
            top_logprobs: vec![token("a", 1, -0.1), token("\u{fffd}", 2, -9999.0)],
        };
        let completed = Completed {
            answer: "a".to_owned(),
            finish_reason: FinishReason::Stop,
            prompt_tokens: 3,
            completion_tokens: 1,
            prompt_sha256: "ab".to_owned(),
            context_truncated: false,
            logprobs: Some(Logprobs { content: vec![entry] }),
        };
        let bytes = rmp_serde::to_vec_named(&completed).unwrap();
        assert_eq!(rmp_serde::from_slice::<Completed>(&bytes).unwrap(), completed);
        let old: OldCompleted = rmp_serde::from_slice(&bytes).unwrap();
        assert_eq!(old.answer, "a");
        let bytes = rmp_serde::to_vec_named(&old).unwrap();
        let completed = Completed { logprobs: None, ..completed };
        assert_eq!(rmp_serde::from_slice::<Completed>(&bytes).unwrap(), completed);
    }

    #[test]
    fn context_line_has_the_documented_fields_in_order() {
        let query = Query {
            target_api: Some("numpy.argsort".into()),
            dependencies: [("numpy".to_owned(), Some("1.16.6".to_owned()))].into(),
            ..Query::new(JobId("sample_1".into()), "How to sort array indices?".into())
        };
        let line = serde_json::to_string(&Context::empty(query)).unwrap();
        assert_eq!(
            line,
            r#"{"id":"sample_1","query":"How to sort array indices?","target_api":"numpy.argsort","dependencies":{"numpy":"1.16.6"},"retrieval_method":"none","context":"","context_length":0,"retrieval_time":0.0,"success":true,"documents":[]}"#
        );
    }
}
