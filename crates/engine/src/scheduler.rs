//! The scheduler: what runs in the next step.
//!
//! Plain data, no tensors. The engine asks it for a [`Plan`], runs it, and reports back with
//! [`Scheduler::commit`]. Running sequences that generate come first, then prompts that are being computed in
//! chunks, then waiting sequences in the order of their arrival. When blocks run out, the youngest running
//! sequence goes back to the front of the queue, gives up its blocks, and is later computed again from its
//! tokens (the generated ones included). So does a sequence that outgrows the length up to which its keys hold.

use std::collections::{HashSet, VecDeque};

use crate::block_manager::{BlockHash, BlockManager};
use crate::sequence::Sequence;
use crate::step::{BLOCK_SIZE, SequenceInput, StepInput, TokenId};

/// What bounds a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most sequences that run at a time.
    pub max_num_seqs: usize,
    /// Most tokens of a step.
    pub max_num_batched_tokens: usize,
}

/// One sequence's part in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// The sequence.
    pub id: u64,
    /// Tokens of it that are computed.
    pub num_tokens: usize,
    /// Whether they reach its last token, so that the next one can be sampled.
    pub samples: bool,
}

/// What runs in a step, and what can never run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The sequences of the step.
    pub scheduled: Vec<Scheduled>,
    /// Sequences that were given up, with the reason; the scheduler no longer knows them.
    pub failed: Vec<(u64, String)>,
}

impl Plan {
    /// Tokens that are computed.
    pub fn num_tokens(&self) -> usize {
        self.scheduled.iter().map(|scheduled| scheduled.num_tokens).sum()
    }
}

/// Decides what runs.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: BlockManager,
    /// In order of arrival, preempted ones in front.
    waiting: VecDeque<Sequence>,
    /// Oldest first.
    running: Vec<Sequence>,
    num_preemptions: u64,
}

impl Scheduler {
    /// A scheduler over an empty cache.
    pub fn new(limits: Limits, blocks: BlockManager) -> Self {
        Self { limits, blocks, waiting: VecDeque::new(), running: Vec::new(), num_preemptions: 0 }
    }

    /// Puts a sequence at the end of the queue.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Whether the sequence is waiting or running.
    pub fn contains(&self, id: u64) -> bool {
        self.running.iter().chain(&self.waiting).any(|sequence| sequence.id() == id)
    }

    /// Takes a sequence out, finished or not; its blocks are free again.
    pub fn remove(&mut self, id: u64) -> Option<Sequence> {
        if let Some(index) = self.running.iter().position(|sequence| sequence.id() == id) {
            let mut sequence = self.running.remove(index);
            self.blocks.release(&mut sequence.block_table);
            return Some(sequence);
        }
        let index = self.waiting.iter().position(|sequence| sequence.id() == id)?;
        self.waiting.remove(index)
    }

    /// Appends a sampled token to a running sequence.
    pub fn push_token(&mut self, id: u64, token: TokenId) -> Option<&Sequence> {
        let sequence = self.running.iter_mut().find(|sequence| sequence.id() == id)?;
        sequence.push(token);
        Some(sequence)
    }

    /// Plans the next step. Blocks for all its tokens are allocated.
    pub fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        let mut budget = self.limits.max_num_batched_tokens;
        while let Some(index) = self.running.iter().rposition(|sequence| sequence.is_outgrown) {
            self.send_back(index);
        }
        self.plan_decodes(&mut plan, &mut budget);
        for sequence in &self.running {
            if sequence.num_remaining_tokens() > 1 {
                take(sequence, &mut budget, &mut plan);
            }
        }
        self.admit(&mut plan, &mut budget);
        plan
    }

    /// The step of a plan, for the runner.
    pub fn step_input(&self, plan: &Plan) -> StepInput {
        let mut step = StepInput::default();
        for scheduled in &plan.scheduled {
            let Some(sequence) = self.running.iter().find(|seq| seq.id() == scheduled.id) else {
                continue;
            };
            let start = sequence.num_computed_tokens;
            let tokens = &sequence.token_ids()[start..start + scheduled.num_tokens];
            step.token_ids.extend_from_slice(tokens);
            step.sequences.push(SequenceInput {
                num_scheduled_tokens: scheduled.num_tokens,
                num_computed_tokens: start,
                block_table: sequence.block_table.clone(),
                is_long: sequence.is_long(),
                wants_logits: scheduled.samples,
            });
        }
        step
    }

    /// Notes that a plan has been computed: its full blocks can be shared from now on.
    pub fn commit(&mut self, plan: &Plan) {
        for scheduled in &plan.scheduled {
            let Some(sequence) = self.running.iter_mut().find(|seq| seq.id() == scheduled.id)
            else {
                continue;
            };
            let before = sequence.num_computed_tokens;
            sequence.num_computed_tokens += scheduled.num_tokens;
            for index in before / BLOCK_SIZE..sequence.num_computed_tokens / BLOCK_SIZE {
                self.blocks.publish(sequence.block_table[index], sequence.block_hashes()[index]);
            }
        }
    }

    /// Sends the younger half of the running sequences back and runs no more than the rest from now on, after
    /// a step found too little memory. `false` when there is nothing left to send back.
    pub fn shrink(&mut self) -> bool {
        if self.running.len() < 2 {
            return false;
        }
        let keep = self.running.len() / 2;
        while self.running.len() > keep {
            self.preempt_youngest();
        }
        self.limits.max_num_seqs = keep;
        true
    }

    /// Gives up the blocks from `num_blocks` on, for which there is no memory. Sequences that own such go back to
    /// the queue.
    pub fn limit_blocks(&mut self, num_blocks: usize) {
        let owns_some = |sequence: &Sequence| {
            sequence.block_table.iter().any(|block| block.0 as usize >= num_blocks)
        };
        while let Some(index) = self.running.iter().rposition(owns_some) {
            self.send_back(index);
            self.num_preemptions += 1;
        }
        self.blocks.truncate(num_blocks);
    }

    /// The sequences that run, oldest first.
    pub fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// Number of sequences that wait.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// How often a sequence was sent back.
    pub fn num_preemptions(&self) -> u64 {
        self.num_preemptions
    }

    /// The owner book of the cache.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// Schedules the sequences that generate, oldest first; preempts the youngest where blocks run out.
    fn plan_decodes(&mut self, plan: &mut Plan, budget: &mut usize) {
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            let id = sequence.id();
            if sequence.num_remaining_tokens() != 1 {
                index += 1;
                continue;
            }
            let num_tokens = sequence.num_tokens();
            if self.blocks.grow(&mut sequence.block_table, num_tokens) {
                take(sequence, budget, plan);
                index += 1;
            } else if self.running.len() > 1 {
                self.preempt_youngest(); // possibly this one: the loop then ends
            } else {
                let reason = self.too_long(num_tokens);
                self.remove(id);
                plan.failed.push((id, reason));
            }
        }
    }

    /// Lets waiting sequences in while tokens, slots and blocks last.
    fn admit(&mut self, plan: &mut Plan, budget: &mut usize) {
        let mut in_progress = self.hashes_in_progress();
        let mut index = 0;
        while *budget > 0 && self.running.len() < self.limits.max_num_seqs {
            let Some(sequence) = self.waiting.get(index) else {
                return;
            };
            let prefix = self.blocks.find_prefix(sequence.shareable_hashes());
            // What it needs next is being computed by another: wait for that instead of computing it twice.
            let next_hash = sequence.shareable_hashes().get(prefix.len());
            if next_hash.is_some_and(|hash| in_progress.contains(hash)) {
                index += 1;
                continue;
            }
            // A block for each running sequence stays free, so that none is preempted right away again.
            let (num_tokens, spare) = (sequence.num_tokens(), self.running.len());
            if let Some(table) = self.blocks.allocate(&prefix, num_tokens, spare) {
                let Some(mut sequence) = self.waiting.remove(index) else {
                    return;
                };
                sequence.num_computed_tokens = prefix.len() * BLOCK_SIZE;
                sequence.num_cached_tokens.get_or_insert(sequence.num_computed_tokens);
                sequence.block_table = table;
                in_progress.extend(unpublished(&sequence, &self.blocks));
                take(&sequence, budget, plan);
                self.running.push(sequence);
            } else if self.running.is_empty() {
                let reason = self.too_long(num_tokens);
                if let Some(sequence) = self.waiting.remove(index) {
                    plan.failed.push((sequence.id(), reason));
                }
            } else {
                return;
            }
        }
    }

    /// Full blocks that running sequences are about to compute.
    fn hashes_in_progress(&self) -> HashSet<BlockHash> {
        let prefills = self.running.iter().filter(|sequence| sequence.num_remaining_tokens() > 1);
        prefills.flat_map(|sequence| unpublished(sequence, &self.blocks)).collect()
    }

    fn preempt_youngest(&mut self) {
        if let Some(youngest) = self.running.len().checked_sub(1) {
            self.send_back(youngest);
            self.num_preemptions += 1;
        }
    }

    /// Takes a running sequence's blocks and puts it in front of the queue.
    fn send_back(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        self.blocks.release(&mut sequence.block_table);
        sequence.num_computed_tokens = 0;
        sequence.is_outgrown = false;
        self.waiting.push_front(sequence);
    }

    fn too_long(&self, num_tokens: usize) -> String {
        let capacity = self.blocks.num_blocks() * BLOCK_SIZE;
        format!("{num_tokens} tokens do not fit into the KV cache, which holds {capacity}")
    }
}

/// Schedules what the budget allows of a sequence's remaining tokens.
fn take(sequence: &Sequence, budget: &mut usize, plan: &mut Plan) {
    let remaining = sequence.num_remaining_tokens();
    let num_tokens = remaining.min(*budget);
    if num_tokens > 0 {
        *budget -= num_tokens;
        let samples = num_tokens == remaining;
        plan.scheduled.push(Scheduled { id: sequence.id(), num_tokens, samples });
    }
}

/// Hashes of the full blocks that a sequence has still to compute.
fn unpublished<'a>(
    sequence: &'a Sequence,
    blocks: &BlockManager,
) -> impl Iterator<Item = BlockHash> + use<'a> {
    let start = if blocks.prefix_caching() {
        sequence.num_computed_tokens / BLOCK_SIZE
    } else {
        usize::MAX
    };
    sequence.block_hashes().iter().skip(start).copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::step::BlockId;

    fn scheduler(
        num_blocks: usize,
        max_num_seqs: usize,
        max_num_batched_tokens: usize,
    ) -> Scheduler {
        let limits = Limits { max_num_seqs, max_num_batched_tokens };
        Scheduler::new(limits, BlockManager::new(num_blocks, true))
    }

    fn prompt(family: u32, num_tokens: usize) -> Vec<TokenId> {
        (family * 1000..).take(num_tokens).collect()
    }

    /// Runs a step as the engine does, each sampled token being 7; gives back the plan.
    fn step(scheduler: &mut Scheduler) -> Plan {
        let plan = scheduler.plan();
        let input = scheduler.step_input(&plan);
        assert_eq!(input.sequences.len(), plan.scheduled.len());
        scheduler.commit(&plan);
        for scheduled in plan.scheduled.iter().filter(|scheduled| scheduled.samples) {
            scheduler.push_token(scheduled.id, 7).unwrap();
        }
        plan
    }

    fn parts(plan: &Plan) -> Vec<(u64, usize)> {
        plan.scheduled.iter().map(|scheduled| (scheduled.id, scheduled.num_tokens)).collect()
    }

    #[test]
    fn decodes_come_before_chunks_and_chunks_before_newcomers() {
        let mut scheduler = scheduler(32, 4, 20);
        scheduler.add(Sequence::new(1, prompt(1, 10)));
        scheduler.add(Sequence::new(2, prompt(2, 30)));
        scheduler.add(Sequence::new(3, prompt(3, 3)));
        assert_eq!(parts(&step(&mut scheduler)), [(1, 10), (2, 10)]);
        assert_eq!(parts(&step(&mut scheduler)), [(1, 1), (2, 19)]);
        assert_eq!(parts(&step(&mut scheduler)), [(1, 1), (2, 1), (3, 3)]);
        assert_eq!(parts(&step(&mut scheduler)), [(1, 1), (2, 1), (3, 1)]);
    }

    #[test]
    fn no_more_sequences_run_than_there_are_slots() {
        let mut scheduler = scheduler(32, 2, 100);
        for id in 1..=3 {
            scheduler.add(Sequence::new(id, prompt(id as u32, 4)));
        }
        assert_eq!(parts(&step(&mut scheduler)), [(1, 4), (2, 4)]);
        scheduler.remove(1);
        assert_eq!(parts(&step(&mut scheduler)), [(2, 1), (3, 4)]);
    }

    #[test]
    fn the_youngest_gives_way_and_comes_back_with_its_tokens() {
        let mut scheduler = scheduler(3, 4, 100);
        scheduler.add(Sequence::new(1, prompt(1, 15)));
        scheduler.add(Sequence::new(2, prompt(2, 15)));
        step(&mut scheduler); // a block each, one is free
        step(&mut scheduler); // 16 tokens each
        let plan = step(&mut scheduler); // both need a second block, there is one
        assert_eq!(parts(&plan), [(1, 1)]);
        assert_eq!((scheduler.num_preemptions(), scheduler.num_waiting()), (1, 1));
        assert_eq!(scheduler.waiting[0].generated(), [7, 7]);
        scheduler.remove(1);
        let plan = step(&mut scheduler);
        // Its first block was still in the cache: 16 of 17 tokens need not be computed again.
        assert_eq!(parts(&plan), [(2, 1)]);
        assert_eq!(scheduler.running()[0].generated(), [7, 7, 7]);
        assert_eq!(scheduler.running()[0].num_cached_tokens(), 0);
    }

    #[test]
    fn a_sequence_too_long_for_the_whole_cache_fails_with_a_reason() {
        let mut scheduler = scheduler(2, 4, 100);
        scheduler.add(Sequence::new(1, prompt(1, 33)));
        scheduler.add(Sequence::new(2, prompt(2, 31)));
        let plan = step(&mut scheduler);
        assert_eq!(plan.failed[0].0, 1);
        assert!(plan.failed[0].1.contains("33 tokens") && plan.failed[0].1.contains("32"));
        assert_eq!(parts(&plan), [(2, 31)]);
        assert_eq!(parts(&step(&mut scheduler)), [(2, 1)]);
        let plan = step(&mut scheduler);
        assert_eq!((plan.failed[0].0, plan.scheduled.len()), (2, 0));
        assert_eq!(scheduler.blocks().num_used_blocks(), 0);
    }

    #[test]
    fn a_shared_prefix_is_computed_once() {
        let mut scheduler = scheduler(32, 8, 32);
        let with_end = |end| prompt(1, 48).into_iter().chain([end]).collect();
        scheduler.add(Sequence::new(1, with_end(1)));
        scheduler.add(Sequence::new(2, with_end(2)));
        scheduler.add(Sequence::new(3, prompt(3, 5)));
        // The second waits for the prefix; the third does not wait for the second.
        assert_eq!(parts(&step(&mut scheduler)), [(1, 32)]);
        assert_eq!(parts(&step(&mut scheduler)), [(1, 17), (3, 5)]);
        assert_eq!(parts(&step(&mut scheduler)), [(1, 1), (3, 1), (2, 1)]);
        assert_eq!(scheduler.running()[2].num_cached_tokens(), 48);
        let shared: Vec<BlockId> = scheduler.running()[0].block_table[..3].to_vec();
        assert_eq!(scheduler.running()[2].block_table[..3], shared);
        assert_ne!(scheduler.running()[2].block_table[3], scheduler.running()[0].block_table[3]);
    }

    #[test]
    fn shrinking_sends_the_younger_half_back() {
        let mut scheduler = scheduler(32, 8, 100);
        for id in 1..=4 {
            scheduler.add(Sequence::new(id, prompt(id as u32, 4)));
        }
        step(&mut scheduler);
        assert!(scheduler.shrink());
        assert_eq!(parts(&step(&mut scheduler)), [(1, 1), (2, 1)]);
        assert!(scheduler.shrink() && !scheduler.shrink());
    }

    #[test]
    fn a_prefix_that_many_share_is_computed_once() {
        let mut scheduler = scheduler(512, 32, 512);
        for id in 0..32 {
            let own = 5000 + id as u32 * 10..5008 + id as u32 * 10;
            scheduler.add(Sequence::new(id, prompt(1, 200).into_iter().chain(own).collect()));
        }
        let mut num_tokens = 0;
        while scheduler.running().iter().filter(|seq| !seq.generated().is_empty()).count() < 32 {
            num_tokens += step(&mut scheduler).num_tokens();
        }
        // Twelve whole blocks once, and of each its last 16 tokens; the first generates meanwhile.
        assert_eq!(num_tokens, 192 + 32 * 16 + 1);
    }

    #[test]
    fn sequences_without_memory_behind_their_blocks_go_back_and_end_in_what_is_left() {
        let mut scheduler = scheduler(32, 8, 200);
        for id in 1..=4 {
            scheduler.add(Sequence::new(id, prompt(id as u32, 40)));
        }
        step(&mut scheduler); // three blocks each
        scheduler.limit_blocks(7);
        let running: Vec<u64> = scheduler.running().iter().map(Sequence::id).collect();
        let waiting: Vec<u64> = scheduler.waiting.iter().map(Sequence::id).collect();
        assert_eq!((running, waiting), (vec![1, 2], vec![3, 4]));
        let mut ended = Vec::new();
        while !scheduler.running().is_empty() || scheduler.num_waiting() > 0 {
            assert!(step(&mut scheduler).failed.is_empty());
            assert!(scheduler.blocks().num_used_blocks() <= 7);
            let done = scheduler.running().iter().filter(|seq| seq.generated().len() > 20);
            for id in done.map(Sequence::id).collect::<Vec<_>>() {
                scheduler.remove(id);
                ended.push(id);
            }
        }
        assert_eq!(ended, [1, 2, 3, 4]);
    }

    proptest! {
        #[test]
        fn every_sequence_ends_whatever_the_cache_and_the_limits(
            requests in prop::collection::vec((0..3_u32, 1..90_usize, 1..40_usize), 1..20),
            num_blocks in 1_usize..12,
            max_num_seqs in 1_usize..6,
            budget in 1_usize..64,
        ) {
            let budget = budget.max(max_num_seqs);
            let mut scheduler = scheduler(num_blocks, max_num_seqs, budget);
            let mut ended = 0;
            for (id, (family, num_tokens, _)) in requests.iter().enumerate() {
                scheduler.add(Sequence::new(id as u64, prompt(*family, *num_tokens)));
            }
            for _ in 0..20_000 {
                if scheduler.running().is_empty() && scheduler.num_waiting() == 0 {
                    break;
                }
                let plan = step(&mut scheduler);
                let num_tokens = plan.num_tokens();
                prop_assert!(num_tokens <= budget);
                prop_assert!(num_tokens > 0 || !plan.failed.is_empty(), "a step does something");
                prop_assert!(scheduler.running().len() <= max_num_seqs);
                ended += plan.failed.len();
                for (id, (_, _, max_new_tokens)) in requests.iter().enumerate() {
                    let running = scheduler.running().iter().find(|seq| seq.id() == id as u64);
                    if running.is_some_and(|seq| seq.generated().len() >= *max_new_tokens) {
                        scheduler.remove(id as u64);
                        ended += 1;
                    }
                }
            }
            prop_assert_eq!(ended, requests.len());
            prop_assert_eq!(scheduler.blocks().num_used_blocks(), 0);
        }
    }
}
