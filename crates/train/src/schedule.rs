//! The learning rate of each step, as transformers' `get_*_schedule_with_warmup`.

use crate::plan::{LrScheduler, Optimization};

/// Learning rate of step `step` (0-based) of `total`.
pub fn learning_rate(o: &Optimization, step: usize, total: usize) -> f64 {
    let (at, warmup, total) = (step as f64, o.warmup_steps as f64, total as f64);
    if step < o.warmup_steps {
        return o.learning_rate * at / warmup.max(1.0);
    }
    let factor = match o.lr_scheduler {
        LrScheduler::Constant => 1.0,
        LrScheduler::Linear => ((total - at) / (total - warmup).max(1.0)).max(0.0),
        LrScheduler::Cosine => {
            let progress = (at - warmup) / (total - warmup).max(1.0);
            (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
        }
    };
    o.learning_rate * factor
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(lr_scheduler: LrScheduler, warmup_steps: usize, total: usize) -> Vec<f64> {
        let o = Optimization { learning_rate: 1.0, lr_scheduler, warmup_steps, ..Default::default() };
        (0..total).map(|s| learning_rate(&o, s, total)).collect()
    }

    #[test]
    fn follows_transformers() {
        // printed by transformers 5.23's get_{linear,cosine,constant}_schedule_with_warmup(2, 6)
        assert_eq!(rates(LrScheduler::Linear, 2, 6), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(rates(LrScheduler::Constant, 2, 6), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]);
        let cosine = [0.0, 0.5, 1.0, 0.853_553_390_593_273_8, 0.5, 0.146_446_609_406_726_24];
        for (a, b) in rates(LrScheduler::Cosine, 2, 6).iter().zip(cosine) {
            assert!((a - b).abs() < 1e-12, "{a} {b}"); // one cosine's rounding
        }
    }
}
