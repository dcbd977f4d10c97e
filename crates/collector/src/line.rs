//! One line of the output: the fields of the results format, then what flotilla adds.

use serde::Serialize;
use shared::{
    Completed, Dependencies, DocumentRef, FinishReason, JobId, Logprobs, Outcome, RetrievalMethod,
    Settled,
};

/// An answer or a failure, as it is written. Every line has every field, except `error`, which
/// only failed lines have, and `logprobs`, which only lines have whose job asked for them.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    /// The user's id.
    pub id: &'a JobId,
    /// The question.
    pub query: &'a str,
    /// Path of the API that the question is about.
    pub target_api: Option<&'a str>,
    /// Packages and versions searched.
    pub dependencies: &'a Dependencies,
    /// How the context was found.
    pub retrieval_method: RetrievalMethod,
    /// The context.
    pub context: &'a str,
    /// Its length in characters.
    pub context_length: usize,
    /// The answer; `null` where the job failed.
    pub answer: Option<&'a str>,
    /// Seconds that retrieval took.
    pub retrieval_time: f64,
    /// Seconds that inference took.
    pub inference_time: f64,
    /// Their sum.
    pub total_time: f64,
    /// The worker that answered.
    pub worker_rank: u32,
    /// Whether there is an answer.
    pub success: bool,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<&'a str>,
    /// Why generation ended; `null` where the job failed.
    pub finish_reason: Option<FinishReason>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Name of the model; `null` for bad input, which no model saw.
    pub model: Option<&'a str>,
    /// Deliveries the job took.
    pub attempts: u32,
    /// The job's seed.
    pub seed: u64,
    /// SHA-256 of the rendered prompt; `null` where there was none.
    pub prompt_sha256: Option<&'a str>,
    /// Whether the context was cut to fit the model's window.
    pub context_truncated: bool,
    /// The documents of the context, best first.
    pub documents: &'a [DocumentRef],
    /// Log-probabilities of the answer's tokens, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<&'a Logprobs>,
}

impl<'a> From<&'a Settled> for Line<'a> {
    fn from(settled: &'a Settled) -> Self {
        let context = &settled.context;
        let (completed, error): (Option<&Completed>, _) = match &settled.outcome {
            Outcome::Completed(completed) => (Some(completed), None),
            Outcome::Failed(reason) => (None, Some(reason.as_str())),
        };
        Self {
            id: &context.id,
            query: &context.query,
            target_api: context.target_api.as_deref(),
            dependencies: &context.dependencies,
            retrieval_method: context.retrieval_method,
            context: &context.context,
            context_length: context.context_length,
            answer: completed.map(|c| c.answer.as_str()),
            retrieval_time: context.retrieval_time,
            inference_time: settled.inference_time,
            total_time: context.retrieval_time + settled.inference_time,
            worker_rank: settled.worker_rank,
            success: completed.is_some(),
            error,
            finish_reason: completed.map(|c| c.finish_reason),
            prompt_tokens: completed.map_or(0, |c| c.prompt_tokens),
            completion_tokens: completed.map_or(0, |c| c.completion_tokens),
            model: settled.model.as_deref(),
            attempts: settled.attempts,
            seed: settled.seed,
            prompt_sha256: completed.map(|c| c.prompt_sha256.as_str()),
            context_truncated: completed.is_some_and(|c| c.context_truncated),
            documents: &context.documents,
            logprobs: completed.and_then(|c| c.logprobs.as_ref()),
        }
    }
}
