//! Frequencies of rotary position embedding and their scaling variants.
//!
//! The formulas follow transformers' `modeling_rope_utils.py` (5.x), which is where checkpoints' settings
//! come from; arithmetic is in f32 where it is there, so that angles agree at long positions.

use engobe_kernels::rope::RopeTable;
use std::f64::consts::PI;
use std::sync::{Arc, RwLock};

/// How frequencies are stretched beyond the training length.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// as trained
    None,
    /// positions divided by `factor` (kaiokendev 2023)
    Linear {
        /// stretch
        factor: f32,
    },
    /// base grown with the length once it exceeds `max_positions` (NTK-aware, dynamic)
    Dynamic {
        /// stretch
        factor: f64,
        /// length trained for
        max_positions: usize,
    },
    /// high frequencies kept, low ones divided, a ramp between (Llama 3.1)
    Llama3 {
        /// stretch
        factor: f32,
        /// wavelengths above original/low are divided
        low_freq_factor: f32,
        /// wavelengths below original/high are kept
        high_freq_factor: f32,
        /// length trained for
        original: usize,
    },
    /// interpolation by parts and an attention factor (Peng et al. 2023)
    Yarn {
        /// stretch
        factor: f64,
        /// length trained for
        original: usize,
        /// rotations above which a dimension is kept
        beta_fast: f64,
        /// rotations below which a dimension is interpolated
        beta_slow: f64,
        /// factor on cosines and sines
        attention_factor: f32,
        /// round the ramp's ends to whole dimensions
        truncate: bool,
    },
    /// factors per frequency, one set for short and one for long sequences (Ding et al. 2024)
    LongRope {
        /// up to `original` tokens
        short_factor: Vec<f32>,
        /// beyond
        long_factor: Vec<f32>,
        /// length trained for
        original: usize,
        /// factor on cosines and sines
        attention_factor: f32,
    },
    /// each frequency divided by its own factor (GGUF's `rope_freqs.weight`)
    Factors(Vec<f32>),
}

/// Rotary embedding of one model: makes tables and keeps the last.
#[derive(Debug)]
pub struct Rope {
    base: f64,
    dim: usize,
    scaling: RopeScaling,
    tables: RwLock<Option<Kept>>,
}

#[derive(Debug, Clone)]
struct Kept {
    regime: usize,
    positions: usize,
    table: Arc<RopeTable>,
}

/// YaRN's attention factor for a stretch (eq. 22 of the paper, with DeepSeek's `mscale`).
pub fn yarn_mscale(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
}

impl Rope {
    /// `base` is `rope_theta`, `dim` the rotated part of a head (even).
    pub fn new(base: f64, dim: usize, scaling: RopeScaling) -> Self {
        Self { base, dim, scaling, tables: RwLock::new(None) }
    }

    /// The table for sequences of up to `len` positions.
    pub fn table(&self, len: usize) -> Arc<RopeTable> {
        let regime = self.regime(len);
        if let Ok(kept) = self.tables.read()
            && let Some(kept) = kept.as_ref()
            && kept.regime == regime
            && kept.positions >= len
        {
            return kept.table.clone();
        }
        let positions = len.next_power_of_two().max(64);
        let (inv_freq, attention_factor) = self.inverse_frequencies(len);
        let table = Arc::new(RopeTable::new(&inv_freq, attention_factor, positions));
        if let Ok(mut kept) = self.tables.write() {
            *kept = Some(Kept { regime, positions, table: table.clone() });
        }
        table
    }

    /// Tables are interchangeable within a regime: lengths for which the frequencies are the same.
    fn regime(&self, len: usize) -> usize {
        match &self.scaling {
            RopeScaling::Dynamic { max_positions, .. } => len.max(*max_positions),
            RopeScaling::LongRope { original, .. } => usize::from(len > *original),
            _ => 0,
        }
    }

    /// Inverse frequencies `[dim / 2]` for a sequence of `len` tokens, and the factor on cosines and sines.
    pub fn inverse_frequencies(&self, len: usize) -> (Vec<f32>, f32) {
        let base = self.base as f32;
        match &self.scaling {
            RopeScaling::None => (self.plain(base), 1.0),
            RopeScaling::Linear { factor } => (self.plain(base).iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Dynamic { factor, max_positions } => {
                let (max, d) = (*max_positions as f64, self.dim as f64);
                let len = (len as f64).max(max);
                let grown = self.base * ((factor * len / max) - (factor - 1.0)).powf(d / (d - 2.0));
                (self.plain(grown as f32), 1.0)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let original = *original as f32;
                let stretch = |f: &f32| {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength > original / low_freq_factor {
                        f / factor
                    } else if wavelength < original / high_freq_factor {
                        *f
                    } else {
                        let smooth =
                            (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                (self.plain(base).iter().map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn { attention_factor, .. } => (self.yarn(), *attention_factor),
            RopeScaling::LongRope { short_factor, long_factor, original, attention_factor } => {
                let factors = if len > *original { long_factor } else { short_factor };
                let divided = self.powers(base).iter().zip(factors).map(|(p, f)| 1.0 / (f * p)).collect();
                (divided, *attention_factor)
            }
            RopeScaling::Factors(factors) => {
                (self.plain(base).iter().zip(factors).map(|(f, by)| f / by).collect(), 1.0)
            }
        }
    }

    /// base^(2i/dim)
    fn powers(&self, base: f32) -> Vec<f32> {
        (0..self.dim / 2).map(|i| base.powf((2 * i) as f32 / self.dim as f32)).collect()
    }

    /// base^(-2i/dim)
    fn plain(&self, base: f32) -> Vec<f32> {
        self.powers(base).iter().map(|p| 1.0 / p).collect()
    }

    fn yarn(&self) -> Vec<f32> {
        let RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } = &self.scaling else {
            return self.plain(self.base as f32);
        };
        let dim = self.dim as f64;
        let correction =
            |rotations: f64| dim * (*original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * self.base.ln());
        let (mut low, mut high) = (correction(*beta_fast), correction(*beta_slow));
        if *truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let powers = self.powers(self.base as f32);
        let mix = |(i, power): (usize, &f32)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let (kept, stretched) = (1.0 / power, 1.0 / (*factor as f32 * power));
            stretched * ramp + kept * (1.0 - ramp)
        };
        powers.iter().enumerate().map(mix).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_scaling_changes_the_table_with_the_length_only_beyond_training() {
        let rope = Rope::new(10_000.0, 8, RopeScaling::Dynamic { factor: 4.0, max_positions: 16 });
        let short = rope.inverse_frequencies(5).0;
        assert_eq!(short, rope.inverse_frequencies(16).0);
        assert_ne!(short, rope.inverse_frequencies(17).0);
        assert!(!Arc::ptr_eq(&rope.table(17), &rope.table(18)));
    }

    #[test]
    fn one_table_serves_all_shorter_sequences() {
        let rope = Rope::new(10_000.0, 8, RopeScaling::None);
        let table = rope.table(100);
        assert!(Arc::ptr_eq(&table, &rope.table(3)));
        assert!(!Arc::ptr_eq(&table, &rope.table(1000)));
    }

    #[test]
    fn llama3_keeps_short_waves_and_divides_long_ones() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192 };
        let scaled = Rope::new(500_000.0, 128, scaling).inverse_frequencies(10).0;
        let plain = Rope::new(500_000.0, 128, RopeScaling::None).inverse_frequencies(10).0;
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
    }
}
