//! The random numbers of the draws.

/// A number in `[0, 1)` that depends on the seed and the position alone.
///
/// A counter-based generator: two rounds of the SplitMix64 finaliser (Steele, Lea and Flood, 2014).
pub(super) fn uniform(seed: u64, position: u64) -> f64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let mixed = mix(mix(seed.wrapping_add(GOLDEN)) ^ position.wrapping_add(1).wrapping_mul(GOLDEN));
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}

/// The finaliser of SplitMix64.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_seeds_draw_independently() {
        let mut numbers: Vec<u64> = Vec::new();
        for seed in 0..100 {
            numbers.extend((0..100).map(|position| uniform(seed, position).to_bits()));
        }
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 10_000);
    }
}
