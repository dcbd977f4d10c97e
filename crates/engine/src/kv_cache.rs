//! The paged KV cache: memory for keys and values, block by block.
//!
//! Who owns which block is the block manager's affair. The forward pass writes here, attention reads.

use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

use crate::Error;
use crate::config::ModelConfig;
use crate::kernels::{LANES, Lanes};
use crate::step::{BLOCK_SIZE, BlockId};

// Keys of a block are the lanes of a vector.
const _: () = assert!(BLOCK_SIZE == LANES);

/// Keys and values of every layer.
#[derive(Debug)]
pub(crate) struct KvCache {
    layers: Vec<LayerCache>,
    num_blocks: usize,
}

/// Keys and values of one layer, head by head and block by block.
///
/// Keys are `(num_kv_heads, num_blocks, head_dim, BLOCK_SIZE)`: one vector holds the same dimension of 16 keys.
/// Values are `(num_kv_heads, num_blocks, head_dim / 16, BLOCK_SIZE, 16)`: one vector holds 16 dimensions of
/// one value.
#[derive(Debug)]
pub(crate) struct LayerCache {
    keys: Zeroed,
    values: Zeroed,
    num_blocks: usize,
    head_dim: usize,
}

impl KvCache {
    /// A cache of `num_blocks` blocks.
    pub(crate) fn new(config: &ModelConfig, num_blocks: usize) -> Result<Self, Error> {
        let heads = config.num_key_value_heads * num_blocks;
        let layers = (0..config.num_hidden_layers)
            .map(|_| {
                Ok(LayerCache {
                    keys: Zeroed::new(heads * config.head_dim)?,
                    values: Zeroed::new(heads * config.head_dim.next_multiple_of(LANES))?,
                    num_blocks,
                    head_dim: config.head_dim,
                })
            })
            .collect::<Result<_, _>>()
            .map_err(|_: std::io::Error| {
                let bytes = bytes_per_block(config) as u128 * num_blocks as u128;
                Error::OutOfMemory(format!(
                    "no room for a KV cache of {num_blocks} blocks ({bytes} bytes)"
                ))
            })?;
        Ok(Self { layers, num_blocks })
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
pub(crate) fn bytes_per_block(config: &ModelConfig) -> usize {
    let vectors = config.head_dim + config.head_dim.next_multiple_of(LANES);
    config.num_hidden_layers * config.num_key_value_heads * vectors * size_of::<Lanes>()
}

/// Vectors that are zero and not resident until they are written.
#[derive(Debug)]
struct Zeroed(MmapMut);

impl Zeroed {
    fn new(len: usize) -> std::io::Result<Self> {
        let bytes = len.checked_mul(size_of::<Lanes>()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        MmapMut::map_anon(bytes.max(1)).map(Self)
    }
}

impl Deref for Zeroed {
    type Target = [Lanes];

    #[expect(unsafe_code, reason = "bytes of a mapping as vectors")]
    fn deref(&self) -> &[Lanes] {
        // SAFETY: any bytes are valid numbers; a mapping begins at a page, so nothing is cut off in front.
        let (_, lanes, _) = unsafe { self.0.align_to() };
        lanes
    }
}

impl DerefMut for Zeroed {
    #[expect(unsafe_code, reason = "bytes of a mapping as vectors")]
    fn deref_mut(&mut self) -> &mut [Lanes] {
        // SAFETY: as above, and any numbers are valid bytes.
        let (_, lanes, _) = unsafe { self.0.align_to_mut() };
        lanes
    }
}

impl LayerCache {
    /// What one head keeps, to write: `(keys, values)` of each head in turn.
    pub(crate) fn heads_mut(&mut self) -> impl Iterator<Item = HeadMut<'_>> {
        let head_dim = self.head_dim;
        let value_vectors = head_dim.next_multiple_of(LANES);
        let keys = self.keys.chunks_exact_mut(self.num_blocks * head_dim);
        let values = self.values.chunks_exact_mut(self.num_blocks * value_vectors);
        keys.zip(values).map(move |(keys, values)| HeadMut { keys, values, head_dim })
    }

    /// Keys of a block: `(head_dim, BLOCK_SIZE)`.
    #[inline(always)]
    pub(crate) fn keys(&self, head: usize, block: BlockId) -> &[Lanes] {
        let block = head * self.num_blocks + block.0 as usize;
        &self.keys[block * self.head_dim..][..self.head_dim]
    }

    /// 16 dimensions of the values of a block: `(BLOCK_SIZE, 16)`.
    #[inline(always)]
    pub(crate) fn values(&self, head: usize, block: BlockId, group: usize) -> &[Lanes] {
        let groups = self.head_dim.div_ceil(LANES);
        let block = head * self.num_blocks + block.0 as usize;
        &self.values[(block * groups + group) * BLOCK_SIZE..][..BLOCK_SIZE]
    }
}

/// What one head of one layer keeps.
pub(crate) struct HeadMut<'a> {
    keys: &'a mut [Lanes],
    values: &'a mut [Lanes],
    head_dim: usize,
}

impl HeadMut<'_> {
    /// Writes key and value of the token at `offset` in `block`.
    #[inline(always)]
    pub(crate) fn write(&mut self, (block, offset): (BlockId, usize), key: &[f32], value: &[f32]) {
        let block = block.0 as usize;
        let keys = &mut self.keys[block * self.head_dim..][..self.head_dim];
        for (lanes, key) in keys.iter_mut().zip(key) {
            lanes.0[offset] = *key;
        }
        let groups = self.head_dim.div_ceil(LANES);
        for (group, value) in value.chunks(LANES).enumerate() {
            let lanes = &mut self.values[(block * groups + group) * BLOCK_SIZE + offset];
            lanes.0[..value.len()].copy_from_slice(value);
        }
    }
}
