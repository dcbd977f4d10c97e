//! Sixteen `f32` side by side: in memory ([`Lanes`], [`Bf16Lanes`]) and in registers ([`Vector`]).

/// Number of lanes, on every machine.
pub(crate) const LANES: usize = 16;

/// Sixteen numbers in memory, one cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Lanes(pub(crate) [f32; LANES]);

impl Lanes {
    pub(crate) const ZERO: Self = Self([0.0; LANES]);
}

/// Sixteen bfloat16 in memory: the upper halves of the `f32` they stand for.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(crate) struct Bf16Lanes(pub(crate) [u16; LANES]);

impl Bf16Lanes {
    pub(crate) const ZERO: Self = Self([0; LANES]);
}

/// Memory that a [`Vector`] can be loaded from.
pub(crate) trait Stored: Copy + Send + Sync {
    /// The numbers, in registers.
    fn load<V: Vector>(&self) -> V;
}

impl Stored for Lanes {
    #[inline(always)]
    fn load<V: Vector>(&self) -> V {
        V::load(self)
    }
}

impl Stored for Bf16Lanes {
    #[inline(always)]
    fn load<V: Vector>(&self) -> V {
        V::load_bf16(self)
    }
}

/// Sixteen numbers in registers.
///
/// The implementations for an instruction set may only be named where it is enabled, that is as the
/// `V` of [`super::Kernel::run`].
pub(crate) trait Vector: Copy {
    /// Whether there are registers for tiles of 8 rows by 2 vectors.
    const WIDE: bool;

    /// All zero.
    fn zero() -> Self;
    /// Reads 16 numbers.
    fn load(from: &Lanes) -> Self;
    /// Reads and widens 16 numbers.
    fn load_bf16(from: &Bf16Lanes) -> Self;
    /// `self + x * w`, rounded once.
    fn fma(self, x: f32, w: Self) -> Self;
    /// Writes 16 numbers.
    fn store(self, to: &mut Lanes);
}

impl Vector for Lanes {
    const WIDE: bool = false;

    #[inline(always)]
    fn zero() -> Self {
        Self::ZERO
    }

    #[inline(always)]
    fn load(from: &Lanes) -> Self {
        *from
    }

    #[inline(always)]
    fn load_bf16(from: &Bf16Lanes) -> Self {
        Self(from.0.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    #[inline(always)]
    fn fma(mut self, x: f32, w: Self) -> Self {
        for (acc, w) in self.0.iter_mut().zip(w.0) {
            *acc = x.mul_add(w, *acc);
        }
        self
    }

    #[inline(always)]
    fn store(self, to: &mut Lanes) {
        *to = self;
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm_load_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32,
        _mm256_fmadd_ps, _mm256_load_ps, _mm256_load_si256, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_slli_epi32, _mm256_store_ps, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
        _mm512_fmadd_ps, _mm512_load_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
        _mm512_store_ps,
    };

    use super::{Bf16Lanes, Lanes, Vector};

    /// One AVX-512 register.
    #[derive(Clone, Copy)]
    pub(in crate::kernels) struct Avx512(__m512);

    #[expect(unsafe_code, reason = "vector instructions")]
    impl Vector for Avx512 {
        const WIDE: bool = true;

        #[inline(always)]
        fn zero() -> Self {
            // SAFETY: only named under avx512f.
            Self(unsafe { _mm512_setzero_ps() })
        }

        #[inline(always)]
        fn load(from: &Lanes) -> Self {
            // SAFETY: only named under avx512f; 16 numbers, aligned to 64 bytes.
            Self(unsafe { _mm512_load_ps(from.0.as_ptr()) })
        }

        #[inline(always)]
        fn load_bf16(from: &Bf16Lanes) -> Self {
            // SAFETY: only named under avx512f; 32 bytes, aligned to 32.
            Self(unsafe {
                let halves = _mm256_load_si256(from.0.as_ptr().cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            })
        }

        #[inline(always)]
        fn fma(self, x: f32, w: Self) -> Self {
            // SAFETY: only named under avx512f.
            Self(unsafe { _mm512_fmadd_ps(_mm512_set1_ps(x), w.0, self.0) })
        }

        #[inline(always)]
        fn store(self, to: &mut Lanes) {
            // SAFETY: only named under avx512f; room for 16 numbers, aligned to 64 bytes.
            unsafe { _mm512_store_ps(to.0.as_mut_ptr(), self.0) }
        }
    }

    /// Two AVX2 registers.
    #[derive(Clone, Copy)]
    pub(in crate::kernels) struct Avx2(__m256, __m256);

    #[expect(unsafe_code, reason = "vector instructions")]
    impl Vector for Avx2 {
        const WIDE: bool = false;

        #[inline(always)]
        fn zero() -> Self {
            // SAFETY: only named under avx2 and fma.
            unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }

        #[inline(always)]
        fn load(from: &Lanes) -> Self {
            let (low, high) = from.0.split_at(8);
            // SAFETY: only named under avx2 and fma; twice 8 numbers, aligned to 32 bytes.
            unsafe { Self(_mm256_load_ps(low.as_ptr()), _mm256_load_ps(high.as_ptr())) }
        }

        #[inline(always)]
        fn load_bf16(from: &Bf16Lanes) -> Self {
            let (low, high) = from.0.split_at(8);
            // SAFETY: only named under avx2 and fma; twice 16 bytes, aligned to 16.
            unsafe {
                let low = _mm256_cvtepu16_epi32(_mm_load_si128(low.as_ptr().cast()));
                let high = _mm256_cvtepu16_epi32(_mm_load_si128(high.as_ptr().cast()));
                Self(
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
                )
            }
        }

        #[inline(always)]
        fn fma(self, x: f32, w: Self) -> Self {
            // SAFETY: only named under avx2 and fma.
            unsafe {
                let x = _mm256_set1_ps(x);
                Self(_mm256_fmadd_ps(x, w.0, self.0), _mm256_fmadd_ps(x, w.1, self.1))
            }
        }

        #[inline(always)]
        fn store(self, to: &mut Lanes) {
            let (low, high) = to.0.split_at_mut(8);
            // SAFETY: only named under avx2 and fma; room for twice 8 numbers, aligned to 32 bytes.
            unsafe {
                _mm256_store_ps(low.as_mut_ptr(), self.0);
                _mm256_store_ps(high.as_mut_ptr(), self.1);
            }
        }
    }
}
