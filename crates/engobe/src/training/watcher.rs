//! What a person sees of a run, and how they end it.

use crate::terminal::{Note, Progress, say};
use engobe_train::{Evaluation, Observer, StepMetrics, Trainer};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// Shows the run and listens for Ctrl-C.
pub struct Watcher {
    progress: Progress,
    stop: Arc<AtomicBool>,
    /// means over the last steps, for a calm display
    loss: f64,
    rate: f64,
    eval_loss: Option<f64>,
}

impl Watcher {
    /// Beside the run of `trainer`.
    pub fn new(trainer: &Trainer<'_>, note: &Note) -> Self {
        let progress = Progress::new("steps", trainer.total_steps(), trainer.step(), note);
        Self { progress, stop: stop_flag(), loss: f64::NAN, rate: f64::NAN, eval_loss: None }
    }
}

impl Observer for Watcher {
    fn step(&mut self, metrics: &StepMetrics, _total: usize) {
        let calm = |old: f64, new: f64| if old.is_nan() { new } else { 0.9 * old + 0.1 * new };
        self.loss = calm(self.loss, metrics.loss);
        self.rate = calm(self.rate, metrics.tokens as f64 / metrics.seconds.max(1e-9));
        let (loss, rate, eval) = (self.loss, self.rate, self.eval_loss);
        self.progress.update(metrics.step, || {
            let eval = eval.map_or(String::new(), |e| format!(" · validation {e:.4}"));
            format!("loss {loss:.4}{eval} · {rate:.0} tokens/s")
        });
    }

    fn evaluated(&mut self, step: usize, evaluation: &Evaluation, best: bool) {
        self.eval_loss = Some(evaluation.loss);
        let mark = if best { " (best)" } else { "" };
        let score = match evaluation.scores.first() {
            None => format!("token accuracy {:.1} %", 100.0 * evaluation.token_accuracy),
            Some((name, Some(value))) => format!("{name} {:.2} %", 100.0 * value),
            Some((name, None)) => format!("{name} not defined"),
        };
        self.progress.remark(&format!("step {step}: validation loss {:.4}, {score}{mark}", evaluation.loss));
    }

    fn saved(&mut self, _: &Path) {}

    fn stop_requested(&mut self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Set by the first Ctrl-C, SIGTERM or SIGHUP; the second one ends the process at once.
fn stop_flag() -> Arc<AtomicBool> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    let install = || {
        let flag = Arc::new(AtomicBool::new(false));
        let seen = flag.clone();
        // without a handler Ctrl-C ends the process, and checkpoints are whole all the same
        let _ = ctrlc::set_handler(move || {
            if seen.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            say("\nfinishing this step and saving; Ctrl-C again ends at once");
        });
        flag
    };
    FLAG.get_or_init(install).clone()
}
