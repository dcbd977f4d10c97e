//! Vectors of the x86 instruction sets.

use std::arch::x86_64::{
    __m256, __m256i, __m512, __m512i, _mm_load_si128, _mm_loadu_si128, _mm_srli_si128,
    _mm256_add_epi32, _mm256_castsi256_ps, _mm256_cvtepi8_epi16, _mm256_cvtepi8_epi32,
    _mm256_cvtepi32_ps, _mm256_cvtepu8_epi32, _mm256_cvtepu16_epi32, _mm256_cvtph_ps,
    _mm256_fmadd_ps, _mm256_load_ps, _mm256_load_si256, _mm256_madd_epi16, _mm256_mul_ps,
    _mm256_set1_epi64x, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_slli_epi32,
    _mm256_store_ps, _mm256_sub_ps, _mm512_add_epi32, _mm512_and_si512, _mm512_castsi512_ps,
    _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32, _mm512_cvtepu16_epi32,
    _mm512_cvtne2ps_pbh, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_load_ps, _mm512_load_si512,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_permutexvar_epi16, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_slli_epi32, _mm512_srai_epi32, _mm512_store_ps, _mm512_store_si512,
    _mm512_sub_ps,
};

use super::{Bf16Lanes, F16Lanes, I8Lanes, LANES, Lanes, Line, U8Lanes, Vector};

/// One AVX-512 register.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Avx512(__m512);

#[expect(unsafe_code, reason = "vector instructions")]
impl Vector for Avx512 {
    const MAX_ROWS: usize = 8;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: only named under avx512f.
        Self(unsafe { _mm512_setzero_ps() })
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: only named under avx512f.
        Self(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    fn load(from: &Lanes) -> Self {
        // SAFETY: only named under avx512f; 16 numbers, aligned to 64 bytes.
        Self(unsafe { _mm512_load_ps(from.0.as_ptr()) })
    }

    #[inline(always)]
    fn load_f16(from: &F16Lanes) -> Self {
        // SAFETY: only named under avx512f; 32 bytes, aligned to 32.
        Self(unsafe { _mm512_cvtph_ps(_mm256_load_si256(from.0.as_ptr().cast())) })
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
    fn load_i8(from: &I8Lanes) -> Self {
        // SAFETY: only named under avx512f; 16 bytes, aligned to 16.
        Self(unsafe {
            let bytes = _mm_load_si128(from.0.as_ptr().cast());
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
        })
    }

    #[inline(always)]
    fn load_u8(from: &U8Lanes) -> Self {
        // SAFETY: only named under avx512f; 16 bytes, aligned to 16.
        Self(unsafe {
            let bytes = _mm_load_si128(from.0.as_ptr().cast());
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
        })
    }

    #[inline(always)]
    fn fma(self, x: f32, w: Self) -> Self {
        // SAFETY: only named under avx512f.
        Self(unsafe { _mm512_fmadd_ps(_mm512_set1_ps(x), w.0, self.0) })
    }

    #[inline(always)]
    fn mul(self, by: Self) -> Self {
        // SAFETY: only named under avx512f.
        Self(unsafe { _mm512_mul_ps(self.0, by.0) })
    }

    #[inline(always)]
    fn sub(self, minus: Self) -> Self {
        // SAFETY: only named under avx512f.
        Self(unsafe { _mm512_sub_ps(self.0, minus.0) })
    }

    #[inline(always)]
    fn store(self, to: &mut Lanes) {
        // SAFETY: only named under avx512f; room for 16 numbers, aligned to 64 bytes.
        unsafe { _mm512_store_ps(to.0.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn store_bf16_pairs(first: Self, second: Self, to: &mut Line) {
        // SAFETY: a machine with a matrix unit has these instructions (`tiles::is_available`).
        unsafe { store_bf16_pairs(first.0, second.0, to) }
    }

    type Sums = PairSums;

    const MAX_SUMS: usize = 4;

    #[inline(always)]
    fn zero_sums() -> PairSums {
        Avx2::zero_sums()
    }

    #[inline(always)]
    fn add_products(sums: PairSums, inputs: [i16; 4], weights: &Line) -> PairSums {
        Avx2::add_products(sums, inputs, weights)
    }

    #[inline(always)]
    fn read_sums(sums: PairSums) -> [i32; LANES] {
        Avx2::read_sums(sums)
    }

    #[inline(always)]
    fn join(upper: &Lanes, lower: &Lanes) -> Self {
        // SAFETY: only named under avx512f; 64 bytes each, aligned to them.
        Self(unsafe {
            let upper = _mm512_load_si512(upper.0.as_ptr().cast());
            let lower = _mm512_load_si512(lower.0.as_ptr().cast());
            let upper = _mm512_add_epi32(upper, _mm512_srai_epi32::<8>(lower));
            let lower = _mm512_and_si512(lower, _mm512_set1_epi32(255));
            let (upper, lower) = (_mm512_cvtepi32_ps(upper), _mm512_cvtepi32_ps(lower));
            // The product is exact.
            _mm512_fmadd_ps(upper, _mm512_set1_ps(256.0), lower)
        })
    }
}

/// # Safety
/// The machine must have these instructions.
#[expect(unsafe_code, reason = "vector instructions")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn store_bf16_pairs(first: __m512, second: __m512, to: &mut Line) {
    /// `0, 16, 1, 17, …`
    static INTERLEAVED: [u16; 32] = {
        let mut order = [0; 32];
        let mut lane = 0;
        while lane < 16 {
            order[2 * lane as usize] = lane;
            order[2 * lane as usize + 1] = lane + 16;
            lane += 1;
        }
        order
    };
    // SAFETY: 64 bytes each, a line aligned to them; 32 numbers of 16 bits are 512 bits.
    unsafe {
        let order = _mm512_loadu_si512((&raw const INTERLEAVED).cast());
        let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
        let to: *mut Line = to;
        _mm512_store_si512(to.cast(), _mm512_permutexvar_epi16(order, rounded));
    }
}

/// Two AVX2 registers.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Avx2(__m256, __m256);

#[expect(unsafe_code, reason = "vector instructions")]
impl Vector for Avx2 {
    const MAX_ROWS: usize = 6;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: only named under avx2, fma and f16c.
        unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: only named under avx2, fma and f16c.
        let all = unsafe { _mm256_set1_ps(x) };
        Self(all, all)
    }

    #[inline(always)]
    fn load(from: &Lanes) -> Self {
        let (low, high) = from.0.split_at(8);
        // SAFETY: only named under avx2, fma and f16c; twice 8 numbers, aligned to 32 bytes.
        unsafe { Self(_mm256_load_ps(low.as_ptr()), _mm256_load_ps(high.as_ptr())) }
    }

    #[inline(always)]
    fn load_f16(from: &F16Lanes) -> Self {
        let (low, high) = from.0.split_at(8);
        // SAFETY: only named under avx2, fma and f16c; twice 16 bytes, aligned to 16.
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm_load_si128(low.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_load_si128(high.as_ptr().cast())),
            )
        }
    }

    #[inline(always)]
    fn load_bf16(from: &Bf16Lanes) -> Self {
        let (low, high) = from.0.split_at(8);
        // SAFETY: only named under avx2, fma and f16c; twice 16 bytes, aligned to 16.
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
    fn load_i8(from: &I8Lanes) -> Self {
        // SAFETY: only named under avx2, fma and f16c; 16 bytes, aligned to 16.
        unsafe {
            let bytes = _mm_load_si128(from.0.as_ptr().cast());
            Self(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))),
            )
        }
    }

    #[inline(always)]
    fn load_u8(from: &U8Lanes) -> Self {
        // SAFETY: only named under avx2, fma and f16c; 16 bytes, aligned to 16.
        unsafe {
            let bytes = _mm_load_si128(from.0.as_ptr().cast());
            Self(
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))),
            )
        }
    }

    #[inline(always)]
    fn fma(self, x: f32, w: Self) -> Self {
        // SAFETY: only named under avx2, fma and f16c.
        unsafe {
            let x = _mm256_set1_ps(x);
            Self(_mm256_fmadd_ps(x, w.0, self.0), _mm256_fmadd_ps(x, w.1, self.1))
        }
    }

    #[inline(always)]
    fn mul(self, by: Self) -> Self {
        // SAFETY: only named under avx2, fma and f16c.
        unsafe { Self(_mm256_mul_ps(self.0, by.0), _mm256_mul_ps(self.1, by.1)) }
    }

    #[inline(always)]
    fn sub(self, minus: Self) -> Self {
        // SAFETY: only named under avx2, fma and f16c.
        unsafe { Self(_mm256_sub_ps(self.0, minus.0), _mm256_sub_ps(self.1, minus.1)) }
    }

    #[inline(always)]
    fn store(self, to: &mut Lanes) {
        let (low, high) = to.0.split_at_mut(8);
        // SAFETY: only named under avx2, fma and f16c; room for twice 8 numbers, aligned to 32 bytes.
        unsafe {
            _mm256_store_ps(low.as_mut_ptr(), self.0);
            _mm256_store_ps(high.as_mut_ptr(), self.1);
        }
    }

    #[inline(always)]
    fn store_bf16_pairs(first: Self, second: Self, to: &mut Line) {
        let (mut a, mut b) = (Lanes::ZERO, Lanes::ZERO);
        first.store(&mut a);
        second.store(&mut b);
        Lanes::store_bf16_pairs(a, b, to);
    }

    type Sums = PairSums;

    const MAX_SUMS: usize = 2;

    #[inline(always)]
    fn zero_sums() -> PairSums {
        // SAFETY: only named under avx2, fma and f16c.
        PairSums([unsafe { _mm256_setzero_si256() }; 4])
    }

    #[inline(always)]
    fn add_products(mut sums: PairSums, inputs: [i16; 4], weights: &Line) -> PairSums {
        for (sums, weights) in sums.0.iter_mut().zip(weights.0.as_chunks::<16>().0) {
            // SAFETY: only named under avx2, fma and f16c; 16 bytes are read.
            unsafe {
                // The first input is the lowest of four numbers of 16 bits.
                let inputs = _mm256_set1_epi64x(std::mem::transmute::<[i16; 4], i64>(inputs));
                let weights = _mm256_cvtepi8_epi16(_mm_loadu_si128(weights.as_ptr().cast()));
                *sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(inputs, weights));
            }
        }
        sums
    }

    #[inline(always)]
    fn read_sums(sums: PairSums) -> [i32; LANES] {
        // SAFETY: four vectors of eight numbers, of which any bits are some.
        let pairs = unsafe { std::mem::transmute::<PairSums, [[i32; 2]; LANES]>(sums) };
        pairs.map(|[first, second]| first + second)
    }

    #[inline(always)]
    fn join(upper: &Lanes, lower: &Lanes) -> Self {
        Self::load(&<Lanes as Vector>::join(upper, lower))
    }
}

/// For each of 16 outputs the sums of its first two inputs' products and of its last two's.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct PairSums([__m256i; 4]);
