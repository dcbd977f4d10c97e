//! Where the bits of a block are: bytes of a GGUF file to whole numbers and scales, and back.

use half::f16;

use super::{BlockFormat, MAX_BLOCK_LEN, MIN_GROUP_LEN};

const MAX_GROUPS: usize = MAX_BLOCK_LEN / MIN_GROUP_LEN;

/// A block taken apart.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// Scale of the block.
    pub(crate) scale: f16,
    /// What is subtracted, in its own unit; 0 in formats without a minimum.
    pub(crate) min: f16,
    /// Scale of each group, in units of the block's; 1 in formats without groups.
    pub(crate) scales: [i8; MAX_GROUPS],
    /// What each group subtracts, in units of `min`; 1 in formats without groups.
    pub(crate) mins: [u8; MAX_GROUPS],
    /// The numbers, unsigned: `zero` of the format stands for 0.
    pub(crate) quants: [u8; MAX_BLOCK_LEN],
}

impl Block {
    /// A block of zeros.
    pub(super) fn zero() -> Self {
        Self {
            scale: f16::ZERO,
            min: f16::ZERO,
            scales: [1; MAX_GROUPS],
            mins: [1; MAX_GROUPS],
            quants: [0; MAX_BLOCK_LEN],
        }
    }

    /// Takes the bytes of one block apart.
    pub(crate) fn take_apart(format: BlockFormat, bytes: &[u8]) -> Self {
        let mut block = Self::zero();
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let quants = &mut block.quants;
        match format {
            BlockFormat::Q4_0 => {
                block.scale = half(0);
                nibbles(&bytes[2..18], quants);
            }
            BlockFormat::Q4_1 => {
                (block.scale, block.min) = (half(0), -half(2));
                nibbles(&bytes[4..20], quants);
            }
            BlockFormat::Q5_0 => {
                block.scale = half(0);
                nibbles(&bytes[6..22], quants);
                fifth_bits_of_32(&bytes[2..6], quants);
            }
            BlockFormat::Q5_1 => {
                (block.scale, block.min) = (half(0), -half(2));
                nibbles(&bytes[8..24], quants);
                fifth_bits_of_32(&bytes[4..8], quants);
            }
            BlockFormat::Q8_0 => {
                block.scale = half(0);
                for (quant, byte) in quants.iter_mut().zip(&bytes[2..34]) {
                    *quant = byte ^ 0x80;
                }
            }
            BlockFormat::Q2K => {
                (block.scale, block.min) = (half(80), half(82));
                for (group, byte) in bytes[..16].iter().enumerate() {
                    block.scales[group] = (byte & 15) as i8;
                    block.mins[group] = byte >> 4;
                }
                pairs(&bytes[16..80], 0, quants);
            }
            BlockFormat::Q3K => {
                block.scale = half(108);
                six_bit_scales(&bytes[96..108], &mut block.scales);
                pairs(&bytes[32..96], 0, quants);
                bits(&bytes[..32], 2, quants);
            }
            BlockFormat::Q4K => {
                (block.scale, block.min) = (half(0), half(2));
                scales_and_mins(&bytes[4..16], &mut block.scales, &mut block.mins);
                for (bytes, quants) in bytes[16..].chunks(32).zip(quants.chunks_mut(64)) {
                    nibbles(bytes, quants);
                }
            }
            BlockFormat::Q5K => {
                (block.scale, block.min) = (half(0), half(2));
                scales_and_mins(&bytes[4..16], &mut block.scales, &mut block.mins);
                for (bytes, quants) in bytes[48..].chunks(32).zip(quants.chunks_mut(64)) {
                    nibbles(bytes, quants);
                }
                bits(&bytes[16..48], 4, quants);
            }
            BlockFormat::Q6K => {
                block.scale = half(208);
                for (scale, byte) in block.scales.iter_mut().zip(&bytes[192..208]) {
                    *scale = byte.cast_signed();
                }
                for (bytes, quants) in bytes[..128].chunks(64).zip(quants.chunks_mut(128)) {
                    nibbles(bytes, quants);
                }
                pairs(&bytes[128..192], 4, quants);
            }
        }
        block
    }

    /// Writes the bytes of a block of a format that can be quantised to.
    pub(super) fn put_together(&self, format: BlockFormat, bytes: &mut [u8]) {
        let (scale, min) = (self.scale.to_le_bytes(), self.min.to_le_bytes());
        match format {
            BlockFormat::Q8_0 => {
                bytes[..2].copy_from_slice(&scale);
                for (byte, quant) in bytes[2..].iter_mut().zip(&self.quants) {
                    *byte = quant ^ 0x80;
                }
            }
            BlockFormat::Q4K => {
                bytes[..2].copy_from_slice(&scale);
                bytes[2..4].copy_from_slice(&min);
                for group in 0..4 {
                    let (low, high) = (group, group + 4);
                    let scales = [low, high].map(|group| self.scales[group].cast_unsigned());
                    let mins = [self.mins[low], self.mins[high]];
                    bytes[4 + group] = scales[0] | (scales[1] >> 4) << 6;
                    bytes[8 + group] = mins[0] | (mins[1] >> 4) << 6;
                    bytes[12 + group] = scales[1] & 15 | mins[1] << 4;
                }
                for (bytes, quants) in bytes[16..].chunks_mut(32).zip(self.quants.chunks(64)) {
                    for (at, byte) in bytes.iter_mut().enumerate() {
                        *byte = quants[at] | quants[at + 32] << 4;
                    }
                }
            }
            BlockFormat::Q6K => {
                for (at, quants) in self.quants.chunks(128).enumerate() {
                    for i in 0..64 {
                        bytes[64 * at + i] = quants[i] & 15 | quants[i + 64] << 4;
                    }
                    for i in 0..32 {
                        bytes[128 + 32 * at + i] =
                            (0..4).fold(0, |byte, j| byte | quants[32 * j + i] >> 4 << (2 * j));
                    }
                }
                for (byte, scale) in bytes[192..208].iter_mut().zip(self.scales) {
                    *byte = scale.cast_unsigned();
                }
                bytes[208..].copy_from_slice(&scale);
            }
            _ => unreachable!("nothing is quantised to {format}"),
        }
    }
}

/// The lower halves of the bytes, then the upper ones.
fn nibbles(bytes: &[u8], quants: &mut [u8]) {
    let (low, high) = quants.split_at_mut(bytes.len());
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// Bit `i` of four bytes belongs to number `i`.
fn fifth_bits_of_32(bytes: &[u8], quants: &mut [u8]) {
    for (i, quant) in quants[..32].iter_mut().enumerate() {
        *quant |= (bytes[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// Two bits of each number, at `shift`: 32 bytes hold 128 numbers, the lowest bits the first 32 of them.
fn pairs(bytes: &[u8], shift: usize, quants: &mut [u8]) {
    for (bytes, quants) in bytes.chunks(32).zip(quants.chunks_mut(128)) {
        for (j, quants) in quants.chunks_mut(32).enumerate() {
            for (byte, quant) in bytes.iter().zip(quants) {
                *quant |= (byte >> (2 * j) & 3) << shift;
            }
        }
    }
}

/// One bit of each number, at `shift`: 32 bytes hold 256 numbers, the lowest bits the first 32 of them.
fn bits(bytes: &[u8], shift: usize, quants: &mut [u8]) {
    for (j, quants) in quants.chunks_mut(32).enumerate() {
        for (byte, quant) in bytes.iter().zip(quants) {
            *quant |= (byte >> j & 1) << shift;
        }
    }
}

/// 16 scales of 6 bits, 32 stands for 0: 8 bytes of lower halves, 4 bytes of upper pairs.
fn six_bit_scales(bytes: &[u8], scales: &mut [i8; MAX_GROUPS]) {
    for (group, scale) in scales.iter_mut().enumerate() {
        let low = bytes[group % 8] >> (group / 8 * 4) & 15;
        let high = bytes[8 + group % 4] >> (group / 4 * 2) & 3;
        *scale = (low | high << 4).cast_signed() - 32;
    }
}

/// 8 scales and 8 minima of 6 bits: the first four of each have bytes of their own, in whose upper bits
/// are those of the last four.
fn scales_and_mins(bytes: &[u8], scales: &mut [i8; MAX_GROUPS], mins: &mut [u8; MAX_GROUPS]) {
    for group in 0..4 {
        let (scale, min, rest) = (bytes[group], bytes[group + 4], bytes[group + 8]);
        scales[group] = (scale & 63).cast_signed();
        mins[group] = min & 63;
        scales[group + 4] = (rest & 15 | scale >> 6 << 4).cast_signed();
        mins[group + 4] = rest >> 4 | min >> 6 << 4;
    }
}
