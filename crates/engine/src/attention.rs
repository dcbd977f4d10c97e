//! Causal attention over the paged KV cache: one kernel for all sequences of a step.
//!
//! Reads keys and values where they lie, through the block tables. What a query sums, and in which
//! order, depends on nothing but its position: so neither chunks, blocks, batch nor threads change a bit.
//! Called by the decoder, layer by layer.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::config::ModelConfig;
use crate::kernels::{
    Cpu, Finish, Kernel, LANES, Lanes, Operand, Product, Rows, SharedRows, Tiled, Vector,
    accumulate, fetch, for_each_tile, rms_norm_row, rope_row, softcap_row, softmax_row,
};
use crate::kv_cache::{Cached, HeadMut, LayerCache, Pages};
use crate::model::rope::RopeTable;
use crate::step::{BLOCK_SIZE, BlockId, SequenceInput, StepInput};

/// Queries (tokens by heads that share a key) of one piece of work.
const PIECE_QUERIES: usize = 32;

/// Tokens from which on writing keys and values is shared out.
const MIN_SHARED_WRITES: usize = 64;

/// Blocks that keys are fetched ahead of their use.
const KEYS_AHEAD: usize = 4;

/// Heads whose writing is shared out together.
const SHARED_HEADS: usize = 16;

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
    spans: Vec<Span>,
}

/// Queries, and keys from some block on that all of them see.
#[derive(Clone, Debug)]
struct Span {
    rows: Range<usize>,
    first_block: usize,
    num_keys: usize,
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
        // So many at a time, so that nothing is allocated.
        let mut heads = pages.heads_mut().enumerate();
        loop {
            let mut some: [_; SHARED_HEADS] = std::array::from_fn(|_| heads.next());
            cpu.threads.share_chunks(&mut some, 1, |_, (): &mut (), head| {
                if let Some((head, cache)) = &mut head[0] {
                    write(*head, cache);
                }
            });
            if some[SHARED_HEADS - 1].is_none() {
                return;
            }
        }
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
struct Keys<'a, S> {
    blocks: Blocks<'a, S>,
    /// Whether they are read once only, so that nothing but fetching them ahead hides the way from memory.
    is_once: bool,
}

impl<S: Cached> Operand for Keys<'_, S> {
    type Stored = S;

    #[inline(always)]
    fn num_segments(&self) -> usize {
        1
    }

    #[inline(always)]
    fn segment(&self, panel: usize, _segment: usize) -> &[S] {
        self.blocks.cache.keys(self.blocks.head, self.blocks.table[panel])
    }

    /// The values of the same block, which come behind all keys, and the keys of the next blocks: one block does
    /// not lie behind the other, so the processor doesn't see what comes.
    #[inline(always)]
    fn fetch_ahead(&self, panel: usize) {
        let Blocks { cache, head, table } = self.blocks;
        if self.is_once {
            fetch::<_, false>(cache.all_values(head, table[panel]));
            if let Some(block) = table.get(panel + KEYS_AHEAD) {
                fetch::<_, true>(cache.keys(head, *block));
            }
        }
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
        let Scratch { queries, scores, sums, spans } = self.scratch;

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
            w: Keys { blocks, is_once: num_tokens == 1 },
            panels: 0..num_blocks,
            out: SharedRows::new(scores, width, score_stride),
            finish: Finish::Store,
        }
        .run::<V>();

        // Keys before a query's window weigh nothing, which adds nothing to its sums.
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
        let seen_by_all = first_position + 1 - skipped;
        lay_out(spans, (num_tokens, group), (seen_by_all, num_blocks));
        let weights = Rows::new(scores, score_stride);
        let sums_out = SharedRows::new(sums, padded_dim, query_stride);
        // The only place that sums: it is compiled for every shape of a tile.
        for Span { rows, first_block, num_keys } in spans.drain(..) {
            let mut sum = WeightedSum { blocks, first_block, num_keys, weights, sums: sums_out };
            for_each_tile::<V>(&mut sum, rows, 0..padded_dim / LANES);
        }
        for (row, total) in totals.iter().enumerate() {
            let sum = &sums[row * query_stride..][..padded_dim];
            let column = (self.head * group + row % group) * dim;
            // SAFETY: these tokens and heads are this piece's alone.
            let out = unsafe { self.out.slice_mut(first_token + row / group, column, dim) };
            out.iter_mut().zip(sum).for_each(|(out, sum)| *out = *sum * (1.0 / total));
        }
    }
}

/// Which queries see which keys: what every query sees is one span of all of them, the rest goes block by block.
fn lay_out(
    spans: &mut Vec<Span>,
    (num_tokens, group): (usize, usize),
    (seen_by_all, num_blocks): (usize, usize),
) {
    let num_queries = num_tokens * group;
    let num_keys =
        if num_tokens == 1 { seen_by_all } else { seen_by_all / BLOCK_SIZE * BLOCK_SIZE };
    spans.clear();
    spans.push(Span { rows: 0..num_queries, first_block: 0, num_keys });
    for block in num_keys.div_ceil(BLOCK_SIZE)..num_blocks {
        let start = block * BLOCK_SIZE;
        // Tokens from here on see some of the block's keys; those from there on all.
        let some = (start + 1).saturating_sub(seen_by_all).min(num_tokens);
        let all = (start + BLOCK_SIZE).saturating_sub(seen_by_all).min(num_tokens);
        spans.extend((some..all).map(|token| Span {
            rows: token * group..(token + 1) * group,
            first_block: block,
            num_keys: seen_by_all + token - start,
        }));
        let rows = all * group..num_queries;
        spans.push(Span { rows, first_block: block, num_keys: BLOCK_SIZE });
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

/// Values, weighted and summed in the order of their keys: 16 dimensions a panel.
struct WeightedSum<'a, S> {
    blocks: Blocks<'a, S>,
    /// Where the keys begin. Unless it is the first of all, they are added to the sums that are there.
    first_block: usize,
    num_keys: usize,
    weights: Rows<'a>,
    sums: SharedRows<'a>,
}

impl<S: Cached> Tiled for WeightedSum<'_, S> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "rows of scratch are read and written through one view")]
    #[expect(clippy::needless_range_loop, reason = "closures are not inlined into large functions")]
    fn tile<V: Vector, const R: usize, const P: usize>(&mut self, row: usize, panel: usize) {
        let Self { blocks: Blocks { cache, head, table }, first_block, num_keys, .. } = *self;
        let mut sums = [[V::zero(); P]; R];
        let mut lanes = Lanes::ZERO;
        if first_block > 0 {
            for r in 0..R {
                for p in 0..P {
                    // SAFETY: the scratch is this thread's alone, and nothing else of it is held.
                    let sum = unsafe { self.sums.slice_mut(row + r, (panel + p) * LANES, LANES) };
                    lanes.0.copy_from_slice(sum);
                    sums[r][p] = V::load(&lanes);
                }
            }
        }
        let mut done = 0;
        while done < num_keys {
            let len = BLOCK_SIZE.min(num_keys - done);
            let mut weights: [&[f32]; R] = [&[]; R];
            let mut values: [&[S]; P] = [&[]; P];
            for r in 0..R {
                weights[r] = self.weights.slice(row + r, first_block * BLOCK_SIZE + done, len);
            }
            for p in 0..P {
                values[p] = cache.values(head, table[first_block + done / BLOCK_SIZE], panel + p);
            }
            accumulate(&mut sums, weights, values, len);
            done += len;
        }
        for r in 0..R {
            for p in 0..P {
                sums[r][p].store(&mut lanes);
                // SAFETY: as above.
                let sum = unsafe { self.sums.slice_mut(row + r, (panel + p) * LANES, LANES) };
                sum.copy_from_slice(&lanes.0);
            }
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
