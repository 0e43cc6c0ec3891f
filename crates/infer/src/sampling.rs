//! From logits to the next token.
//!
//! Filters run in transformers' order: repetition penalty, temperature, top-k, top-p, min-p.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; 1 leaves the distribution as it is
    pub temperature: f32,
    /// keep the k most likely tokens; 0 keeps all
    pub top_k: usize,
    /// keep the smallest set whose probability reaches p (Holtzman et al. 2019); 1 keeps all
    pub top_p: f32,
    /// keep tokens at least this fraction as likely as the best one; 0 keeps all
    pub min_p: f32,
    /// above 1: logits of tokens already seen are pushed down (Keskar et al. 2019)
    pub repetition_penalty: f32,
    /// seed of the draws
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 42 }
    }
}

/// A sampling setting that cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{key} = {value}: must be {right}")]
pub struct SamplingError {
    key: &'static str,
    value: f32,
    right: &'static str,
}

/// Draws tokens.
#[derive(Debug)]
pub struct Sampler {
    settings: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Checks the settings.
    pub fn new(settings: Sampling) -> Result<Self, SamplingError> {
        let check = |key, value: f32, ok: bool, right| match ok {
            true => Ok(()),
            false => Err(SamplingError { key, value, right }),
        };
        let s = &settings;
        check("temperature", s.temperature, s.temperature.is_finite() && s.temperature >= 0.0, "0 or above")?;
        check("top_p", s.top_p, s.top_p > 0.0 && s.top_p <= 1.0, "in (0, 1]")?;
        check("min_p", s.min_p, (0.0..=1.0).contains(&s.min_p), "in [0, 1]")?;
        let r = s.repetition_penalty;
        check("repetition_penalty", r, r.is_finite() && r > 0.0, "above 0")?;
        let rng = ChaCha8Rng::seed_from_u64(settings.seed);
        Ok(Self { settings, rng })
    }

    /// The next token after `seen`; `None` if no logit is a number.
    pub fn sample(&mut self, logits: &mut [f32], seen: &[u32]) -> Option<u32> {
        let s = &self.settings;
        if s.repetition_penalty != 1.0 {
            penalise(logits, seen, s.repetition_penalty);
        }
        if s.temperature == 0.0 {
            return argmax(logits);
        }
        let mut ranked: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .filter(|(_, l)| !l.is_nan())
            .map(|(i, l)| (i as u32, l / s.temperature))
            .collect();
        if s.top_k > 0 && s.top_k < ranked.len() {
            ranked.select_nth_unstable_by(s.top_k - 1, by_logit);
            ranked.truncate(s.top_k);
        }
        ranked.sort_unstable_by(by_logit);
        let best = ranked.first()?.1;
        if !best.is_finite() {
            return None;
        }
        let mut weights: Vec<f64> = ranked.iter().map(|(_, l)| f64::from(l - best).exp()).collect();
        if s.top_p < 1.0 {
            let total: f64 = weights.iter().sum();
            let mut before = 0.0;
            let keep = weights.iter().take_while(|w| {
                let needed = before < f64::from(s.top_p) * total;
                before += **w;
                needed
            });
            let keep = keep.count().max(1);
            weights.truncate(keep);
        }
        if s.min_p > 0.0 {
            // weights fall, and the best one is 1
            let keep = weights.iter().take_while(|w| **w >= f64::from(s.min_p)).count().max(1);
            weights.truncate(keep);
        }
        let mut at = self.rng.random::<f64>() * weights.iter().sum::<f64>();
        for (w, (token, _)) in weights.iter().zip(&ranked) {
            at -= w;
            if at < 0.0 {
                return Some(*token);
            }
        }
        ranked.get(weights.len() - 1).map(|(token, _)| *token)
    }
}

/// Higher logits first; equal ones in the order of their ids.
fn by_logit(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The first of the largest logits.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (i, l) in logits.iter().enumerate() {
        if l.is_nan() {
            return None;
        }
        if best.is_none_or(|(_, b)| *l > b) {
            best = Some((i, *l));
        }
    }
    best.map(|(i, _)| i as u32)
}

fn penalise(logits: &mut [f32], seen: &[u32], penalty: f32) {
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(l) = logits.get_mut(token as usize) {
            *l = if *l < 0.0 { *l * penalty } else { *l / penalty };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(settings: Sampling) -> Sampler {
        Sampler::new(settings).unwrap()
    }

    /// Which tokens come up in many draws from these probabilities.
    fn support(settings: Sampling, probabilities: &[f32]) -> Vec<u32> {
        let mut sampler = sampler(settings);
        let mut found = std::collections::BTreeSet::new();
        for _ in 0..2000 {
            let mut logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
            found.insert(sampler.sample(&mut logits, &[]).unwrap());
        }
        found.into_iter().collect()
    }

    const P: [f32; 4] = [0.1, 0.5, 0.25, 0.15];

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut s = sampler(Sampling::default());
        assert_eq!(s.sample(&mut [0.0, 3.0, 3.0, -1.0], &[]), Some(1));
        assert_eq!(s.sample(&mut [0.0, f32::NAN], &[]), None);
    }

    #[test]
    fn filters_cut_the_tail() {
        let warm = Sampling { temperature: 1.0, ..Default::default() };
        assert_eq!(support(warm.clone(), &P), [0, 1, 2, 3]);
        assert_eq!(support(Sampling { top_k: 2, ..warm.clone() }, &P), [1, 2]);
        assert_eq!(support(Sampling { top_p: 0.6, ..warm.clone() }, &P), [1, 2]);
        assert_eq!(support(Sampling { top_p: 0.01, ..warm.clone() }, &P), [1]);
        assert_eq!(support(Sampling { min_p: 0.29, ..warm.clone() }, &P), [1, 2, 3]);
        assert_eq!(support(Sampling { min_p: 1.0, ..warm }, &P), [1]);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let mut s = sampler(Sampling { temperature: 1.0, ..Default::default() });
        let n = 20_000;
        let mut counts = [0f64; 4];
        for _ in 0..n {
            let mut logits = P.map(f32::ln);
            counts[s.sample(&mut logits, &[]).unwrap() as usize] += 1.0;
        }
        for (count, p) in counts.iter().zip(P) {
            // five standard deviations of a binomial share
            let sd = (f64::from(p * (1.0 - p)) / f64::from(n)).sqrt();
            assert!((count / f64::from(n) - f64::from(p)).abs() < 5.0 * sd, "{counts:?}");
        }
    }

    #[test]
    fn the_penalty_pushes_seen_tokens_down_whatever_their_sign() {
        let mut s = sampler(Sampling { repetition_penalty: 2.0, ..Default::default() });
        assert_eq!(s.sample(&mut [4.0, 3.0], &[0]), Some(1));
        assert_eq!(s.sample(&mut [-1.0, -1.5], &[0]), Some(1));
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let draw = |seed| {
            let mut s = sampler(Sampling { temperature: 1.0, seed, ..Default::default() });
            (0..50).map(|_| s.sample(&mut P.map(f32::ln), &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn refuses_settings_that_cannot_be() {
        for bad in [
            Sampling { temperature: -1.0, ..Default::default() },
            Sampling { top_p: 0.0, ..Default::default() },
            Sampling { min_p: 1.5, ..Default::default() },
            Sampling { repetition_penalty: 0.0, ..Default::default() },
            Sampling { temperature: f32::NAN, ..Default::default() },
        ] {
            assert!(Sampler::new(bad).is_err());
        }
    }
}
