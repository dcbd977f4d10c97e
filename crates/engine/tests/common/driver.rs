//! Drives a runner without an engine: sequences with their blocks, step after step.

use flotilla_engine::Runner;
use flotilla_engine::step::{BLOCK_SIZE, BlockId, SequenceInput, StepInput, TokenId};

/// A sequence as a scheduler would keep it.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    /// Prompt and what was generated.
    pub(crate) tokens: Vec<TokenId>,
    /// Tokens whose keys and values are in the cache.
    pub(crate) num_computed: usize,
    /// Its blocks.
    pub(crate) blocks: Vec<BlockId>,
    /// Length beyond which all its keys are others.
    pub(crate) long_beyond: Option<usize>,
}

impl Sequence {
    /// A sequence whose blocks are those from `first` on.
    pub(crate) fn contiguous(tokens: Vec<TokenId>, first: u32, max_len: usize) -> Self {
        let num_blocks = max_len.div_ceil(BLOCK_SIZE) as u32;
        let blocks = (first..first + num_blocks).map(BlockId).collect();
        Self { tokens, num_computed: 0, blocks, long_beyond: None }
    }

    /// The same for a model.
    pub(crate) fn of(self, runner: &Runner) -> Self {
        Self { long_beyond: runner.config().long_context_beyond(), ..self }
    }

    /// Appends a token; what was computed is void where that makes the sequence a long one.
    pub(crate) fn push(&mut self, token: TokenId) {
        let was_long = self.is_long();
        self.tokens.push(token);
        if self.is_long() && !was_long {
            self.num_computed = 0;
        }
    }

    fn is_long(&self) -> bool {
        self.long_beyond.is_some_and(|beyond| self.tokens.len() > beyond)
    }

    /// The next `num_tokens` of its tokens (or what is left) are computed.
    pub(crate) fn schedule(&mut self, num_tokens: usize, input: &mut StepInput) {
        let start = self.num_computed;
        let end = self.tokens.len().min(start + num_tokens);
        input.token_ids.extend(&self.tokens[start..end]);
        input.sequences.push(SequenceInput {
            num_scheduled_tokens: end - start,
            num_computed_tokens: start,
            block_table: self.blocks.clone(),
            is_long: self.is_long(),
            wants_logits: true,
        });
        self.num_computed = end;
    }
}

/// Computes what is left of a sequence in chunks; the logits of each chunk's last token.
pub(crate) fn run(runner: &mut Runner, sequence: &mut Sequence, chunk: usize) -> Vec<Vec<f32>> {
    let mut logits = Vec::new();
    while sequence.num_computed < sequence.tokens.len() {
        logits.extend(step(runner, &mut [sequence], chunk));
    }
    logits
}

/// One step of several sequences, up to `chunk` tokens of each.
pub(crate) fn step(
    runner: &mut Runner,
    sequences: &mut [&mut Sequence],
    chunk: usize,
) -> Vec<Vec<f32>> {
    let mut input = StepInput::default();
    for sequence in sequences {
        sequence.schedule(chunk, &mut input);
    }
    runner.forward(&input).unwrap().rows().map(<[f32]>::to_vec).collect()
}

/// The token with the highest logit, the first of equals.
pub(crate) fn argmax(logits: &[f32]) -> TokenId {
    let best = (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    best.unwrap() as TokenId
}

/// Greedy tokens of several sequences that run side by side.
pub(crate) fn generate(
    runner: &mut Runner,
    sequences: &mut [&mut Sequence],
    num_tokens: usize,
) -> Vec<Vec<TokenId>> {
    let mut generated = vec![Vec::new(); sequences.len()];
    for _ in 0..num_tokens {
        let logits = step(runner, sequences, usize::MAX / 2);
        for ((sequence, logits), generated) in sequences.iter_mut().zip(logits).zip(&mut generated)
        {
            let token = argmax(&logits);
            sequence.push(token);
            generated.push(token);
        }
    }
    generated
}
