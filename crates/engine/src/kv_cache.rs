//! The paged KV cache: memory for keys and values, block by block.
//!
//! Numbers are rounded to the cache's dtype when they are written, so that it makes no difference when, or
//! from whose cache, they are read. Who owns which block is the block manager's affair. The forward pass
//! writes here, attention reads.

use half::{bf16, f16};

use crate::Error;
use crate::config::ModelConfig;
use crate::kernels::{Bf16Lanes, F16Lanes, I8Lanes, LANES, Lanes, Stored, Zeroed};
use crate::precision::KvCacheDtype;
use crate::step::{BLOCK_SIZE, BlockId};

// Keys of a block are the lanes of a vector.
const _: () = assert!(BLOCK_SIZE == LANES);

/// Largest whole number of 8 bits that is used, either side of 0.
const MAX_Q8: f32 = 127.0;

/// Memory that is looked for at a time, so that not every step has to.
const BACKING_BYTES: usize = 32 << 20;

/// Free memory that is left to everything else, at most; of little, a quarter.
const RESERVE_BYTES: u64 = 64 << 20;

/// Keys and values of every layer.
#[derive(Debug)]
pub(crate) struct KvCache {
    layers: Vec<LayerCache>,
    num_blocks: usize,
    /// Blocks, the first ones, for which there was memory when it was looked for.
    num_backed: usize,
    block_bytes: usize,
}

/// Keys and values of one layer.
#[derive(Debug)]
pub(crate) enum LayerCache {
    Fp32(Pages<Lanes>),
    Fp16(Pages<F16Lanes>),
    Bf16(Pages<Bf16Lanes>),
    Q8(Pages<I8Lanes>),
}

/// Sixteen numbers as a cache keeps them.
pub(crate) trait Cached: Stored {
    /// Whether each key and each value has a scale, that what is stored is multiplied by.
    const SCALED: bool;

    /// Rounds a number into a lane.
    fn set(&mut self, lane: usize, number: f32);
}

impl Cached for Lanes {
    const SCALED: bool = false;

    #[inline(always)]
    fn set(&mut self, lane: usize, number: f32) {
        self.0[lane] = number;
    }
}

impl Cached for F16Lanes {
    const SCALED: bool = false;

    #[inline(always)]
    fn set(&mut self, lane: usize, number: f32) {
        let max = f16::MAX.to_f32();
        let is_beyond = number.abs() > max && number.is_finite();
        let number = if is_beyond { max.copysign(number) } else { number };
        self.0[lane] = f16::from_f32(number).to_bits();
    }
}

impl Cached for Bf16Lanes {
    const SCALED: bool = false;

    #[inline(always)]
    fn set(&mut self, lane: usize, number: f32) {
        self.0[lane] = bf16::from_f32(number).to_bits();
    }
}

impl Cached for I8Lanes {
    const SCALED: bool = true;

    #[inline(always)]
    fn set(&mut self, lane: usize, number: f32) {
        self.0[lane] = number.round_ties_even() as i8;
    }
}

/// Keys and values of one layer, head by head and block by block.
///
/// Keys are `(num_kv_heads, num_blocks, head_dim, BLOCK_SIZE)`: one vector holds the same dimension of 16 keys.
/// Values are `(num_kv_heads, num_blocks, head_dim / 16, BLOCK_SIZE, 16)`: one vector holds 16 dimensions of
/// one value. Scales, where there are any, are `(num_kv_heads, num_blocks, BLOCK_SIZE)`.
#[derive(Debug)]
pub(crate) struct Pages<S> {
    keys: Zeroed<S>,
    values: Zeroed<S>,
    key_scales: Zeroed<Lanes>,
    value_scales: Zeroed<Lanes>,
    num_blocks: usize,
    head_dim: usize,
}

impl KvCache {
    /// A cache of `num_blocks` blocks.
    pub(crate) fn new(
        config: &ModelConfig,
        num_blocks: usize,
        dtype: KvCacheDtype,
    ) -> Result<Self, Error> {
        let layer = || {
            Ok(match dtype {
                KvCacheDtype::Fp32 => LayerCache::Fp32(Pages::new(config, num_blocks)?),
                KvCacheDtype::Fp16 => LayerCache::Fp16(Pages::new(config, num_blocks)?),
                KvCacheDtype::Bf16 => LayerCache::Bf16(Pages::new(config, num_blocks)?),
                KvCacheDtype::Q8 => LayerCache::Q8(Pages::new(config, num_blocks)?),
            })
        };
        let layers = (0..config.num_hidden_layers).map(|_| layer()).collect::<Result<_, _>>();
        let layers = layers.map_err(|_: std::io::Error| {
            let bytes = bytes_per_block(config, dtype) as u128 * num_blocks as u128;
            Error::OutOfMemory(format!(
                "no room for a KV cache of {num_blocks} blocks ({bytes} bytes)"
            ))
        })?;
        let block_bytes = bytes_per_block(config, dtype);
        Ok(Self { layers, num_blocks, num_backed: 0, block_bytes })
    }

    /// Sees to it that the first `num_blocks` can be written to.
    ///
    /// The system gives memory when it is written to, and ends a process for which it has none. So it is asked
    /// before; if it has too little, the cache ends here from now on ([`Error::OutOfMemory`]).
    pub(crate) fn back(
        &mut self,
        num_blocks: usize,
        available_memory: impl Fn() -> Option<u64>,
    ) -> Result<(), Error> {
        if num_blocks <= self.num_backed {
            return Ok(());
        }
        let available = available_memory().unwrap_or(u64::MAX);
        let usable = available - RESERVE_BYTES.min(available / 4);
        let num_more = usize::try_from(usable / self.block_bytes as u64).unwrap_or(usize::MAX);
        let ahead = num_blocks.saturating_add(BACKING_BYTES / self.block_bytes);
        let possible = self.num_backed.saturating_add(num_more);
        self.num_backed = self.num_backed.max(ahead.min(possible).min(self.num_blocks));
        if num_blocks <= self.num_backed {
            return Ok(());
        }
        self.num_blocks = self.num_backed;
        Err(Error::OutOfMemory(format!(
            "{available} bytes are free, the next blocks of the KV cache have {} each",
            self.block_bytes
        )))
    }

    /// Blocks it has.
    pub(crate) fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// A layer, to write.
    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }
}

/// Memory of one block: keys and values of 16 tokens in every layer.
pub(crate) fn bytes_per_block(config: &ModelConfig, dtype: KvCacheDtype) -> usize {
    let bytes = match dtype {
        KvCacheDtype::Fp32 => Pages::<Lanes>::bytes_per_block(config.head_dim),
        KvCacheDtype::Fp16 => Pages::<F16Lanes>::bytes_per_block(config.head_dim),
        KvCacheDtype::Bf16 => Pages::<Bf16Lanes>::bytes_per_block(config.head_dim),
        KvCacheDtype::Q8 => Pages::<I8Lanes>::bytes_per_block(config.head_dim),
    };
    config.num_hidden_layers * config.num_key_value_heads * bytes
}

impl<S: Cached> Pages<S> {
    fn new(config: &ModelConfig, num_blocks: usize) -> std::io::Result<Self> {
        let (head_dim, blocks) = (config.head_dim, config.num_key_value_heads * num_blocks);
        let num_scales = if S::SCALED { blocks } else { 0 };
        Ok(Self {
            keys: Zeroed::new(blocks * head_dim)?,
            values: Zeroed::new(blocks * head_dim.next_multiple_of(LANES))?,
            key_scales: Zeroed::new(num_scales)?,
            value_scales: Zeroed::new(num_scales)?,
            num_blocks,
            head_dim,
        })
    }

    /// Memory of a block of one head.
    fn bytes_per_block(head_dim: usize) -> usize {
        let numbers = (head_dim + head_dim.next_multiple_of(LANES)) * size_of::<S>();
        numbers + if S::SCALED { 2 * size_of::<Lanes>() } else { 0 }
    }

    /// What one head keeps, to write: each head in turn.
    pub(crate) fn heads_mut(&mut self) -> impl Iterator<Item = HeadMut<'_, S>> {
        let (head_dim, num_blocks) = (self.head_dim, self.num_blocks);
        let keys = self.keys.chunks_exact_mut(num_blocks * head_dim);
        let values = self.values.chunks_exact_mut(num_blocks * head_dim.next_multiple_of(LANES));
        let key_scales = self.key_scales.chunks_exact_mut(num_blocks);
        let scales = key_scales.zip(self.value_scales.chunks_exact_mut(num_blocks));
        let scales = scales.map(Some).chain(std::iter::repeat_with(|| None));
        keys.zip(values).zip(scales).map(move |((keys, values), scales)| HeadMut {
            keys,
            values,
            scales,
            head_dim,
        })
    }

    /// Keys of a block: `(head_dim, BLOCK_SIZE)`.
    #[inline(always)]
    pub(crate) fn keys(&self, head: usize, block: BlockId) -> &[S] {
        let block = head * self.num_blocks + block.0 as usize;
        &self.keys[block * self.head_dim..][..self.head_dim]
    }

    /// 16 dimensions of the values of a block: `(BLOCK_SIZE, 16)`.
    #[inline(always)]
    pub(crate) fn values(&self, head: usize, block: BlockId, group: usize) -> &[S] {
        let groups = self.head_dim.div_ceil(LANES);
        let block = head * self.num_blocks + block.0 as usize;
        &self.values[(block * groups + group) * BLOCK_SIZE..][..BLOCK_SIZE]
    }

    /// All dimensions of the values of a block: `(head_dim / 16, BLOCK_SIZE, 16)`.
    #[inline(always)]
    pub(crate) fn all_values(&self, head: usize, block: BlockId) -> &[S] {
        let len = self.head_dim.div_ceil(LANES) * BLOCK_SIZE;
        &self.values[(head * self.num_blocks + block.0 as usize) * len..][..len]
    }

    /// Scales of the keys of a block, of a dtype that has such.
    #[inline(always)]
    pub(crate) fn key_scales(&self, head: usize, block: BlockId) -> &Lanes {
        &self.key_scales[head * self.num_blocks + block.0 as usize]
    }

    /// Scales of the values of a block, of a dtype that has such.
    #[inline(always)]
    pub(crate) fn value_scales(&self, head: usize, block: BlockId) -> &Lanes {
        &self.value_scales[head * self.num_blocks + block.0 as usize]
    }
}

/// What one head of one layer keeps.
pub(crate) struct HeadMut<'a, S> {
    keys: &'a mut [S],
    values: &'a mut [S],
    /// Of keys and of values.
    scales: Option<(&'a mut [Lanes], &'a mut [Lanes])>,
    head_dim: usize,
}

impl<S: Cached> HeadMut<'_, S> {
    /// Writes key and value of the token at `offset` in `block`.
    #[inline(always)]
    pub(crate) fn write(&mut self, (block, offset): (BlockId, usize), key: &[f32], value: &[f32]) {
        let block = block.0 as usize;
        let (mut key_inverse, mut value_inverse) = (1.0, 1.0);
        if let Some((key_scales, value_scales)) = &mut self.scales {
            (key_scales[block].0[offset], key_inverse) = scale(key);
            (value_scales[block].0[offset], value_inverse) = scale(value);
        }
        let keys = &mut self.keys[block * self.head_dim..][..self.head_dim];
        for (lanes, key) in keys.iter_mut().zip(key) {
            lanes.set(offset, key * key_inverse);
        }
        let groups = self.head_dim.div_ceil(LANES);
        for (group, value) in value.chunks(LANES).enumerate() {
            let lanes = &mut self.values[(block * groups + group) * BLOCK_SIZE + offset];
            for (lane, value) in value.iter().enumerate() {
                lanes.set(lane, value * value_inverse);
            }
        }
    }
}

/// The scale of whole numbers that reach to the largest of `numbers`, and its inverse.
///
/// The scale is NaN if one of them is no finite number, so that this is not lost.
#[inline(always)]
fn scale(numbers: &[f32]) -> (f32, f32) {
    let (mut max, mut poison) = (0.0, 0.0);
    for x in numbers {
        max = if x.abs() > max { x.abs() } else { max };
        poison += x * 0.0;
    }
    // Numbers so small that the inverse is none are 0.
    let inverse = MAX_Q8 / max;
    if inverse.is_finite() { (max / MAX_Q8 + poison, inverse) } else { (poison, 0.0) }
}
