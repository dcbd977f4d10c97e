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
    /// Each by its own factor, another one once a sequence is longer than the context it was trained on
    /// first; then all of its positions are rotated otherwise.
    Longrope {
        /// Factors up to that length, `(dim / 2)`.
        short_factors: Vec<f64>,
        /// Factors beyond, `(dim / 2)`.
        long_factors: Vec<f64>,
        /// Sines and cosines are multiplied by it.
        attention_factor: f64,
        /// Context it was trained on first.
        original_max_positions: usize,
    },
}

/// Cosines and sines of every position that was asked for.
#[derive(Debug)]
pub(crate) struct RopeTable {
    angles: Angles,
    /// Those of sequences that are longer than the context the model was trained on first.
    long: Option<Angles>,
    num_positions: usize,
}

#[derive(Debug)]
struct Angles {
    /// Radians per position of each pair of dimensions, `(dim / 2)`.
    frequencies: Vec<f32>,
    /// Both are multiplied by it.
    scale: f32,
    /// `(num_positions, dim / 2)`
    cos: Vec<f32>,
    /// `(num_positions, dim / 2)`
    sin: Vec<f32>,
}

impl RopeTable {
    /// A table without positions yet.
    pub(crate) fn new(rope: &Rope) -> Self {
        let scale = rope.attention_factor();
        let angles = |is_long| Angles {
            frequencies: rope.frequencies(is_long),
            scale,
            cos: Vec::new(),
            sin: Vec::new(),
        };
        let has_long = matches!(rope.scaling, RopeScaling::Longrope { .. });
        let long = has_long.then(|| angles(true));
        Self { angles: angles(false), long, num_positions: 0 }
    }

    /// Computes what is missing of the positions `0..num_positions`.
    pub(crate) fn ensure(&mut self, num_positions: usize) {
        for position in self.num_positions..num_positions {
            self.angles.push(position);
            if let Some(long) = &mut self.long {
                long.push(position);
            }
        }
        self.num_positions = self.num_positions.max(num_positions);
    }

    /// Cosines and sines of a position, `(dim / 2)` each, in a sequence that is long or not
    /// ([`crate::step::SequenceInput::is_long`]).
    #[inline(always)]
    pub(crate) fn at(&self, position: usize, is_long: bool) -> (&[f32], &[f32]) {
        let angles = self.long.as_ref().filter(|_| is_long).unwrap_or(&self.angles);
        let half = angles.frequencies.len();
        let start = position * half;
        (&angles.cos[start..][..half], &angles.sin[start..][..half])
    }
}

impl Angles {
    fn push(&mut self, position: usize) {
        for frequency in &self.frequencies {
            // The angle is rounded as the reference rounds it, sine and cosine only once.
            let angle = f64::from(position as f32 * frequency);
            self.cos.push(angle.cos() as f32 * self.scale);
            self.sin.push(angle.sin() as f32 * self.scale);
        }
    }
}

impl Rope {
    /// Tokens beyond which all positions of a sequence are rotated otherwise, if there is such a length.
    pub(crate) fn long_beyond(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::Longrope { original_max_positions, .. } => Some(original_max_positions),
            _ => None,
        }
    }

    /// Sines and cosines are multiplied by it.
    pub(crate) fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. }
            | RopeScaling::Longrope { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Radians per position of each pair of dimensions, `(2, dim / 2)`: the second row is for long sequences
    /// ([`Self::long_beyond`]).
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn frequency_rows(&self) -> Vec<f32> {
        [self.frequencies(false), self.frequencies(self.long_beyond().is_some())].concat()
    }

    /// Radians per position of each pair of dimensions.
    fn frequencies(&self, is_long: bool) -> Vec<f32> {
        (0..self.dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f64 / self.dim as f64;
                self.scaled(pair, 1.0 / self.theta.powf(exponent), is_long) as f32
            })
            .collect()
    }

    fn scaled(&self, pair: usize, frequency: f64, is_long: bool) -> f64 {
        use std::f64::consts::TAU;
        match self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Longrope { ref short_factors, ref long_factors, .. } => {
                frequency / if is_long { long_factors[pair] } else { short_factors[pair] }
            }
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
        let rope = Rope { dim: 8, theta: 10_000.0, scaling: RopeScaling::None };
        let mut table = RopeTable::new(&rope);
        table.ensure(4);
        assert_eq!(table.at(0, false), (&[1.0; 4][..], &[0.0; 4][..]));
        let (cos, sin) = table.at(3, false);
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
        let plain = Rope { dim: 128, theta: 5e5, scaling: RopeScaling::None }.frequencies(false);
        let scaled = Rope { dim: 128, theta: 5e5, scaling }.frequencies(false);
        assert_eq!(plain[0], scaled[0]);
        assert!((plain[63] / scaled[63] - 8.0).abs() < 1e-5);
        assert!(scaled.is_sorted_by(|a, b| a > b));
    }
}
