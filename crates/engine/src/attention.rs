//! Causal attention over the paged KV cache: one kernel for all sequences of a step.
//!
//! Reads keys and values where they lie, through the block tables. What a query sums, and in which
//! order, depends on nothing but its position: so neither chunks, blocks, batch nor threads change a bit.
//! Called by the decoder, layer by layer.

use std::sync::{Mutex, PoisonError};

use crate::config::ModelConfig;
use crate::kernels::{
    Cpu, Finish, Kernel, LANES, Lanes, Operand, Product, Rows, SharedRows, Vector, accumulate,
    rms_norm_row, rope_row, softcap_row, softmax_row,
};
use crate::kv_cache::{Cached, HeadMut, LayerCache, Pages};
use crate::model::rope::RopeTable;
use crate::step::{BLOCK_SIZE, BlockId, SequenceInput, StepInput};

/// Queries (tokens by heads that share a key) of one piece of work.
const PIECE_QUERIES: usize = 32;

/// Tokens from which on writing keys and values is shared out.
const MIN_SHARED_WRITES: usize = 64;

/// Numbers between the ends of rows of scratch, so that they don't share cache sets.
const ROW_PADDING: usize = 16;

/// What a step's attention needs in every layer.
#[derive(Debug)]
pub(crate) struct Attention {
    tokens: Vec<Token>,
    pieces: Vec<Piece>,
    work: usize,
    scratch: Vec<Mutex<Scratch>>,
}

/// Where a token of the step stands and is kept.
#[derive(Clone, Copy, Debug)]
struct Token {
    position: usize,
    is_long: bool,
    block: BlockId,
    offset: usize,
}

/// Some consecutive tokens of one sequence.
#[derive(Clone, Copy, Debug)]
struct Piece {
    sequence: usize,
    first_token: usize,
    num_tokens: usize,
    first_position: usize,
}

/// Memory of one thread.
#[derive(Debug, Default)]
struct Scratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
    sums: Vec<f32>,
}

/// What one layer brings along.
#[derive(Clone, Copy)]
pub(crate) struct LayerInput<'a> {
    /// The model.
    pub(crate) config: &'a ModelConfig,
    /// Angles of every position.
    pub(crate) rope: &'a RopeTable,
    /// Tokens that a token sees, itself included; all before it if `None`.
    pub(crate) sliding_window: Option<usize>,
    /// Weights of the norms of queries and keys, where the model has them.
    pub(crate) qk_norm: Option<(&'a [f32], &'a [f32])>,
    /// Queries, keys and values: `(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)`.
    pub(crate) qkv: Rows<'a>,
}

impl Attention {
    /// Attention on so many threads.
    pub(crate) fn new(num_threads: usize) -> Self {
        let scratch = (0..num_threads).map(|_| Mutex::default()).collect();
        Self { tokens: Vec::new(), pieces: Vec::new(), work: 0, scratch }
    }

    /// Lays out the step; before the first layer.
    pub(crate) fn plan(&mut self, config: &ModelConfig, input: &StepInput) {
        self.tokens.clear();
        self.pieces.clear();
        self.work = 0;
        let piece_tokens = (PIECE_QUERIES / config.heads_per_kv_head()).max(1);
        for (index, sequence) in input.sequences.iter().enumerate() {
            let first_token = self.tokens.len();
            let first = sequence.num_computed_tokens;
            let end = first + sequence.num_scheduled_tokens;
            self.tokens.extend((first..end).map(|position| Token {
                position,
                is_long: sequence.is_long,
                block: sequence.block_table[position / BLOCK_SIZE],
                offset: position % BLOCK_SIZE,
            }));
            self.pieces.extend((first..end).step_by(piece_tokens).map(|position| Piece {
                sequence: index,
                first_token: first_token + position - first,
                num_tokens: piece_tokens.min(end - position),
                first_position: position,
            }));
            self.work += (end - first) * (first + end) * config.query_width();
        }
    }

    /// Rotates the step's keys and writes them and the values to the cache.
    pub(crate) fn write(&self, cpu: &Cpu, layer: LayerInput<'_>, cache: &mut LayerCache) {
        match cache {
            LayerCache::Fp32(pages) => self.write_pages(cpu, layer, pages),
            LayerCache::Fp16(pages) => self.write_pages(cpu, layer, pages),
            LayerCache::Bf16(pages) => self.write_pages(cpu, layer, pages),
            LayerCache::Q8(pages) => self.write_pages(cpu, layer, pages),
        }
    }

    fn write_pages<S: Cached>(&self, cpu: &Cpu, layer: LayerInput<'_>, pages: &mut Pages<S>) {
        let tokens = &self.tokens;
        let write = |head: usize, cache: &mut HeadMut<'_, S>| {
            cpu.simd.run(Write { layer, tokens, head, cache });
        };
        if tokens.len() < MIN_SHARED_WRITES {
            pages.heads_mut().enumerate().for_each(|(head, mut cache)| write(head, &mut cache));
            return;
        }
        let mut heads: Vec<_> = pages.heads_mut().collect();
        cpu.threads.share_chunks(&mut heads, 1, |head, (): &mut (), cache| {
            write(head, &mut cache[0]);
        });
    }

    /// Attends from every token of the step: `out` is `(num_tokens, num_heads * head_dim)`.
    pub(crate) fn attend(
        &self,
        cpu: &Cpu,
        layer: LayerInput<'_>,
        (input, cache): (&StepInput, &LayerCache),
        out: SharedRows<'_>,
    ) {
        match cache {
            LayerCache::Fp32(pages) => self.attend_pages(cpu, layer, (input, pages), out),
            LayerCache::Fp16(pages) => self.attend_pages(cpu, layer, (input, pages), out),
            LayerCache::Bf16(pages) => self.attend_pages(cpu, layer, (input, pages), out),
            LayerCache::Q8(pages) => self.attend_pages(cpu, layer, (input, pages), out),
        }
    }

    fn attend_pages<S: Cached>(
        &self,
        cpu: &Cpu,
        layer: LayerInput<'_>,
        (input, cache): (&StepInput, &Pages<S>),
        out: SharedRows<'_>,
    ) {
        let num_kv_heads = layer.config.num_key_value_heads;
        cpu.threads.share(self.pieces.len() * num_kv_heads, self.work, |index| {
            let piece = self.pieces[index / num_kv_heads];
            let scratch = &self.scratch[cpu.threads.current()];
            // A thread that panicked leaves nothing in its scratch that is read again.
            let mut scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
            cpu.simd.run(Attend {
                layer,
                piece,
                head: index % num_kv_heads,
                sequence: &input.sequences[piece.sequence],
                cache,
                scratch: &mut scratch,
                out,
            });
        });
    }
}

/// Writes one head's keys and values.
struct Write<'a, 'b, S> {
    layer: LayerInput<'a>,
    tokens: &'a [Token],
    head: usize,
    cache: &'a mut HeadMut<'b, S>,
}

impl<S: Cached> Kernel for Write<'_, '_, S> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let LayerInput { config, rope, qk_norm, qkv, .. } = self.layer;
        let dim = config.head_dim;
        let key_column = config.query_width() + self.head * dim;
        let mut key = [0.0; MAX_STACK_DIM];
        let mut long_key = Vec::new();
        let key = stack_or_heap(&mut key, &mut long_key, dim);
        for (row, token) in self.tokens.iter().enumerate() {
            let (cos, sin) = rope.at(token.position, token.is_long);
            let projected = qkv.slice(row, key_column, dim);
            match qk_norm {
                Some((_, weight)) => rms_norm_row(projected, weight, config.rms_norm_eps, key),
                None => key.copy_from_slice(projected),
            }
            rope_row(&mut key[..2 * cos.len()], cos, sin);
            let value = qkv.slice(row, key_column + config.kv_width(), dim);
            self.cache.write((token.block, token.offset), key, value);
        }
    }
}

/// Widest head whose key fits on the stack.
const MAX_STACK_DIM: usize = 256;

#[inline(always)]
fn stack_or_heap<'a>(stack: &'a mut [f32], heap: &'a mut Vec<f32>, len: usize) -> &'a mut [f32] {
    if len <= stack.len() {
        return &mut stack[..len];
    }
    heap.resize(len, 0.0);
    heap
}

/// One head's share of the cache, in the order of a sequence, from some block on.
#[derive(Clone, Copy)]
struct Blocks<'a, S> {
    cache: &'a Pages<S>,
    head: usize,
    table: &'a [BlockId],
}

impl<S: Cached> Blocks<'_, S> {
    /// Multiplies what belongs to the first keys by the keys' scales, if there are any.
    #[inline(always)]
    fn scale_by_keys(self, scores: &mut [f32]) {
        if S::SCALED {
            for (scores, block) in scores.chunks_mut(BLOCK_SIZE).zip(self.table) {
                multiply(scores, self.cache.key_scales(self.head, *block));
            }
        }
    }

    /// Multiplies what belongs to the first values by the values' scales, if there are any.
    #[inline(always)]
    fn scale_by_values(self, weights: &mut [f32]) {
        if S::SCALED {
            for (weights, block) in weights.chunks_mut(BLOCK_SIZE).zip(self.table) {
                multiply(weights, self.cache.value_scales(self.head, *block));
            }
        }
    }
}

#[inline(always)]
fn multiply(numbers: &mut [f32], scales: &Lanes) {
    for (number, scale) in numbers.iter_mut().zip(scales.0) {
        *number *= scale;
    }
}

/// Keys as a right-hand side: each block a panel of 16 columns, the head's dimensions in between.
#[derive(Clone, Copy)]
struct Keys<'a, S>(Blocks<'a, S>);

impl<S: Cached> Operand for Keys<'_, S> {
    type Stored = S;

    #[inline(always)]
    fn num_segments(&self) -> usize {
        1
    }

    #[inline(always)]
    fn segment(&self, panel: usize, _segment: usize) -> &[S] {
        self.0.cache.keys(self.0.head, self.0.table[panel])
    }
}

/// Values as a right-hand side: 16 dimensions a panel, the first keys in between, block by block.
#[derive(Clone, Copy)]
struct Values<'a, S> {
    blocks: Blocks<'a, S>,
    num_blocks: usize,
}

impl<S: Cached> Operand for Values<'_, S> {
    type Stored = S;

    #[inline(always)]
    fn num_segments(&self) -> usize {
        self.num_blocks
    }

    #[inline(always)]
    fn segment(&self, panel: usize, segment: usize) -> &[S] {
        self.blocks.cache.values(self.blocks.head, self.blocks.table[segment], panel)
    }
}

/// Some tokens of one sequence, and the query heads of one key head.
struct Attend<'a, S> {
    layer: LayerInput<'a>,
    piece: Piece,
    head: usize,
    sequence: &'a SequenceInput,
    cache: &'a Pages<S>,
    scratch: &'a mut Scratch,
    out: SharedRows<'a>,
}

impl<S: Cached> Kernel for Attend<'_, S> {
    /// Queries are rows, those of a token's heads side by side: `(num_tokens, heads_per_kv_head)`.
    #[inline(always)]
    #[expect(unsafe_code, reason = "several threads write disjoint heads of the same rows")]
    fn run<V: Vector>(self) {
        let LayerInput { config, sliding_window, .. } = self.layer;
        let Piece { first_token, num_tokens, first_position, .. } = self.piece;
        let (dim, group) = (config.head_dim, config.heads_per_kv_head());
        let num_queries = num_tokens * group;
        // Blocks that lie before all the windows are not looked at: block 0 is the first that is seen.
        let first_seen = |position: usize| {
            sliding_window.map_or(0, |window| (position + 1).saturating_sub(window))
        };
        let first_block = first_seen(first_position) / BLOCK_SIZE;
        let skipped = first_block * BLOCK_SIZE;
        let blocks = Blocks {
            cache: self.cache,
            head: self.head,
            table: &self.sequence.block_table[first_block..],
        };
        let num_blocks = (first_position + num_tokens - skipped).div_ceil(BLOCK_SIZE);
        let width = num_blocks * BLOCK_SIZE;
        let padded_dim = dim.next_multiple_of(LANES);
        let (query_stride, score_stride) = (padded_dim + ROW_PADDING, width + ROW_PADDING);
        grow(&mut self.scratch.queries, num_queries * query_stride);
        grow(&mut self.scratch.scores, num_queries * score_stride);
        grow(&mut self.scratch.sums, num_queries * query_stride);
        let Scratch { queries, scores, sums } = self.scratch;

        for (row, query) in queries.chunks_exact_mut(query_stride).take(num_queries).enumerate() {
            let column = (self.head * group + row % group) * dim;
            let position = first_position + row / group;
            let projected = self.layer.qkv.slice(first_token + row / group, column, dim);
            let angles = self.layer.rope.at(position, self.sequence.is_long);
            load_query(self.layer, projected, angles, &mut query[..dim]);
        }
        Product {
            x: Rows::new(queries, query_stride),
            rows: 0..num_queries,
            w: Keys(blocks),
            panels: 0..num_blocks,
            out: SharedRows::new(scores, width, score_stride),
            finish: Finish::Store,
        }
        .run::<V>();

        // What every query sees is multiplied for all of them, the rest query by query.
        // Keys before a query's window weigh nothing, which adds nothing to its sums.
        let common_blocks = (first_position + 1 - skipped) / BLOCK_SIZE;
        let mut totals = [0.0; PIECE_QUERIES];
        let mut many_totals = Vec::new();
        let totals = stack_or_heap(&mut totals, &mut many_totals, num_queries);
        for (row, total) in totals.iter_mut().enumerate() {
            let position = first_position + row / group;
            let scores = &mut scores[row * score_stride..][..position + 1 - skipped];
            blocks.scale_by_keys(scores);
            let first_seen = first_seen(position) - skipped;
            if let Some(cap) = config.attention_softcap {
                softcap_row(&mut scores[first_seen..], cap);
            }
            *total = softmax_row(scores, first_seen);
            blocks.scale_by_values(scores);
        }
        Product {
            x: Rows::new(scores, score_stride),
            rows: 0..num_queries,
            w: Values { blocks, num_blocks: common_blocks },
            panels: 0..padded_dim / LANES,
            out: SharedRows::new(sums, padded_dim, query_stride),
            finish: Finish::Store,
        }
        .run::<V>();
        for (row, total) in totals.iter().enumerate() {
            let position = first_position + row / group;
            let weights = &scores[row * score_stride..][..position + 1 - skipped];
            let sum = &mut sums[row * query_stride..][..padded_dim];
            add_values::<V, S>(blocks, common_blocks, weights, sum);
            let column = (self.head * group + row % group) * dim;
            // SAFETY: these tokens and heads are this piece's alone.
            let out = unsafe { self.out.slice_mut(first_token + row / group, column, dim) };
            let scale = 1.0 / total;
            for (out, sum) in out.iter_mut().zip(sum) {
                *out = *sum * scale;
            }
        }
    }
}

/// Norms, rotates and scales a query.
#[inline(always)]
fn load_query(
    layer: LayerInput<'_>,
    projected: &[f32],
    (cos, sin): (&[f32], &[f32]),
    query: &mut [f32],
) {
    match layer.qk_norm {
        Some((weight, _)) => rms_norm_row(projected, weight, layer.config.rms_norm_eps, query),
        None => query.copy_from_slice(projected),
    }
    rope_row(&mut query[..2 * cos.len()], cos, sin);
    for x in query {
        *x *= layer.config.attention_scale;
    }
}

/// Adds the weighted values from block `first_block` on to `sum`, in the order of the keys.
#[inline(always)]
fn add_values<V: Vector, S: Cached>(
    blocks: Blocks<'_, S>,
    first_block: usize,
    weights: &[f32],
    sum: &mut [f32],
) {
    for (block, weights) in weights.chunks(BLOCK_SIZE).enumerate().skip(first_block) {
        for (group, sum) in sum.chunks_exact_mut(LANES).enumerate() {
            let values = blocks.cache.values(blocks.head, blocks.table[block], group);
            let mut lanes = Lanes::ZERO;
            lanes.0.copy_from_slice(sum);
            let mut sums = [[V::load(&lanes)]];
            accumulate(&mut sums, [weights], [values], weights.len());
            sums[0][0].store(&mut lanes);
            sum.copy_from_slice(&lanes.0);
        }
    }
}

fn grow(memory: &mut Vec<f32>, len: usize) {
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
}

#[cfg(test)]
mod tests;
