//! GGUF's block formats: some numbers share a scale, each is a few bits of its own.
//!
//! Every format is the same formula with other widths: a block is taken apart into whole numbers and
//! scales (`layout`), and a weight is `scale * scales[group] * (quant - zero) - min * mins[group]`. All
//! products are exact in `f32`, so whoever evaluates it, in whatever order, gets the same bits. How
//! scales are chosen when weights are quantised is in `search`. Not here: how blocks lie in memory for
//! the kernels (`kernels/blocks.rs`).

mod layout;
mod search;

pub(crate) use layout::Block;

/// Most numbers of a block.
pub(crate) const MAX_BLOCK_LEN: usize = 256;

/// Fewest numbers of a group: those that share a scale.
pub(crate) const MIN_GROUP_LEN: usize = 16;

/// A block format as GGUF files have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockFormat {
    /// 32 numbers of 4 bits, a scale.
    Q4_0,
    /// 32 numbers of 4 bits, a scale and a minimum.
    Q4_1,
    /// 32 numbers of 5 bits, a scale.
    Q5_0,
    /// 32 numbers of 5 bits, a scale and a minimum.
    Q5_1,
    /// 32 numbers of 8 bits, a scale.
    Q8_0,
    /// 256 numbers of 2 bits in groups of 16, whose scales and minima are 4 bits.
    Q2K,
    /// 256 numbers of 3 bits in groups of 16, whose scales are 6 bits.
    Q3K,
    /// 256 numbers of 4 bits in groups of 32, whose scales and minima are 6 bits.
    Q4K,
    /// 256 numbers of 5 bits in groups of 32, whose scales and minima are 6 bits.
    Q5K,
    /// 256 numbers of 6 bits in groups of 16, whose scales are 8 bits.
    Q6K,
}

impl BlockFormat {
    /// Every format.
    pub const ALL: [Self; 10] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Its name, as GGUF spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Numbers of a block; a row is a whole number of blocks.
    pub fn block_len(self) -> usize {
        if self.has_groups() { MAX_BLOCK_LEN } else { 32 }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bits of a number.
    pub(crate) fn bits(self) -> usize {
        match self {
            Self::Q2K => 2,
            Self::Q3K => 3,
            Self::Q4_0 | Self::Q4_1 | Self::Q4K => 4,
            Self::Q5_0 | Self::Q5_1 | Self::Q5K => 5,
            Self::Q6K => 6,
            Self::Q8_0 => 8,
        }
    }

    /// Numbers that share a scale.
    pub(crate) fn group_len(self) -> usize {
        match self {
            Self::Q2K | Self::Q3K | Self::Q6K => MIN_GROUP_LEN,
            _ => 32,
        }
    }

    /// Whether groups have scales of their own, within the block's.
    pub(crate) fn has_groups(self) -> bool {
        matches!(self, Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K)
    }

    /// Whether something is subtracted from every number of a group.
    pub(crate) fn has_min(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1 | Self::Q2K | Self::Q4K | Self::Q5K)
    }

    /// The quant that stands for 0, in formats without a minimum.
    pub(crate) fn zero(self) -> u8 {
        if self.has_min() { 0 } else { 1 << (self.bits() - 1) }
    }

    /// Decodes whole blocks, to the very numbers that ggml decodes them to.
    ///
    /// # Panics
    /// If `bytes` and `out` are not as many blocks.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        self.check_lengths(bytes.len(), out.len());
        let blocks = bytes.chunks_exact(self.block_bytes());
        for (bytes, out) in blocks.zip(out.chunks_exact_mut(self.block_len())) {
            let block = Block::take_apart(self, bytes);
            let groups = out.chunks_exact_mut(self.group_len());
            let quants = block.quants.chunks_exact(self.group_len());
            for (group, (out, quants)) in groups.zip(quants).enumerate() {
                let scale = block.scale.to_f32() * f32::from(block.scales[group]);
                let min = block.min.to_f32() * f32::from(block.mins[group]);
                let offset = scale * f32::from(self.zero()) + min;
                for (out, quant) in out.iter_mut().zip(quants) {
                    *out = scale * f32::from(*quant) - offset;
                }
            }
        }
    }

    /// Quantises whole blocks: [`Self::Q8_0`], [`Self::Q6K`] or [`Self::Q4K`].
    ///
    /// # Panics
    /// If `bytes` and `weights` are not as many blocks, or for another format.
    #[inline(always)]
    pub fn encode(self, weights: &[f32], bytes: &mut [u8]) {
        self.check_lengths(bytes.len(), weights.len());
        let blocks = bytes.chunks_exact_mut(self.block_bytes());
        for (weights, bytes) in weights.chunks_exact(self.block_len()).zip(blocks) {
            let block = match self {
                Self::Q8_0 => search::q8_0(weights),
                Self::Q6K => search::q6_k(weights),
                Self::Q4K => search::q4_k(weights),
                _ => panic!("nothing is quantised to {}", self.name()),
            };
            block.put_together(self, bytes);
        }
    }

    fn check_lengths(self, num_bytes: usize, len: usize) {
        let num_blocks = len / self.block_len();
        assert!(
            len.is_multiple_of(self.block_len()) && num_bytes == num_blocks * self.block_bytes(),
            "{num_bytes} bytes are not {len} numbers in {}",
            self.name()
        );
    }
}

impl std::fmt::Display for BlockFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
