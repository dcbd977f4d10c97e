//! Rotary position embeddings: the angles of each position, computed once.

/// How positions rotate the dimensions of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Dimensions that are rotated; half as many angles.
    pub dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How rope frequencies are stretched for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All by the same factor.
    Linear {
        /// How much longer.
        factor: f64,
    },
    /// By wavelength, as Llama 3.1 does.
    Llama3 {
        /// How much longer the slow ones become.
        factor: f64,
        /// Wavelengths beyond `original / low_freq_factor` are slow.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` stay.
        high_freq_factor: f64,
        /// Context it was trained on first.
        original_max_positions: usize,
    },
    /// By number of rotations, and attention is sharpened.
    Yarn {
        /// How much longer the slow ones become.
        factor: f64,
        /// Sines and cosines are multiplied by it.
        attention_factor: f64,
        /// Rotations above which a frequency stays.
        beta_fast: f64,
        /// Rotations below which a frequency is slow.
        beta_slow: f64,
        /// Whether the bounds between them are rounded to whole dimensions.
        truncate: bool,
        /// Context it was trained on first.
        original_max_positions: usize,
    },
}

/// Cosines and sines of every position, `(num_positions, dim / 2)` each.
#[derive(Debug, Default)]
pub(crate) struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// The table of positions `0..num_positions`.
    pub(crate) fn new(rope: &Rope, num_positions: usize) -> Self {
        let frequencies = rope.frequencies();
        let scale = match rope.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        };
        let half = frequencies.len();
        let mut table = Self {
            cos: Vec::with_capacity(num_positions * half),
            sin: Vec::with_capacity(num_positions * half),
            half,
        };
        for position in 0..num_positions {
            for frequency in &frequencies {
                // The angle is rounded as the reference rounds it, sine and cosine only once.
                let angle = f64::from(position as f32 * frequency);
                table.cos.push(angle.cos() as f32 * scale);
                table.sin.push(angle.sin() as f32 * scale);
            }
        }
        table
    }

    /// Cosines and sines of a position.
    #[inline(always)]
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let start = position * self.half;
        (&self.cos[start..][..self.half], &self.sin[start..][..self.half])
    }
}

impl Rope {
    /// Radians per position of each pair of dimensions.
    fn frequencies(&self) -> Vec<f32> {
        (0..self.dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f64 / self.dim as f64;
                self.scaled(pair, 1.0 / self.theta.powf(exponent)) as f32
            })
            .collect()
    }

    fn scaled(&self, pair: usize, frequency: f64) -> f64 {
        use std::f64::consts::TAU;
        match self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_positions,
            } => {
                let rotations = original_max_positions as f64 * frequency / TAU;
                if rotations < low_freq_factor {
                    frequency / factor
                } else if rotations > high_freq_factor {
                    frequency
                } else {
                    let fast = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - fast) * frequency / factor + fast * frequency
                }
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_positions,
                ..
            } => {
                // The dimension whose frequency makes so many rotations in the original context.
                let dimension = |rotations: f64| {
                    let wavelength = original_max_positions as f64 / (rotations * TAU);
                    self.dim as f64 * wavelength.ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let low = low.max(0.0);
                let mut high = high.min(self.dim as f64 - 1.0);
                if low == high {
                    high += 0.001;
                }
                let slow = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency / factor * slow + frequency * (1.0 - slow)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_position_does_not_rotate_and_first_pair_turns_by_one() {
        let table =
            RopeTable::new(&Rope { dim: 8, theta: 10_000.0, scaling: RopeScaling::None }, 4);
        assert_eq!(table.at(0), (&[1.0; 4][..], &[0.0; 4][..]));
        let (cos, sin) = table.at(3);
        assert!((f64::from(cos[0]) - 3f64.cos()).abs() < 1e-7);
        assert!((f64::from(sin[1]) - 0.3f64.sin()).abs() < 1e-7);
    }

    #[test]
    fn llama3_keeps_fast_and_stretches_slow_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 8192,
        };
        let plain = Rope { dim: 128, theta: 5e5, scaling: RopeScaling::None }.frequencies();
        let scaled = Rope { dim: 128, theta: 5e5, scaling }.frequencies();
        assert_eq!(plain[0], scaled[0]);
        assert!((plain[63] / scaled[63] - 8.0).abs() < 1e-5);
        assert!(scaled.is_sorted_by(|a, b| a > b));
    }
}
