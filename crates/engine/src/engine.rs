//! The engine: schedule, run, sample, finish.
//!
//! It owns the model, the KV cache and every sequence, and is driven from one thread: [`Engine::add`] takes a
//! request, each [`Engine::step`] computes a step and gives back what ended with it. What one request asks or
//! what becomes of it never changes the answer to another.

mod config;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::config::EngineConfig;
use crate::Error;
use crate::block_manager::BlockManager;
use crate::config::ModelConfig;
use crate::detokenizer::Detokenizer;
use crate::generation_config::GenerationConfig;
use crate::model_files::is_gguf;
use crate::precision::KvCacheDtype;
use crate::prompt::PromptFormat;
use crate::runner::Runner;
use crate::sampler::{
    Chosen, PlainChoice, SampleError, Samplers, SamplingParams, SamplingState, TokenLogprobs,
};
use crate::scheduler::{Limits, Plan, Scheduler};
use crate::sequence::Sequence;
use crate::step::{BLOCK_SIZE, StepInput, TokenId};
use crate::tokenizer::Tokenizer;

/// Memory of the KV cache where neither the caller nor the system says how much there is.
const DEFAULT_KV_CACHE_BYTES: u64 = 1 << 30;

/// A prompt to be answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The caller's name for it, unique among those that are unfinished.
    pub id: u64,
    /// The prompt's tokens.
    pub prompt: Vec<TokenId>,
    /// How its answer is chosen.
    pub sampling: SamplingParams,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it, or a stop string or token did.
    Stop,
    /// It reached `max_new_tokens` or the end of the window.
    Length,
}

/// A finished answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// The request.
    pub id: u64,
    /// The answer, without special tokens and up to the stop string.
    pub text: String,
    /// All generated tokens, an end-of-sequence token and those of a stop string included.
    pub token_ids: Vec<TokenId>,
    /// Log-probabilities of each of them, where the request asks for them.
    pub logprobs: Option<Vec<TokenLogprobs>>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Tokens of the prompt that prefix caching spared.
    pub cached_tokens: usize,
    /// How long it took.
    pub timing: Timing,
}

/// How long an answer took, from [`Engine::add`] on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// Until its first step began.
    pub waited: Duration,
    /// Until its first token.
    pub first_token: Duration,
    /// Until its end.
    pub total: Duration,
}

/// What became of a request in a step.
#[derive(Clone, Debug, PartialEq)]
pub enum StepOutput {
    /// It has its answer.
    Finished(Finished),
    /// It can have none; the other requests are not affected.
    Failed {
        /// The request.
        id: u64,
        /// Why.
        reason: String,
    },
}

/// Numbers of an engine. The first six only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Steps computed.
    pub steps: u64,
    /// Tokens computed in them, of prompts and of answers, those computed again included.
    pub computed_tokens: u64,
    /// Tokens of prompts whose answers have begun.
    pub prompt_tokens: u64,
    /// Those that prefix caching spared.
    pub cached_prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Times that a sequence lost its blocks to an older one.
    pub num_preemptions: u64,
    /// Sequences that run.
    pub num_running: usize,
    /// Sequences that wait.
    pub num_waiting: usize,
    /// KV blocks that sequences own.
    pub kv_blocks_used: usize,
    /// KV blocks.
    pub kv_blocks_total: usize,
}

/// What the engine knows of a request beside its sequence.
#[derive(Debug)]
struct Answer {
    sampling: SamplingState,
    logprobs: Option<Vec<TokenLogprobs>>,
    detokenizer: Detokenizer,
    added_at: Instant,
    timing: Timing,
    has_begun: bool,
}

/// A model that answers.
#[derive(Debug)]
pub struct Engine {
    runner: Runner,
    scheduler: Scheduler,
    answers: HashMap<u64, Answer>,
    samplers: Samplers,
    /// The step that is computed, and what was sampled in it: memory that is used again.
    input: StepInput,
    choices: Vec<Option<PlainChoice>>,
    sampled: Vec<SampledRow>,
    tokenizer: Arc<Tokenizer>,
    prompt_format: Arc<PromptFormat>,
    generation_config: GenerationConfig,
    /// Tokens with which the model ends an answer.
    eos_token_ids: Vec<TokenId>,
    model_name: String,
    max_model_len: usize,
    max_num_seqs: usize,
    stats: Stats,
    /// The request whose logits a test spoils.
    #[cfg(test)]
    poisoned: Option<u64>,
}

impl Engine {
    /// Loads a model and makes its KV cache.
    pub fn load(config: &EngineConfig) -> Result<Self, Error> {
        config.validate()?;
        Self::with_runner(config, Runner::load(&config.model_path, &config.runner_options())?)
    }

    /// An engine of a model that a runner has loaded.
    pub(crate) fn with_runner(config: &EngineConfig, mut runner: Runner) -> Result<Self, Error> {
        let tokenizer = Arc::new(Tokenizer::load(&config.model_path)?);
        let prompt_format = PromptFormat::load(&config.model_path, Arc::clone(&tokenizer))?;
        let generation_config = GenerationConfig::load(&config.model_path)?;
        let mut eos_token_ids: Vec<TokenId> = tokenizer.eos_token_ids().collect();
        if eos_token_ids.is_empty() {
            // Those of a part of the configuration, such as Gemma's for text.
            eos_token_ids.clone_from(&runner.config().eos_token_ids);
        }
        let window = runner.config().max_position_embeddings;
        let wanted = config.max_model_len.unwrap_or(window).min(window);
        let num_blocks = allocate_kv_cache(&mut runner, config, wanted)?;
        let max_model_len = wanted.min(num_blocks * BLOCK_SIZE);
        if max_model_len < wanted {
            tracing::warn!(
                wanted,
                max_model_len,
                "the KV cache is smaller than the model's window"
            );
        }
        let model_name = model_name(&config.model_path);
        tracing::info!(model = model_name, max_model_len, kv_blocks = num_blocks, "engine ready");
        let limits = Limits {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
        };
        let blocks = BlockManager::new(num_blocks, config.enable_prefix_caching);
        Ok(Self {
            runner,
            scheduler: Scheduler::new(limits, blocks),
            answers: HashMap::new(),
            samplers: Samplers::new(config.threads),
            input: StepInput::default(),
            choices: Vec::new(),
            sampled: Vec::new(),
            tokenizer,
            prompt_format: Arc::new(prompt_format),
            generation_config,
            eos_token_ids,
            model_name,
            max_model_len,
            max_num_seqs: config.max_num_seqs,
            stats: Stats::default(),
            #[cfg(test)]
            poisoned: None,
        })
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> Arc<Tokenizer> {
        Arc::clone(&self.tokenizer)
    }

    /// How the model wants its prompts.
    pub fn prompt_format(&self) -> Arc<PromptFormat> {
        Arc::clone(&self.prompt_format)
    }

    /// How the model wants its answers generated where the request doesn't say it.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation_config
    }

    /// Name of the model: that of its folder.
    pub fn model_name(&self) -> &str {
        &self.model_name
    }

    /// What the model looks like.
    pub fn model_config(&self) -> &ModelConfig {
        self.runner.config()
    }

    /// How keys and values are kept.
    pub fn kv_cache_dtype(&self) -> KvCacheDtype {
        self.runner.kv_cache_dtype()
    }

    /// Longest sequence, prompt and answer: the model's window, or less where the KV cache is smaller.
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// Most sequences that run at a time.
    pub fn max_num_seqs(&self) -> usize {
        self.max_num_seqs
    }

    /// Takes a request. One that can never be served is refused ([`Error::Reject`]).
    pub fn add(&mut self, request: Request) -> Result<(), Error> {
        let Request { id, prompt, sampling } = request;
        sampling.validate()?;
        let reject = |reason: String| Err(Error::Reject(reason));
        if self.scheduler.contains(id) {
            return reject(format!("there is an unfinished request {id} already"));
        }
        if prompt.is_empty() {
            return reject("the prompt is empty".into());
        }
        if prompt.len() >= self.max_model_len {
            let (length, window) = (prompt.len(), self.max_model_len);
            return reject(format!("the prompt has {length} tokens, the window only {window}"));
        }
        let vocab_size = self.runner.config().vocab_size;
        let named = prompt.iter().chain(&sampling.stop_token_ids).chain(sampling.logit_bias.keys());
        if let Some(token) = named.into_iter().find(|token| **token as usize >= vocab_size) {
            return reject(format!(
                "the token {token} is outside of the vocabulary of {vocab_size}"
            ));
        }
        let room = sampling.max_new_tokens.min(self.max_model_len - prompt.len());
        let mut detokenizer = Detokenizer::new(Arc::clone(&self.tokenizer), sampling.stop.clone())
            .with_min_tokens(sampling.min_new_tokens);
        detokenizer.reserve(room);
        let answer = Answer {
            detokenizer,
            logprobs: sampling.logprobs.map(|_| Vec::new()),
            sampling: SamplingState::new(sampling, &prompt, &self.eos_token_ids),
            added_at: Instant::now(),
            timing: Timing::default(),
            has_begun: false,
        };
        self.answers.insert(id, answer);
        let long_context_beyond = self.runner.config().long_context_beyond();
        let sequence = Sequence::new(id, prompt).with_long_context_beyond(long_context_beyond);
        self.scheduler.add(sequence.with_room_for(room));
        Ok(())
    }

    /// Forgets a request; without effect if it has ended.
    pub fn abort(&mut self, id: u64) {
        self.scheduler.remove(id);
        self.answers.remove(&id);
    }

    /// Whether a step has something to do.
    pub fn has_unfinished(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Computes one step; gives back the requests that ended with it.
    pub fn step(&mut self) -> Result<Vec<StepOutput>, Error> {
        let plan = self.scheduler.plan();
        let mut outputs = Vec::new();
        for (id, reason) in &plan.failed {
            self.answers.remove(id);
            outputs.push(StepOutput::Failed { id: *id, reason: reason.clone() });
        }
        if plan.scheduled.is_empty() {
            return Ok(outputs);
        }
        self.note_begun(&plan);
        if !self.run(&plan)? {
            return Ok(outputs);
        }
        self.scheduler.commit(&plan);
        self.stats.steps += 1;
        self.stats.computed_tokens += plan.num_tokens() as u64;
        let mut sampled = std::mem::take(&mut self.sampled);
        for row in sampled.drain(..) {
            outputs.extend(row.chosen.and_then(|chosen| self.settle(row.id, chosen)));
        }
        self.sampled = sampled;
        Ok(outputs)
    }

    /// Notes the end of the wait of those whose first step this is.
    fn note_begun(&mut self, plan: &Plan) {
        for scheduled in &plan.scheduled {
            if let Some(answer) = self.answers.get_mut(&scheduled.id).filter(|a| !a.has_begun) {
                answer.has_begun = true;
                answer.timing.waited = answer.added_at.elapsed();
            }
        }
    }

    /// Numbers up to now.
    pub fn stats(&self) -> Stats {
        let blocks = self.scheduler.blocks();
        Stats {
            num_preemptions: self.scheduler.num_preemptions(),
            num_running: self.scheduler.running().len(),
            num_waiting: self.scheduler.num_waiting(),
            kv_blocks_used: blocks.num_used_blocks(),
            kv_blocks_total: blocks.num_blocks(),
            ..self.stats
        }
    }

    /// Computes a plan and samples where it reaches a sequence's end. `false` if memory ran out, for which the
    /// next plan is smaller.
    fn run(&mut self, plan: &Plan) -> Result<bool, Error> {
        self.input.fill(&plan.scheduled, self.scheduler.running());
        let answers = &self.answers;
        let ends = plan.scheduled.iter().filter(|scheduled| scheduled.samples);
        self.choices.clear();
        self.choices.extend(ends.clone().map(|scheduled| {
            answers.get(&scheduled.id).and_then(|answer| PlainChoice::of(&answer.sampling))
        }));
        let logits = match self.runner.forward_and_choose(&self.input, &self.choices) {
            Ok(logits) => logits,
            Err(Error::OutOfMemory(reason)) => {
                self.make_room(reason)?;
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        self.sampled.clear();
        self.sampled.extend(ends.map(|scheduled| SampledRow { id: scheduled.id, chosen: None }));
        #[cfg(test)]
        let poisoned = self.poisoned;
        self.samplers.each(logits.threads(), &mut self.sampled, |sampler, index, row| {
            if let Some(token) = logits.token(index) {
                row.chosen = Some(token.map(|token| Chosen { token, logprobs: None }));
                return;
            }
            let logits = logits.row(index);
            #[cfg(test)]
            let logits = if poisoned == Some(row.id) { &[f32::NAN][..] } else { logits };
            let answer = answers.get(&row.id);
            row.chosen = answer.map(|answer| sampler.sample(logits, &answer.sampling));
        });
        Ok(true)
    }

    /// Makes the next step smaller than the one that memory ran out for.
    fn make_room(&mut self, reason: String) -> Result<(), Error> {
        let num_blocks = self.runner.num_kv_blocks();
        if (1..self.scheduler.blocks().num_blocks()).contains(&num_blocks) {
            self.scheduler.limit_blocks(num_blocks);
            let holds = num_blocks * BLOCK_SIZE;
            tracing::warn!(
                reason,
                "less memory than the KV cache was to have; going on with {holds} tokens"
            );
        } else if num_blocks > 0 && self.scheduler.shrink() {
            tracing::warn!(reason, "out of memory; going on with half the sequences");
        } else {
            return Err(Error::OutOfMemory(reason));
        }
        Ok(())
    }

    /// Takes what was sampled for a request; the request's end, if this is it.
    fn settle(&mut self, id: u64, chosen: Result<Chosen, SampleError>) -> Option<StepOutput> {
        let advanced = match chosen {
            Ok(chosen) => self.advance(id, chosen).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        advanced.unwrap_or_else(|reason| {
            self.abort(id);
            Some(StepOutput::Failed { id, reason })
        })
    }

    /// Appends a sampled token.
    fn advance(&mut self, id: u64, chosen: Chosen) -> Result<Option<StepOutput>, Error> {
        let token = chosen.token;
        let (Some(answer), Some(sequence)) =
            (self.answers.get_mut(&id), self.scheduler.push_token(id, token))
        else {
            return Ok(None);
        };
        self.stats.generation_tokens += 1;
        let num_generated = sequence.generated().len();
        if num_generated == 1 {
            answer.timing.first_token = answer.added_at.elapsed();
            self.stats.prompt_tokens += sequence.num_prompt_tokens() as u64;
            self.stats.cached_prompt_tokens += sequence.num_cached_tokens() as u64;
        }
        answer.sampling.push(token);
        if let Some(logprobs) = &mut answer.logprobs {
            logprobs.extend(chosen.logprobs);
        }
        // A token that ends the answer is no text, be it a special token or not.
        let stopped = answer.sampling.is_end(token) || answer.detokenizer.push(token)?;
        let is_full = num_generated >= answer.sampling.params().max_new_tokens
            || sequence.num_tokens() >= self.max_model_len;
        if stopped || is_full { self.finish(id, stopped) } else { Ok(None) }
    }

    fn finish(&mut self, id: u64, stopped: bool) -> Result<Option<StepOutput>, Error> {
        let (Some(mut answer), Some(sequence)) =
            (self.answers.remove(&id), self.scheduler.remove(id))
        else {
            return Ok(None);
        };
        // The rest of the text may hold a stop string that a held back character had hidden.
        let stopped = answer.detokenizer.finish()? || stopped;
        Ok(Some(StepOutput::Finished(Finished {
            id,
            text: answer.detokenizer.into_text(),
            token_ids: sequence.generated().to_vec(),
            logprobs: answer.logprobs,
            finish_reason: if stopped { FinishReason::Stop } else { FinishReason::Length },
            prompt_tokens: sequence.num_prompt_tokens(),
            completion_tokens: sequence.generated().len(),
            cached_tokens: sequence.num_cached_tokens(),
            timing: Timing { total: answer.added_at.elapsed(), ..answer.timing },
        })))
    }
}

/// A row of logits.
#[derive(Debug)]
struct SampledRow {
    /// The request.
    id: u64,
    /// What became of it; `None` if the request is gone.
    chosen: Option<Result<Chosen, SampleError>>,
}

/// Makes the KV cache as large as told, or as the sequences can use and the free memory allows.
fn allocate_kv_cache(
    runner: &mut Runner,
    config: &EngineConfig,
    max_model_len: usize,
) -> Result<usize, Error> {
    let block_bytes = runner.kv_bytes_per_block() as u64;
    let useful = (config.max_num_seqs * BlockManager::blocks_for(max_model_len)) as u64;
    let num_blocks = match config.kv_cache_memory_bytes {
        Some(bytes) => bytes / block_bytes,
        None => {
            let room = runner.kv_cache_room().unwrap_or(DEFAULT_KV_CACHE_BYTES);
            useful.min(room / block_bytes)
        }
    };
    let mut num_blocks = usize::try_from(num_blocks.min(u64::from(u32::MAX))).unwrap_or(usize::MAX);
    if num_blocks == 0 {
        return Err(Error::OutOfMemory(format!(
            "a KV cache needs {block_bytes} bytes at least: give it more memory"
        )));
    }
    loop {
        match runner.allocate_kv_cache(num_blocks) {
            Err(Error::OutOfMemory(_)) if num_blocks > 1 => num_blocks /= 2,
            result => return result.map(|()| num_blocks),
        }
    }
}

/// The name of a model: that of its folder, or of its GGUF file without the ending.
pub fn model_name(model_path: &std::path::Path) -> String {
    let text = |name: &std::ffi::OsStr| name.to_string_lossy().into_owned();
    if is_gguf(model_path) {
        // As it is given: a cache has links with names that lead to files without.
        return model_path.file_stem().map_or_else(|| "model".to_owned(), text);
    }
    let path = model_path.canonicalize().unwrap_or_else(|_| model_path.to_owned());
    // The cache of the Hugging Face Hub: models--ORG--NAME/snapshots/COMMIT.
    let repository = path.parent().filter(|folder| folder.ends_with("snapshots"));
    let repository = repository.and_then(|folder| folder.parent()?.file_name()).map(text);
    let in_cache = repository.as_deref().and_then(|name| name.strip_prefix("models--"));
    match in_cache {
        Some(name) => name.rsplit("--").next().unwrap_or(name).to_owned(),
        None => path.file_name().map_or_else(|| "model".to_owned(), text),
    }
}

#[cfg(test)]
mod tests;
