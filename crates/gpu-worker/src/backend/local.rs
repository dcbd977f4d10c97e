//! The engine of this machine: renders prompts and hands them to the engine's thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use engine::{EngineConfig, Finished};
use shared::{Completed, FinishReason, Job, Logprobs};
use tokio::sync::Semaphore;

use super::{Answer, Backend, Counters, Failure, Progress, Serving};
use crate::Error;
use crate::engine_thread::EngineThread;
use crate::generation::{logprobs, sampling_params};
use crate::prompt::{self, Rendered};

/// Prompts rendered at a time: tokenising one takes many times its text in memory.
const MAX_RENDERING: usize = 4;

/// Starts engines on one device.
#[derive(Clone, Debug)]
pub struct EngineBackend {
    /// The engine's settings, its device among them.
    pub engine: EngineConfig,
}

impl Backend for EngineBackend {
    type Engine = LocalEngine;

    async fn start(&self) -> Result<LocalEngine, Error> {
        Ok(LocalEngine::new(EngineThread::start(self.engine.clone()).await?))
    }
}

/// A started engine.
pub struct LocalEngine {
    thread: EngineThread,
    /// [`MAX_RENDERING`] permits.
    rendering: Semaphore,
    renderings: Arc<Renderings>,
}

/// How far rendering is.
#[derive(Default)]
struct Renderings {
    num_running: AtomicU64,
    /// Texts tokenised.
    num_steps: AtomicU64,
}

impl LocalEngine {
    pub(crate) fn new(thread: EngineThread) -> Self {
        let rendering = Semaphore::new(MAX_RENDERING);
        Self { thread, rendering, renderings: Arc::default() }
    }

    /// Renders off the async threads: tokenising a long context takes milliseconds.
    async fn render(&self, job: &Job, max_new_tokens: usize) -> Result<Rendered, Failure> {
        let format = self.thread.format().clone();
        let (job, room) = (job.clone(), (self.thread.max_model_len(), max_new_tokens));
        let renderings = Arc::clone(&self.renderings);
        // Never closed; without a permit the job would only use more memory.
        let _permit = self.rendering.acquire().await;
        let rendered = tokio::task::spawn_blocking(move || {
            renderings.num_running.fetch_add(1, Ordering::Relaxed);
            let step = || {
                renderings.num_steps.fetch_add(1, Ordering::Relaxed);
            };
            let rendering =
                std::panic::AssertUnwindSafe(|| prompt::render(&format, &job, room, &step));
            let rendered = std::panic::catch_unwind(rendering);
            renderings.num_running.fetch_sub(1, Ordering::Relaxed);
            rendered.unwrap_or_else(|_panic| Err("rendering the prompt panicked".to_owned()))
        })
        .await;
        match rendered {
            Ok(rendered) => rendered.map_err(Failure::Rejected),
            // Only when the runtime ends.
            Err(_cancelled) => Err(Failure::Down { held: false }),
        }
    }

    /// Gives the log-probabilities of an answer the texts of their tokens, off the async threads: an answer may
    /// have thousands.
    async fn name_tokens(
        &self,
        mut finished: Finished,
    ) -> Result<(Finished, Option<Logprobs>), Failure> {
        let Some(numbers) = finished.logprobs.take() else {
            return Ok((finished, None));
        };
        let format = self.thread.format().clone();
        let named = tokio::task::spawn_blocking(move || {
            let logprobs = logprobs(format.tokenizer(), &finished.token_ids, &numbers);
            (finished, Some(logprobs))
        });
        // Only when the runtime ends.
        named.await.map_err(|_cancelled| Failure::Down { held: false })
    }
}

impl Serving for LocalEngine {
    fn model_name(&self) -> &str {
        self.thread.model_name()
    }

    fn num_slots(&self) -> usize {
        self.thread.capacity()
    }

    fn progress(&self) -> Progress {
        let thread = self.thread.progress();
        let Renderings { num_running, num_steps } = &*self.renderings;
        Progress {
            num_steps: thread.num_steps + num_steps.load(Ordering::Relaxed),
            is_busy: thread.is_busy || num_running.load(Ordering::Relaxed) > 0,
        }
    }

    fn counters(&self) -> Counters {
        let stats = self.thread.stats();
        Counters {
            num_running: stats.num_running as u64,
            prompt_tokens: stats.prompt_tokens,
            generation_tokens: stats.generation_tokens,
            cached_prompt_tokens: stats.cached_prompt_tokens,
            preemptions: stats.num_preemptions,
            kv_blocks_used: stats.kv_blocks_used as u64,
            kv_blocks_total: stats.kv_blocks_total as u64,
        }
    }

    async fn down(&self) {
        self.thread.down().await;
    }

    async fn answer(&self, job: &Job) -> Result<Answer, Failure> {
        let began = Instant::now();
        let sampling = sampling_params(&job.generation, self.thread.generation_config());
        let rendered = self.render(job, sampling.max_new_tokens).await?;
        let finished = self.thread.complete(rendered.token_ids, sampling).await?;
        let Finished { timing, .. } = finished;
        let (finished, logprobs) = self.name_tokens(finished).await?;
        // The engine's clock starts when it takes the prompt in.
        let before = began.elapsed().saturating_sub(timing.total);
        Ok(Answer {
            queue_time: before + timing.waited,
            time_to_first_token: before + timing.first_token,
            generation_time: timing.total.saturating_sub(timing.first_token),
            completed: Completed {
                answer: finished.text,
                finish_reason: match finished.finish_reason {
                    engine::FinishReason::Stop => FinishReason::Stop,
                    engine::FinishReason::Length => FinishReason::Length,
                },
                prompt_tokens: to_u32(finished.prompt_tokens),
                completion_tokens: to_u32(finished.completion_tokens),
                prompt_sha256: rendered.text_sha256,
                context_truncated: rendered.context_truncated,
                logprobs,
            },
        })
    }
}

fn to_u32(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
