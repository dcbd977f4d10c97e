//! How exactly weights, keys and values are kept: what the user chooses, and what that means for each
//! tensor.
//!
//! A precision says how much of each number is kept in memory. Arithmetic is `f32`, but for products on a
//! matrix unit, where bfloat16 weights count exactly and decoded blocks are rounded to bfloat16 (`kernels`),
//! and for [`Precision::Int8`], whose products are whole numbers everywhere. Norms, biases and the routers of
//! experts are always `f32`: they are small, and everything passes through them. The embedding and the output layer, which meet the vocabulary, are kept one step
//! finer than 4 bits.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use crate::config::ModelConfig;
use crate::kernels::{Simd, packed_bytes};
use crate::quant::BlockFormat;
use crate::step::BLOCK_SIZE;
use crate::weights::Format;

/// How weights are kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 32-bit floating point.
    Fp32,
    /// 16-bit floating point.
    Fp16,
    /// 16-bit floating point with the range of 32 bits.
    Bf16,
    /// 8 bits, a scale for every 32 weights: 8.5 bits a weight.
    Q8_0,
    /// 8 bits, a scale for every output and every input; activations are rounded to 8 bits, large ones to 16.
    Int8,
    /// 6 bits, a scale for every 16 weights: 6.6 bits a weight.
    Q6K,
    /// 4 bits, a scale and a minimum for every 32 weights: 4.6 bits a weight.
    Q4K,
}

/// How keys and values are kept in the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvCacheDtype {
    /// 32-bit floating point.
    Fp32,
    /// 16-bit floating point; what is beyond its range becomes its largest number.
    Fp16,
    /// 16-bit floating point with the range of 32 bits.
    Bf16,
    /// 8 bits, a scale for each key and each value of a head.
    Q8,
}

/// What a matrix of a model is for, as far as its precision is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixRole {
    /// A linear layer inside of the model.
    Layer,
    /// The embedding or the output layer.
    Vocabulary,
    /// What chooses a token's experts.
    Router,
}

impl Precision {
    /// Every precision, the finest first.
    pub const ALL: [Self; 7] =
        [Self::Fp32, Self::Fp16, Self::Bf16, Self::Q8_0, Self::Int8, Self::Q6K, Self::Q4K];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Int8 => "int8",
            Self::Q6K => "q6_k",
            Self::Q4K => "q4_k",
        }
    }

    /// The format of a matrix with rows of `row_len` numbers that the checkpoint stores as `stored`.
    ///
    /// Rows that are no whole number of blocks get the next finer format whose blocks fit.
    pub fn format(self, role: MatrixRole, row_len: usize, stored: Format) -> Format {
        let wanted = match (self, role) {
            (Self::Fp32, _) | (_, MatrixRole::Router) => Format::F32,
            (Self::Fp16, _) => Format::F16,
            (Self::Bf16, _) => Format::Bf16,
            (Self::Q8_0, _) => Format::Block(BlockFormat::Q8_0),
            (Self::Int8, _) => Format::Int8,
            (Self::Q6K, _) | (Self::Q4K, MatrixRole::Vocabulary) => Format::Block(BlockFormat::Q6K),
            (Self::Q4K, MatrixRole::Layer) => Format::Block(BlockFormat::Q4K),
        };
        let finer = [wanted, Format::Block(BlockFormat::Q8_0)];
        let fits = |format: &Format| {
            row_len.is_multiple_of(format.block_len()) && row_len <= format.max_row_len()
        };
        finer.into_iter().find(fits).unwrap_or(match stored {
            Format::Bf16 => Format::Bf16,
            _ => Format::F16,
        })
    }

    /// Memory of a matrix, `(out_features, in_features)`, that the checkpoint stores as `stored`.
    pub fn matrix_bytes(
        self,
        role: MatrixRole,
        (out_features, in_features): (usize, usize),
        stored: Format,
    ) -> usize {
        let format = self.format(role, in_features, stored);
        packed_bytes(Simd::detect(), format, out_features, in_features)
    }
}

impl KvCacheDtype {
    /// Every dtype, the finest first.
    pub const ALL: [Self; 4] = [Self::Fp32, Self::Fp16, Self::Bf16, Self::Q8];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
        }
    }

    /// Memory of the keys and values of one token, in all layers.
    pub fn bytes_per_token(self, config: &ModelConfig) -> usize {
        crate::kv_cache::bytes_per_block(config, self) / BLOCK_SIZE
    }
}

/// A name that is none of those there are.
#[derive(Debug, thiserror::Error)]
#[error("expected one of {expected}, got {given:?}")]
pub struct UnknownName {
    expected: String,
    given: String,
}

pub(crate) fn find<T: Copy>(
    all: &[T],
    name: fn(T) -> &'static str,
    given: &str,
) -> Result<T, UnknownName> {
    all.iter().copied().find(|item| name(*item) == given).ok_or_else(|| UnknownName {
        expected: all.iter().map(|item| name(*item)).collect::<Vec<_>>().join(", "),
        given: given.to_owned(),
    })
}

impl FromStr for Precision {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        find(&Self::ALL, Self::name, text)
    }
}

impl FromStr for KvCacheDtype {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        find(&Self::ALL, Self::name, text)
    }
}

impl Display for Precision {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Display for KvCacheDtype {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for precision in Precision::ALL {
            assert_eq!(precision.to_string().parse::<Precision>().unwrap(), precision);
        }
        for dtype in KvCacheDtype::ALL {
            assert_eq!(dtype.to_string().parse::<KvCacheDtype>().unwrap(), dtype);
        }
        let error = "int4".parse::<Precision>().unwrap_err().to_string();
        assert_eq!(error, "expected one of fp32, fp16, bf16, q8_0, int8, q6_k, q4_k, got \"int4\"");
    }

    #[test]
    fn rows_that_are_no_whole_blocks_get_a_finer_format() {
        let q8_0 = Format::Block(BlockFormat::Q8_0);
        let q6_k = Format::Block(BlockFormat::Q6K);
        let q4_k = Format::Block(BlockFormat::Q4K);
        for (precision, role, row_len, stored, want) in [
            (Precision::Q4K, MatrixRole::Layer, 512, Format::F32, q4_k),
            (Precision::Q4K, MatrixRole::Vocabulary, 512, Format::F32, q6_k),
            (Precision::Q4K, MatrixRole::Layer, 96, Format::F32, q8_0),
            (Precision::Q6K, MatrixRole::Vocabulary, 288, Format::Bf16, q8_0),
            (Precision::Q6K, MatrixRole::Layer, 100, Format::Bf16, Format::Bf16),
            (Precision::Q8_0, MatrixRole::Layer, 100, Format::F32, Format::F16),
            (Precision::Q8_0, MatrixRole::Layer, 40, q4_k, Format::F16),
            (Precision::Int8, MatrixRole::Layer, 7, Format::F32, Format::Int8),
            (Precision::Int8, MatrixRole::Layer, 1 << 18, Format::F32, q8_0),
            (Precision::Fp16, MatrixRole::Layer, 7, Format::Bf16, Format::F16),
            (Precision::Fp32, MatrixRole::Layer, 7, Format::Bf16, Format::F32),
            (Precision::Q4K, MatrixRole::Router, 512, Format::Bf16, Format::F32),
        ] {
            assert_eq!(precision.format(role, row_len, stored), want, "{precision} {row_len}");
        }
    }
}
