//! One job's way through a worker: render, complete, publish the outcome, settle.
//!
//! What a failure means for the job is decided here. Rejected: a `Failed` outcome and a dead
//! letter. Engine down: back to the queue. A job is never acked before its outcome is stored.

use std::time::Duration;

use engine::SamplingParams;
use shared::{
    Completed, Delivery, FinishReason, Generation, Job, Outcome, Queue, QueueError, Settled,
    WIRE_VERSION,
};
use tokio::sync::{RwLock, Semaphore};
use tokio::time::Instant;

use crate::engine_thread::{EngineThread, Failure};
use crate::prompt::{self, Rendered};

/// How long a job rests that a worker could not finish.
const RETRY_DELAY: Duration = Duration::from_millis(500);
/// How long a job of a newer wire version rests, until a newer worker may take it.
const NEWER_VERSION_DELAY: Duration = Duration::from_secs(30);

/// Prompts rendered at a time: tokenising one takes many times its text in memory.
pub(crate) const MAX_RENDERING: usize = 4;

/// What all jobs of one worker share while its engine lives.
pub(crate) struct Server<O> {
    pub(crate) rank: u32,
    pub(crate) max_attempts: u32,
    pub(crate) engine: EngineThread,
    pub(crate) outcomes: O,
    /// Jobs on their last delivery hold it alone, all others together: if one of them takes the
    /// engine down, it harms nobody else, and it is known which one it was.
    pub(crate) alone: RwLock<()>,
    /// [`MAX_RENDERING`] permits.
    pub(crate) rendering: Semaphore,
}

impl<O: Queue<Settled>> Server<O> {
    /// Takes one job to its end; whether it was answered.
    pub(crate) async fn serve<D: Delivery<Job>>(&self, delivery: D) -> bool {
        match self.serve_inner(delivery).await {
            Ok(answered) => answered,
            // The job is somebody else's by now; if both finish, the collector keeps one.
            Err(error) => {
                tracing::warn!(worker = self.rank, %error, "cannot settle a job");
                false
            }
        }
    }

    async fn serve_inner<D: Delivery<Job>>(&self, delivery: D) -> Result<bool, QueueError> {
        let job = delivery.message();
        if job.version > WIRE_VERSION {
            delivery.retry(NEWER_VERSION_DELAY).await?;
            return Ok(false);
        }
        let started = Instant::now();
        let answer = tokio::select! {
            answer = self.answer(job, delivery.attempt()) => answer,
            error = self.keep_alive(&delivery) => return Err(error),
        };
        let outcome = match answer {
            Ok(completed) => Outcome::Completed(completed),
            Err(Failure::Rejected(reason)) => Outcome::Failed(reason),
            Err(Failure::Down { .. }) => {
                delivery.retry(RETRY_DELAY).await?;
                return Ok(false);
            }
        };
        let settled = Settled {
            version: WIRE_VERSION,
            run: job.run.clone(),
            context: job.context.clone(),
            model: Some(self.engine.model_name().to_owned()),
            seed: job.generation.seed,
            worker_rank: self.rank,
            attempts: delivery.attempt(),
            inference_time: started.elapsed().as_secs_f64(),
            outcome,
        };
        let failed = match &settled.outcome {
            Outcome::Completed(_) => None,
            Outcome::Failed(reason) => Some(reason.clone()),
        };
        self.outcomes.publish(settled).await?;
        match failed {
            None => delivery.ack().await?,
            Some(reason) => {
                tracing::debug!(job_id = %delivery.message().id(), reason, "job failed");
                delivery.reject(reason).await?;
            }
        }
        Ok(true)
    }

    /// Renders and completes one job.
    async fn answer(&self, job: &Job, attempt: u32) -> Result<Completed, Failure> {
        let rendered = self.render(job).await?;
        let Rendered { text_sha256, token_ids, context_truncated } = rendered;
        let sampling = sampling_params(&job.generation);
        let completion = if attempt < self.max_attempts {
            let _with_others = self.alone.read().await;
            self.engine.complete(token_ids, sampling).await
        } else {
            let _alone = self.alone.write().await;
            self.engine.complete(token_ids, sampling).await.map_err(|failure| match failure {
                Failure::Down { held: true } => Failure::Rejected(format!(
                    "the engine went down on it in delivery {attempt}, with no other job in it"
                )),
                other => other,
            })
        };
        let finished = completion?;
        Ok(Completed {
            answer: finished.text,
            finish_reason: match finished.finish_reason {
                engine::FinishReason::Stop => FinishReason::Stop,
                engine::FinishReason::Length => FinishReason::Length,
            },
            prompt_tokens: to_u32(finished.prompt_tokens),
            completion_tokens: to_u32(finished.completion_tokens),
            prompt_sha256: text_sha256,
            context_truncated,
        })
    }

    /// Renders off the async threads: tokenising a long context takes milliseconds.
    async fn render(&self, job: &Job) -> Result<Rendered, Failure> {
        let format = self.engine.format().clone();
        let (job, window) = (job.clone(), self.engine.max_model_len());
        // Never closed; without a permit the job would only use more memory.
        let _permit = self.rendering.acquire().await;
        let rendered =
            tokio::task::spawn_blocking(move || prompt::render(&format, &job, window)).await;
        match rendered {
            Ok(rendered) => rendered.map_err(Failure::Rejected),
            Err(panic) => Err(Failure::Rejected(format!("rendering the prompt: {panic}"))),
        }
    }

    /// Renews the lease while the engine makes progress; returns only when the lease is lost.
    ///
    /// An engine that hangs stops renewing, so that its jobs go to other workers.
    async fn keep_alive<D: Delivery<Job>>(&self, delivery: &D) -> QueueError {
        let mut seen = None;
        loop {
            tokio::time::sleep(delivery.lease() / 3).await;
            let progress = Some(self.engine.progress());
            if progress == seen {
                continue;
            }
            seen = progress;
            if let Err(error) = delivery.keep_alive().await {
                return error;
            }
        }
    }
}

fn sampling_params(generation: &Generation) -> SamplingParams {
    SamplingParams {
        max_new_tokens: generation.max_new_tokens as usize,
        temperature: generation.temperature,
        top_p: generation.top_p,
        top_k: generation.top_k as usize,
        stop: generation.stop.clone(),
        seed: generation.seed,
        ..SamplingParams::default()
    }
}

fn to_u32(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
