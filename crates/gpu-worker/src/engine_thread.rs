//! The thread that owns the engine, and with it the device.
//!
//! Bounded channels in, one reply out a request. A panic or a failed step ends the thread: every
//! request it held loses its reply, which tells its job to go back to the queue.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use engine::{
    Engine, EngineConfig, Finished, GenerationConfig, PromptFormat, Request, SamplingParams, Stats,
    StepOutput, TokenId,
};
use tokio::sync::{mpsc, oneshot};

use crate::Error;
use crate::backend::{Failure, Progress};

/// A prompt to complete and where the answer goes.
struct Submission {
    prompt: Vec<TokenId>,
    sampling: SamplingParams,
    reply: Reply,
}

/// A handle to the thread. Dropping it ends the thread once it has finished its current step.
pub(crate) struct EngineThread {
    submissions: mpsc::Sender<Submission>,
    facts: Facts,
    /// Prompts handed over.
    num_submitted: AtomicU64,
    shared: Arc<Shared>,
}

/// What the thread writes and everybody may read.
#[derive(Default)]
struct Shared {
    /// Prompts that the thread is done with, whatever became of them.
    num_ended: AtomicU64,
    /// Steps computed, and prompts taken in.
    num_steps: AtomicU64,
    stats: Mutex<Stats>,
}

/// What the thread tells once the model is loaded.
struct Facts {
    model_name: String,
    max_model_len: usize,
    max_num_seqs: usize,
    format: Arc<PromptFormat>,
    generation_config: GenerationConfig,
}

impl EngineThread {
    /// Starts the thread and waits until it has loaded the model.
    pub(crate) async fn start(config: EngineConfig) -> Result<Self, Error> {
        Self::start_watched(config, |_engine, _submission| ()).await
    }

    /// An engine that panics when a prompt contains `poison`.
    #[cfg(test)]
    pub(crate) async fn start_poisonable(
        config: EngineConfig,
        poison: &'static str,
    ) -> Result<Self, Error> {
        let watch = move |engine: &Engine, submission: &Submission| {
            let text = engine.tokenizer().decode(&submission.prompt).unwrap_or_default();
            assert!(!text.contains(poison), "poisoned");
        };
        Self::start_watched(config, watch).await
    }

    /// Calls `watch` for each submission before the engine gets it.
    async fn start_watched(
        config: EngineConfig,
        watch: impl Fn(&Engine, &Submission) + Send + 'static,
    ) -> Result<Self, Error> {
        let (submissions, inbox) = mpsc::channel(config.max_num_seqs.max(1));
        let (loaded, facts) = oneshot::channel();
        let shared = Arc::new(Shared::default());
        let thread_shared = Arc::clone(&shared);
        let main = move || {
            let Some(mut engine) = load(&config, loaded) else { return };
            let turn = AssertUnwindSafe(|| {
                turn_until_closed(&mut engine, inbox, (&thread_shared, &watch))
            });
            match catch_unwind(turn) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "the engine failed"),
                Err(_panic) => tracing::error!("the engine panicked"),
            }
        };
        std::thread::Builder::new().name("engine".into()).spawn(main).map_err(Error::Thread)?;
        // A panic while loading drops the sender.
        let facts = facts.await.map_err(|_closed| Error::LoadPanicked)?.map_err(Error::Load)?;
        Ok(Self { submissions, facts, num_submitted: AtomicU64::new(0), shared })
    }

    /// Name of the model.
    pub(crate) fn model_name(&self) -> &str {
        &self.facts.model_name
    }

    /// Longest sequence, prompt and answer together, in tokens.
    pub(crate) fn max_model_len(&self) -> usize {
        self.facts.max_model_len
    }

    /// The model's chat template and tokenizer.
    pub(crate) fn format(&self) -> &Arc<PromptFormat> {
        &self.facts.format
    }

    /// What the model says about how its answers are generated.
    pub(crate) fn generation_config(&self) -> &GenerationConfig {
        &self.facts.generation_config
    }

    /// Jobs to hold: all slots and a quarter more, so that the next is there when one ends.
    pub(crate) fn capacity(&self) -> usize {
        self.facts.max_num_seqs + self.facts.max_num_seqs.div_ceil(4)
    }

    /// How far the thread is. It is busy until it has let go of every prompt that it was given,
    /// whether anybody still waits for it or not.
    pub(crate) fn progress(&self) -> Progress {
        let num_ended = self.shared.num_ended.load(Ordering::Acquire);
        Progress {
            num_steps: self.shared.num_steps.load(Ordering::Relaxed),
            is_busy: self.num_submitted.load(Ordering::Acquire) > num_ended,
        }
    }

    /// The engine's numbers after its last step.
    pub(crate) fn stats(&self) -> Stats {
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the thread has ended.
    pub(crate) async fn down(&self) {
        self.submissions.closed().await;
    }

    /// Completes `prompt`.
    pub(crate) async fn complete(
        &self,
        prompt: Vec<TokenId>,
        sampling: SamplingParams,
    ) -> Result<Finished, Failure> {
        let (reply, finished) = oneshot::channel();
        let submission = Submission { prompt, sampling, reply };
        let Ok(room) = self.submissions.reserve().await else {
            return Err(Failure::Down { held: false });
        };
        self.num_submitted.fetch_add(1, Ordering::Release);
        room.send(submission);
        match finished.await {
            Ok(result) => result.map_err(Failure::Rejected),
            Err(_closed) => {
                // Until the inbox is closed too, another prompt could seem to be the engine's.
                self.down().await;
                Err(Failure::Down { held: true })
            }
        }
    }
}

fn load(
    config: &EngineConfig,
    loaded: oneshot::Sender<Result<Facts, engine::Error>>,
) -> Option<Engine> {
    // If nobody waits any more, there is nothing to do either.
    match Engine::load(config) {
        Ok(engine) => {
            let facts = Facts {
                model_name: engine.model_name().to_owned(),
                max_model_len: engine.max_model_len(),
                max_num_seqs: engine.max_num_seqs(),
                format: engine.prompt_format(),
                generation_config: engine.generation_config().clone(),
            };
            loaded.send(Ok(facts)).ok().map(|()| engine)
        }
        Err(error) => {
            drop(loaded.send(Err(error)));
            None
        }
    }
}

type Reply = oneshot::Sender<Result<Finished, String>>;

/// Steps the engine while it has work, waits for work while it has none, until the handle is gone.
fn turn_until_closed(
    engine: &mut Engine,
    mut inbox: mpsc::Receiver<Submission>,
    (shared, watch): (&Shared, &impl Fn(&Engine, &Submission)),
) -> Result<(), engine::Error> {
    let mut desk = Desk { shared, replies: HashMap::new(), next_id: 0 };
    loop {
        if !engine.has_unfinished() {
            match inbox.blocking_recv() {
                Some(submission) => {
                    watch(engine, &submission);
                    desk.add(engine, submission);
                }
                None => return Ok(()),
            }
        }
        while let Ok(submission) = inbox.try_recv() {
            watch(engine, &submission);
            desk.add(engine, submission);
        }
        if inbox.is_closed() && inbox.is_empty() {
            return Ok(());
        }
        desk.abort_unawaited(engine);
        let outputs = engine.step()?;
        // First the numbers, then the answers: who has an answer finds it counted.
        desk.step_is_done(engine);
        for output in outputs {
            desk.settle(output);
        }
    }
}

/// Who waits for which of the engine's answers.
struct Desk<'a> {
    shared: &'a Shared,
    replies: HashMap<u64, Reply>,
    next_id: u64,
}

impl Desk<'_> {
    fn add(&mut self, engine: &mut Engine, submission: Submission) {
        let Submission { prompt, sampling, reply } = submission;
        let id = self.next_id;
        self.next_id += 1;
        self.shared.num_steps.fetch_add(1, Ordering::Relaxed);
        match engine.add(Request { id, prompt, sampling }) {
            Ok(()) => drop(self.replies.insert(id, reply)),
            Err(error) => self.end(reply, Err(error.to_string())),
        }
    }

    /// Ends what nobody waits for any more: jobs whose lease was lost.
    fn abort_unawaited(&mut self, engine: &mut Engine) {
        let shared = self.shared;
        self.replies.retain(|&id, reply| {
            let awaited = !reply.is_closed();
            if !awaited {
                engine.abort(id);
                shared.num_ended.fetch_add(1, Ordering::Release);
            }
            awaited
        });
    }

    fn settle(&mut self, output: StepOutput) {
        let (id, result) = match output {
            StepOutput::Finished(finished) => (finished.id, Ok(finished)),
            StepOutput::Failed { id, reason } => (id, Err(reason)),
        };
        if let Some(reply) = self.replies.remove(&id) {
            self.end(reply, result);
        }
    }

    fn end(&self, reply: Reply, result: Result<Finished, String>) {
        self.shared.num_ended.fetch_add(1, Ordering::Release);
        // If nobody waits for the reply, nobody needs it.
        drop(reply.send(result));
    }

    fn step_is_done(&self, engine: &Engine) {
        self.shared.num_steps.fetch_add(1, Ordering::Relaxed);
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = engine.stats();
    }
}
