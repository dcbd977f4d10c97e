//! The block manager: who owns which block of the KV cache.
//!
//! Plain data, no tensors. A block is owned by one or more sequences or it is free. Full blocks are known by
//! the hash of all tokens up to their end, so that a sequence with the same beginning takes them over instead
//! of computing them again; a free block keeps its content until it is needed for something else, the one
//! freed longest ago first. A block that is still to be written to is never shared. The scheduler calls it.
//!
//! Memory that no block was ever written to is not resident, so fresh blocks are used sparingly: free content
//! is overwritten once there is about as much of it as of what sequences own. The cache so stays as large as
//! the sequences that run at a time make it, however many pass.

use std::collections::{BTreeSet, HashMap};

use sha2::{Digest, Sha256};

use crate::step::{BLOCK_SIZE, BlockId, TokenId};

/// Names a full block by its tokens and all tokens before them: 128 bits of SHA-256, so that two different
/// prefixes are never taken for one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u8; 16]);

impl BlockHash {
    /// What the first block of a long sequence ([`crate::step::SequenceInput::is_long`]) follows.
    pub(crate) const LONG: Self = Self(*b"longer than that");

    /// The hash of a full block behind a parent.
    pub fn new(parent: Option<&BlockHash>, tokens: &[TokenId]) -> Self {
        let mut hasher = Sha256::new();
        if let Some(parent) = parent {
            hasher.update(parent.0);
        }
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        let digest = hasher.finalize();
        let mut hash = [0; 16];
        hash.copy_from_slice(&digest[..16]);
        Self(hash)
    }
}

/// What is known of a block.
#[derive(Clone, Debug, Default)]
struct Block {
    /// Sequences that own it; 0 is free.
    num_owners: u32,
    /// Its content, when it is full and findable.
    hash: Option<BlockHash>,
    /// When it was last freed: its key in the order of the free blocks.
    freed_at: u64,
}

/// Free content that is kept whatever the sequences own, in blocks: room for a few shared prefixes.
const MIN_KEPT_BLOCKS: usize = 64;

/// Owner book of the KV cache.
#[derive(Debug)]
pub struct BlockManager {
    blocks: Vec<Block>,
    /// Free, used before, without content that could be found.
    empty: Vec<BlockId>,
    /// Free, with content, by when they were freed.
    kept: BTreeSet<(u64, BlockId)>,
    /// Blocks from here on were never used.
    num_touched: usize,
    cached: HashMap<BlockHash, BlockId>,
    prefix_caching: bool,
    clock: u64,
}

impl BlockManager {
    /// A cache of so many blocks, all free.
    pub fn new(num_blocks: usize, prefix_caching: bool) -> Self {
        Self {
            blocks: vec![Block::default(); num_blocks],
            empty: Vec::new(),
            kept: BTreeSet::new(),
            num_touched: 0,
            cached: HashMap::new(),
            prefix_caching,
            clock: 0,
        }
    }

    /// Whether computed blocks are kept findable.
    pub fn prefix_caching(&self) -> bool {
        self.prefix_caching
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Number of blocks that nobody owns.
    pub fn num_free_blocks(&self) -> usize {
        self.empty.len() + self.kept.len() + self.blocks.len() - self.num_touched
    }

    /// Number of blocks that sequences own.
    pub fn num_used_blocks(&self) -> usize {
        self.num_touched - self.empty.len() - self.kept.len()
    }

    /// Blocks that so many tokens take.
    pub fn blocks_for(num_tokens: usize) -> usize {
        num_tokens.div_ceil(BLOCK_SIZE)
    }

    /// The cached blocks with which a sequence of these hashes begins.
    pub fn find_prefix(&self, hashes: &[BlockHash]) -> Vec<BlockId> {
        if !self.prefix_caching {
            return Vec::new();
        }
        hashes.iter().map_while(|hash| self.cached.get(hash).copied()).collect()
    }

    /// Gives a sequence its first blocks: a prefix from [`Self::find_prefix`], and fresh ones for the rest of
    /// `num_tokens`. `None`, and nothing changed, when fewer than `spare` blocks would stay free.
    pub fn allocate(
        &mut self,
        prefix: &[BlockId],
        num_tokens: usize,
        spare: usize,
    ) -> Option<Vec<BlockId>> {
        let num_fresh = Self::blocks_for(num_tokens).saturating_sub(prefix.len());
        let num_revived = prefix.iter().filter(|block| self.block(**block).num_owners == 0).count();
        if num_fresh + num_revived + spare > self.num_free_blocks() {
            return None;
        }
        let mut table = prefix.to_vec();
        for &block in prefix {
            self.share(block);
        }
        table.extend((0..num_fresh).filter_map(|_| self.take()));
        Some(table)
    }

    /// Grows a table until it holds `num_tokens`. `false`, and nothing changed, when blocks run out.
    pub fn grow(&mut self, table: &mut Vec<BlockId>, num_tokens: usize) -> bool {
        let missing = Self::blocks_for(num_tokens).saturating_sub(table.len());
        if missing > self.num_free_blocks() {
            return false;
        }
        table.extend((0..missing).filter_map(|_| self.take()));
        true
    }

    /// Makes a computed full block findable. Of two with the same content the first stays.
    pub fn publish(&mut self, block: BlockId, hash: BlockHash) {
        if !self.prefix_caching || self.block(block).hash.is_some() {
            return;
        }
        if let std::collections::hash_map::Entry::Vacant(entry) = self.cached.entry(hash) {
            entry.insert(block);
            self.blocks[block.0 as usize].hash = Some(hash);
        }
    }

    /// Takes all blocks of a sequence back. The last are the first to be reused: a prefix is worth more the
    /// shorter it is.
    pub fn release(&mut self, table: &mut Vec<BlockId>) {
        while let Some(id) = table.pop() {
            self.clock += 1;
            let block = &mut self.blocks[id.0 as usize];
            debug_assert!(block.num_owners > 0, "{id:?} is released but nobody owns it");
            block.num_owners -= 1;
            if block.num_owners > 0 {
                continue;
            }
            block.freed_at = self.clock;
            if block.hash.is_some() {
                self.kept.insert((self.clock, id));
            } else {
                self.empty.push(id);
            }
        }
    }

    /// Gives up the blocks from `num_blocks` on, which nobody owns.
    pub fn truncate(&mut self, num_blocks: usize) {
        let stays = |id: BlockId| (id.0 as usize) < num_blocks;
        for block in self.blocks.drain(num_blocks.min(self.blocks.len())..) {
            debug_assert_eq!(block.num_owners, 0, "a block is given up that somebody owns");
        }
        self.empty.retain(|id| stays(*id));
        self.kept.retain(|(_, id)| stays(*id));
        self.cached.retain(|_, id| stays(*id));
        self.num_touched = self.num_touched.min(num_blocks);
    }

    fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }

    /// One owner more for a block that has its content already.
    fn share(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        if block.num_owners == 0 {
            self.kept.remove(&(block.freed_at, id));
        }
        block.num_owners += 1;
    }

    /// A free block, emptied; `None` when there is none.
    fn take(&mut self) -> Option<BlockId> {
        let has_fresh = self.num_touched < self.blocks.len();
        let keeps_enough = self.kept.len() >= self.num_used_blocks().max(MIN_KEPT_BLOCKS);
        let id = if let Some(id) = self.empty.pop() {
            id
        } else if has_fresh && !keeps_enough {
            self.num_touched += 1;
            BlockId((self.num_touched - 1) as u32)
        } else {
            self.kept.pop_first()?.1
        };
        let block = &mut self.blocks[id.0 as usize];
        block.num_owners = 1;
        if let Some(hash) = block.hash.take() {
            self.cached.remove(&hash);
        }
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sequence::Sequence;

    fn ids(ids: impl IntoIterator<Item = u32>) -> Vec<BlockId> {
        ids.into_iter().map(BlockId).collect()
    }

    fn publish_all(manager: &mut BlockManager, sequence: &Sequence, table: &[BlockId]) {
        for (block, hash) in table.iter().zip(sequence.block_hashes()) {
            manager.publish(*block, *hash);
        }
    }

    #[test]
    fn blocks_are_given_in_order_and_taken_back() {
        let mut manager = BlockManager::new(4, true);
        let mut table = manager.allocate(&[], 33, 0).unwrap();
        assert_eq!(table, ids([0, 1, 2]));
        assert!(manager.grow(&mut table, 48) && table.len() == 3);
        assert!(manager.grow(&mut table, 49));
        assert_eq!(table, ids([0, 1, 2, 3]));
        assert!(!manager.grow(&mut table, 65));
        assert_eq!(table.len(), 4);
        manager.release(&mut table);
        assert_eq!((manager.num_free_blocks(), manager.num_used_blocks()), (4, 0));
    }

    #[test]
    fn allocation_leaves_the_spare_blocks_alone() {
        let mut manager = BlockManager::new(4, true);
        assert_eq!(manager.allocate(&[], 48, 2), None);
        assert_eq!(manager.num_free_blocks(), 4);
        assert_eq!(manager.allocate(&[], 48, 1), Some(ids([0, 1, 2])));
    }

    #[test]
    fn a_prefix_is_shared_and_survives_its_first_owner() {
        let mut manager = BlockManager::new(6, true);
        let first = Sequence::new(1, (0..40).collect());
        let mut table = manager.allocate(&[], 40, 0).unwrap();
        publish_all(&mut manager, &first, &table);
        let second = Sequence::new(2, (0..33).chain([7]).collect());
        let prefix = manager.find_prefix(second.shareable_hashes());
        assert_eq!(prefix, ids([0, 1]));
        let mut shared = manager.allocate(&prefix, 34, 0).unwrap();
        assert_eq!(shared, ids([0, 1, 3]));
        manager.release(&mut table);
        assert_eq!(manager.num_used_blocks(), 3);
        manager.release(&mut shared);
        assert_eq!(manager.find_prefix(second.shareable_hashes()), ids([0, 1]));
        assert_eq!(manager.num_free_blocks(), 6);
    }

    #[test]
    fn cached_blocks_are_evicted_longest_free_first_and_tail_first() {
        let mut manager = BlockManager::new(4, true);
        let old = Sequence::new(1, (0..32).collect());
        let new = Sequence::new(2, (100..132).collect());
        let mut old_table = manager.allocate(&[], 32, 0).unwrap();
        let mut new_table = manager.allocate(&[], 32, 0).unwrap();
        publish_all(&mut manager, &old, &old_table);
        publish_all(&mut manager, &new, &new_table);
        manager.release(&mut old_table);
        manager.release(&mut new_table);
        let mut taken = manager.allocate(&[], 16, 0).unwrap();
        assert_eq!(taken, ids([1])); // the tail of the old one
        assert_eq!(manager.find_prefix(old.block_hashes()), ids([0]));
        assert!(manager.grow(&mut taken, 32));
        assert_eq!(taken, ids([1, 0]));
        assert_eq!(manager.find_prefix(old.block_hashes()), ids([]));
        assert_eq!(manager.find_prefix(new.block_hashes()), ids([2, 3]));
    }

    #[test]
    fn a_free_prefix_counts_against_the_free_blocks() {
        let mut manager = BlockManager::new(2, true);
        let sequence = Sequence::new(1, (0..17).collect());
        let mut table = manager.allocate(&[], 17, 0).unwrap();
        publish_all(&mut manager, &sequence, &table);
        manager.release(&mut table);
        let prefix = manager.find_prefix(sequence.shareable_hashes());
        assert_eq!(manager.allocate(&prefix, 33, 0), None);
        assert_eq!(manager.allocate(&prefix, 17, 0), Some(ids([0, 1])));
    }

    #[test]
    fn the_second_of_two_equal_blocks_stays_private() {
        let mut manager = BlockManager::new(2, true);
        let sequence = Sequence::new(1, (0..16).collect());
        let first = manager.allocate(&[], 16, 0).unwrap();
        let mut second = manager.allocate(&[], 16, 0).unwrap();
        publish_all(&mut manager, &sequence, &first);
        publish_all(&mut manager, &sequence, &second);
        assert_eq!(manager.find_prefix(sequence.block_hashes()), ids([0]));
        manager.release(&mut second);
        assert_eq!(manager.find_prefix(sequence.block_hashes()), ids([0]));
    }

    #[test]
    fn passing_sequences_do_not_touch_ever_more_blocks() {
        let mut manager = BlockManager::new(10_000, true);
        for first in 0..5_000 {
            let sequence = Sequence::new(u64::from(first), (first * 100..).take(33).collect());
            let mut table = manager.allocate(&[], 33, 0).unwrap();
            publish_all(&mut manager, &sequence, &table);
            manager.release(&mut table);
        }
        assert!(manager.num_touched <= MIN_KEPT_BLOCKS + 3, "{}", manager.num_touched);
        let all = manager.allocate(&[], 10_000 * BLOCK_SIZE, 0);
        assert_eq!(all.map(|table| table.len()), Some(10_000));
    }

    #[test]
    fn without_prefix_caching_nothing_is_found() {
        let mut manager = BlockManager::new(2, false);
        let sequence = Sequence::new(1, (0..16).collect());
        let table = manager.allocate(&[], 16, 0).unwrap();
        publish_all(&mut manager, &sequence, &table);
        assert_eq!(manager.find_prefix(sequence.block_hashes()), ids([]));
    }

    #[test]
    fn a_hash_depends_on_everything_before_the_block() {
        let tokens: Vec<TokenId> = (0..16).collect();
        let root = BlockHash::new(None, &tokens);
        assert_ne!(root, BlockHash::new(Some(&root), &tokens));
        assert_eq!(root, BlockHash::new(None, &tokens));
    }

    #[test]
    fn blocks_that_are_given_up_are_neither_free_nor_found() {
        let mut manager = BlockManager::new(8, true);
        let first = Sequence::new(1, (0..48).collect());
        let second = Sequence::new(2, (100..148).collect());
        let mut table = manager.allocate(&[], 48, 0).unwrap();
        let mut other = manager.allocate(&[], 48, 0).unwrap();
        publish_all(&mut manager, &first, &table);
        publish_all(&mut manager, &second, &other);
        manager.release(&mut other);
        manager.truncate(4);
        assert_eq!((manager.num_blocks(), manager.num_free_blocks()), (4, 1));
        assert_eq!(manager.find_prefix(second.block_hashes()), ids([3]));
        let mut holder = first;
        holder.block_table.clone_from(&table);
        check(&manager, &[holder]);
        assert!(!manager.grow(&mut table, 80) && manager.grow(&mut table, 64));
        assert_eq!(table, ids([0, 1, 2, 3]));
    }

    /// What may happen to a sequence; the numbers choose which.
    #[derive(Clone, Debug)]
    enum Action {
        Admit { family: u32, num_tokens: usize },
        Append(usize),
        Drop(usize),
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            (0..3_u32, 1..80_usize)
                .prop_map(|(family, num_tokens)| Action::Admit { family, num_tokens }),
            (0..8_usize).prop_map(Action::Append),
            (0..8_usize).prop_map(Action::Drop),
        ]
    }

    fn check(manager: &BlockManager, live: &[Sequence]) {
        let mut owners = vec![0; manager.num_blocks()];
        for sequence in live {
            for block in &sequence.block_table {
                owners[block.0 as usize] += 1;
            }
            // A block that is not full has exactly one owner.
            if sequence.num_tokens() % BLOCK_SIZE != 0 {
                let last = sequence.block_table[sequence.num_tokens() / BLOCK_SIZE];
                assert_eq!(manager.block(last).num_owners, 1);
            }
        }
        for (index, block) in manager.blocks.iter().enumerate() {
            let id = BlockId(index as u32);
            assert_eq!(block.num_owners, owners[index], "owners of {id:?}");
            let is_free = index >= manager.num_touched
                || manager.empty.contains(&id)
                || manager.kept.contains(&(block.freed_at, id));
            assert_eq!(is_free, block.num_owners == 0, "{id:?} is free or owned");
        }
        let num_free = manager.blocks.iter().filter(|block| block.num_owners == 0).count();
        assert_eq!(num_free, manager.num_free_blocks());
        for (hash, block) in &manager.cached {
            assert_eq!(manager.block(*block).hash, Some(*hash));
        }
    }

    fn admit(manager: &mut BlockManager, live: &mut Vec<Sequence>, family: u32, num_tokens: usize) {
        let first = family * 1000;
        let mut sequence = Sequence::new(0, (first..first + num_tokens as u32).collect());
        let prefix = manager.find_prefix(sequence.shareable_hashes());
        if let Some(table) = manager.allocate(&prefix, num_tokens, 0) {
            publish_all(manager, &sequence, &table);
            sequence.block_table = table;
            live.push(sequence);
        }
    }

    proptest! {
        #[test]
        fn each_block_is_free_or_owned_and_nothing_leaks(
            actions in prop::collection::vec(action(), 1..150),
            num_blocks in 1_usize..12,
        ) {
            let mut manager = BlockManager::new(num_blocks, true);
            let mut live: Vec<Sequence> = Vec::new();
            for action in actions {
                match action {
                    Action::Admit { family, num_tokens } => {
                        admit(&mut manager, &mut live, family, num_tokens);
                    }
                    Action::Append(index) if index < live.len() => {
                        let sequence = &mut live[index];
                        let num_tokens = sequence.num_tokens() + 1;
                        if manager.grow(&mut sequence.block_table, num_tokens) {
                            sequence.push(num_tokens as u32);
                            let table = sequence.block_table.clone();
                            publish_all(&mut manager, sequence, &table);
                        }
                    }
                    Action::Drop(index) if index < live.len() => {
                        manager.release(&mut live.swap_remove(index).block_table);
                    }
                    Action::Append(_) | Action::Drop(_) => {}
                }
                check(&manager, &live);
            }
            for mut sequence in live {
                manager.release(&mut sequence.block_table);
            }
            prop_assert_eq!(manager.num_free_blocks(), num_blocks);
        }
    }
}
