//! What one step of the engine computes: plain data between the scheduler's plan and the runner.
//!
//! The engine fills it from the plan, the runner reads it. No tensors, no policy.

use crate::scheduler::Scheduled;
use crate::sequence::Sequence;

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// Index of a block of the paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Tokens of a KV block. A power of two.
pub const BLOCK_SIZE: usize = 16;

/// One sequence's share of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SequenceInput {
    /// Tokens it computes in this step, in [`StepInput::token_ids`] behind those of the sequences before it.
    pub num_scheduled_tokens: usize,
    /// Tokens whose keys and values are already in the cache; the first scheduled token has this position.
    pub num_computed_tokens: usize,
    /// The sequence's blocks in order; token `p` lives in block `p / BLOCK_SIZE` at `p % BLOCK_SIZE`.
    pub block_table: Vec<BlockId>,
    /// Whether all of its tokens are more than [`crate::ModelConfig::long_context_beyond`], those included that
    /// are not scheduled yet: then all its keys are rotated otherwise.
    pub is_long: bool,
    /// Whether the logits of its last scheduled token are needed.
    pub wants_logits: bool,
}

impl SequenceInput {
    /// Tokens that are computed once the step is.
    pub(crate) fn end(&self) -> usize {
        self.num_computed_tokens.saturating_add(self.num_scheduled_tokens)
    }
}

/// The whole step, flattened over its sequences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepInput {
    /// Token ids, `(num_tokens)`.
    pub token_ids: Vec<TokenId>,
    /// The sequences, in the order of their tokens.
    pub sequences: Vec<SequenceInput>,
}

impl StepInput {
    /// Starts anew with what is scheduled of the sequences that run. Memory is used again.
    pub(crate) fn fill(&mut self, scheduled: &[Scheduled], running: &[Sequence]) {
        self.token_ids.clear();
        let mut num_sequences = 0;
        for scheduled in scheduled {
            let Some(sequence) = running.iter().find(|seq| seq.id() == scheduled.id) else {
                continue;
            };
            let start = sequence.num_computed_tokens;
            let tokens = &sequence.token_ids()[start..start + scheduled.num_tokens];
            self.token_ids.extend_from_slice(tokens);
            if num_sequences == self.sequences.len() {
                self.sequences.push(SequenceInput::default());
            }
            let input = &mut self.sequences[num_sequences];
            input.num_scheduled_tokens = scheduled.num_tokens;
            input.num_computed_tokens = start;
            input.block_table.clone_from(&sequence.block_table);
            input.is_long = sequence.is_long();
            input.wants_logits = scheduled.samples;
            num_sequences += 1;
        }
        self.sequences.truncate(num_sequences);
    }
}
