//! How the numbers of a tensor are written.

use crate::quant::BlockFormat;

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Four bytes.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    Bf16,
    /// A byte from -127 to 127, with a scale for its row, which stands in front of it, and one for its column. No
    /// checkpoint is written like this.
    Int8,
    /// Blocks of numbers that share a scale.
    Block(BlockFormat),
}

/// Bytes of the scale of a row in [`Format::Int8`].
pub(crate) const INT8_SCALE_BYTES: usize = 4;

/// Most numbers of a row in [`Format::Int8`]: sums of so many products of bytes fit 32 bits.
const MAX_INT8_INPUTS: usize = 1 << 17;

impl Format {
    /// Its name: that of the block format, or transformers' for plain numbers.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::Int8 => "int8",
            Self::Block(format) => format.name(),
        }
    }

    /// Numbers that are written together; a row is a whole number of them.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Int8 => 1,
            Self::Block(format) => format.block_len(),
        }
    }

    /// Bytes of a row of `len` numbers, a whole number of blocks.
    pub fn num_bytes(self, len: usize) -> usize {
        match self {
            Self::F32 => len * 4,
            Self::F16 | Self::Bf16 => len * 2,
            Self::Int8 => INT8_SCALE_BYTES + len,
            Self::Block(format) => len / format.block_len() * format.block_bytes(),
        }
    }

    /// Most numbers of a row.
    pub(crate) fn max_row_len(self) -> usize {
        if self == Self::Int8 { MAX_INT8_INPUTS } else { usize::MAX }
    }

    /// What numbers are given in, to be kept in this format: of whole numbers the scales depend on all rows.
    pub(crate) fn given(self) -> Self {
        if self == Self::Int8 { Self::F32 } else { self }
    }

    /// Widens the numbers of a row. Those of [`Self::Int8`] are known to `kernels::Int8Columns`.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
            Self::F16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = half::f16::from_le_bytes(*bytes).to_f32();
                }
            }
            Self::Bf16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            Self::Int8 => panic!("columns have scales too"),
            Self::Block(format) => format.decode(bytes, out),
        }
    }

    /// Rounds the numbers of a row to this format, one that [`Self::given`] gives for [`crate::Precision::format`].
    #[inline(always)]
    pub(crate) fn encode(self, numbers: &[f32], bytes: &mut [u8]) {
        match self {
            Self::F32 => {
                for (number, bytes) in numbers.iter().zip(bytes.as_chunks_mut().0) {
                    *bytes = number.to_le_bytes();
                }
            }
            Self::F16 => {
                for (number, bytes) in numbers.iter().zip(bytes.as_chunks_mut().0) {
                    *bytes = half::f16::from_f32(*number).to_le_bytes();
                }
            }
            Self::Bf16 => {
                for (number, bytes) in numbers.iter().zip(bytes.as_chunks_mut().0) {
                    *bytes = half::bf16::from_f32(*number).to_le_bytes();
                }
            }
            Self::Int8 => panic!("columns have scales too"),
            Self::Block(format) => format.encode(numbers, bytes),
        }
    }

    /// The largest number that it holds.
    pub(crate) fn max(self) -> f32 {
        match self {
            Self::F32 | Self::Int8 => f32::MAX,
            Self::Bf16 => half::bf16::MAX.to_f32(),
            // The scales of blocks are half precision.
            Self::F16 | Self::Block(_) => half::f16::MAX.to_f32(),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::F32 => f.write_str("F32"),
            Self::F16 => f.write_str("F16"),
            Self::Bf16 => f.write_str("BF16"),
            Self::Int8 => f.write_str("INT8"),
            Self::Block(format) => format.fmt(f),
        }
    }
}
