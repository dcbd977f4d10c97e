//! Sixteen numbers side by side: in memory, in every format ([`Lanes`] and the like), and as `f32` in
//! registers ([`Vector`]).

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

/// Number of lanes, on every machine.
pub(crate) const LANES: usize = 16;

/// Sixteen numbers in memory, one cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Lanes(pub(crate) [f32; LANES]);

impl Lanes {
    pub(crate) const ZERO: Self = Self([0.0; LANES]);
}

/// Sixteen half precision numbers in memory, as bits.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(crate) struct F16Lanes(pub(crate) [u16; LANES]);

/// Sixteen bfloat16 in memory: the upper halves of the `f32` they stand for.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(crate) struct Bf16Lanes(pub(crate) [u16; LANES]);

/// One cache line of a tile: what sixteen outputs have for some inputs, or one row for more of them. 32 bfloat16 or 64
/// whole numbers of a byte.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; LINE_BYTES]);

/// Bytes of a [`Line`].
pub(crate) const LINE_BYTES: usize = 64;

impl Line {
    pub(crate) const ZERO: Self = Self([0; LINE_BYTES]);

    /// One of the 16 `f32` that it holds where it is no part of a tile.
    #[inline(always)]
    pub(super) fn number(&self, index: usize) -> f32 {
        f32::from_le_bytes(self.0.as_chunks().0[index])
    }

    /// Sets one of them.
    #[inline(always)]
    pub(super) fn set_number(&mut self, index: usize, number: f32) {
        self.0.as_chunks_mut().0[index] = number.to_le_bytes();
    }

    /// Four of its 32 whole numbers of 16 bits, where it holds such.
    #[inline(always)]
    pub(super) fn group(&self, index: usize) -> [i16; 4] {
        let bytes: &[u8; 8] = &self.0.as_chunks().0[index];
        std::array::from_fn(|i| i16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))
    }
}

/// Sixteen whole numbers of a byte in memory.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub(crate) struct I8Lanes(pub(crate) [i8; LANES]);

/// Sixteen bytes in memory.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub(crate) struct U8Lanes(pub(crate) [u8; LANES]);

macro_rules! plain {
    ($($lanes:ty),*) => {$(
        #[expect(unsafe_code, reason = "any bits are numbers")]
        // SAFETY: whole numbers or `f32`, which any bits are; aligned to a cache line at most.
        unsafe impl super::memory::Plain for $lanes {}
    )*};
}

plain!(Lanes, F16Lanes, Bf16Lanes, Line, I8Lanes, U8Lanes);

/// Memory that a [`Vector`] can be loaded from.
pub(crate) trait Stored: super::memory::Plain {
    /// The numbers, in registers.
    fn load<V: Vector>(&self) -> V;
}

impl Stored for Lanes {
    #[inline(always)]
    fn load<V: Vector>(&self) -> V {
        V::load(self)
    }
}

impl Stored for F16Lanes {
    #[inline(always)]
    fn load<V: Vector>(&self) -> V {
        V::load_f16(self)
    }
}

impl Stored for Bf16Lanes {
    #[inline(always)]
    fn load<V: Vector>(&self) -> V {
        V::load_bf16(self)
    }
}

impl Stored for I8Lanes {
    #[inline(always)]
    fn load<V: Vector>(&self) -> V {
        V::load_i8(self)
    }
}

impl Stored for U8Lanes {
    #[inline(always)]
    fn load<V: Vector>(&self) -> V {
        V::load_u8(self)
    }
}

/// Sixteen numbers in registers.
///
/// The implementations for an instruction set may only be named where it is enabled, that is as the
/// `V` of [`super::Kernel::run`].
pub(crate) trait Vector: Copy {
    /// Most rows of a tile: as many as there are registers for.
    const MAX_ROWS: usize;

    /// All zero.
    fn zero() -> Self;
    /// All the same.
    fn splat(x: f32) -> Self;
    /// Reads 16 numbers.
    fn load(from: &Lanes) -> Self;
    /// Reads and widens 16 numbers.
    fn load_f16(from: &F16Lanes) -> Self;
    /// Reads and widens 16 numbers.
    fn load_bf16(from: &Bf16Lanes) -> Self;
    /// Reads and widens 16 numbers.
    fn load_i8(from: &I8Lanes) -> Self;
    /// Reads and widens 16 numbers.
    fn load_u8(from: &U8Lanes) -> Self;
    /// `self + x * w`, rounded once.
    fn fma(self, x: f32, w: Self) -> Self;
    /// `self * by`, lane by lane.
    fn mul(self, by: Self) -> Self;
    /// `self - minus`, lane by lane.
    fn sub(self, minus: Self) -> Self;
    /// Writes 16 numbers.
    fn store(self, to: &mut Lanes);
    /// Writes 16 numbers of each, rounded to bfloat16 and side by side. Only on a machine with a matrix unit.
    fn store_bf16_pairs(first: Self, second: Self, to: &mut Line);

    /// Sums of products of whole numbers, for 16 outputs.
    type Sums: Copy;
    /// Most of them that are added up at a time.
    const MAX_SUMS: usize;
    /// All zero.
    fn zero_sums() -> Self::Sums;
    /// Adds what four inputs give: output `i` has `weights[4 * i..][..4]` (8 bits with a sign).
    fn add_products(sums: Self::Sums, inputs: [i16; 4], weights: &Line) -> Self::Sums;
    /// The sums of all outputs.
    fn read_sums(sums: Self::Sums) -> [i32; LANES];
    /// `256 * upper + lower` of whole numbers, which are read as bits. Nothing is rounded before both are added up: who
    /// has the same sum in other parts gets the same number.
    fn join(upper: &Lanes, lower: &Lanes) -> Self;
}

impl Vector for Lanes {
    // Without an instruction set of its own, x86 has no fused multiply-add: tiles would spare nothing.
    const MAX_ROWS: usize = if cfg!(target_arch = "x86_64") { 1 } else { 6 };

    #[inline(always)]
    fn zero() -> Self {
        Self::ZERO
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    fn load(from: &Lanes) -> Self {
        *from
    }

    #[inline(always)]
    fn load_f16(from: &F16Lanes) -> Self {
        Self(from.0.map(|bits| half::f16::from_bits(bits).to_f32_const()))
    }

    #[inline(always)]
    fn load_bf16(from: &Bf16Lanes) -> Self {
        Self(from.0.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    #[inline(always)]
    fn load_i8(from: &I8Lanes) -> Self {
        Self(from.0.map(f32::from))
    }

    #[inline(always)]
    fn load_u8(from: &U8Lanes) -> Self {
        Self(from.0.map(f32::from))
    }

    #[inline(always)]
    fn fma(mut self, x: f32, w: Self) -> Self {
        for (acc, w) in self.0.iter_mut().zip(w.0) {
            *acc = x.mul_add(w, *acc);
        }
        self
    }

    #[inline(always)]
    fn mul(mut self, by: Self) -> Self {
        for (x, by) in self.0.iter_mut().zip(by.0) {
            *x *= by;
        }
        self
    }

    #[inline(always)]
    fn sub(mut self, minus: Self) -> Self {
        for (x, minus) in self.0.iter_mut().zip(minus.0) {
            *x -= minus;
        }
        self
    }

    #[inline(always)]
    fn store(self, to: &mut Lanes) {
        *to = self;
    }

    #[inline(always)]
    fn store_bf16_pairs(first: Self, second: Self, to: &mut Line) {
        for ((to, first), second) in
            to.0.as_chunks_mut::<4>().0.iter_mut().zip(first.0).zip(second.0)
        {
            let [first, second] = [first, second].map(|x| half::bf16::from_f32(x).to_le_bytes());
            *to = [first[0], first[1], second[0], second[1]];
        }
    }

    type Sums = [i32; LANES];

    const MAX_SUMS: usize = 1;

    #[inline(always)]
    fn zero_sums() -> Self::Sums {
        [0; LANES]
    }

    #[inline(always)]
    fn add_products(mut sums: Self::Sums, inputs: [i16; 4], weights: &Line) -> Self::Sums {
        for (sum, weights) in sums.iter_mut().zip(weights.0.as_chunks::<4>().0) {
            for (input, weight) in inputs.iter().zip(weights) {
                *sum += i32::from(*input) * i32::from(weight.cast_signed());
            }
        }
        sums
    }

    #[inline(always)]
    fn read_sums(sums: Self::Sums) -> [i32; LANES] {
        sums
    }

    #[inline(always)]
    fn join(upper: &Lanes, lower: &Lanes) -> Self {
        Self(std::array::from_fn(|lane| {
            let [upper, lower] = [upper, lower].map(|x| x.0[lane].to_bits().cast_signed());
            (upper + (lower >> 8)) as f32 * 256.0 + (lower & 255) as f32
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Kernel, Simd};
    use super::*;

    struct Widen<'a>(&'a mut Vec<u32>);

    impl Kernel for Widen<'_> {
        #[inline(always)]
        fn run<V: Vector>(self) {
            let mut widen = |vector: V| {
                let mut lanes = Lanes::ZERO;
                vector.store(&mut lanes);
                self.0.extend(lanes.0.map(f32::to_bits));
            };
            for first in (0..1 << 16).step_by(LANES) {
                let bits: [u16; LANES] = std::array::from_fn(|lane| (first + lane) as u16);
                // Numbers that are none differ in bits that mean nothing.
                let is_number = |bits: &u16| half::f16::from_bits(*bits).is_finite();
                widen(F16Lanes(bits.map(|x| if is_number(&x) { x } else { 0 })).load());
                widen(Bf16Lanes(bits).load());
                widen(U8Lanes(bits.map(|x| x as u8)).load());
                widen(I8Lanes(bits.map(|x| x as i8)).load::<V>().mul(V::zero()));
                widen(U8Lanes(bits.map(|x| x as u8)).load::<V>().sub(V::zero()));
                widen(I8Lanes(bits.map(|x| x as i8)).load());
            }
        }
    }

    #[test]
    fn every_instruction_set_widens_every_number_alike() {
        let mut expected = Vec::new();
        Widen(&mut expected).run::<Lanes>();
        for simd in Simd::available() {
            let mut bits = Vec::new();
            simd.run(Widen(&mut bits));
            assert!(bits == expected, "{} differs", simd.name());
        }
        assert_eq!(f32::from_bits(expected[6 * (1 << 16) - 1]), -1.0);
    }
}
