//! The loop: windows of micro-batches, one optimizer step each.

use crate::checkpoint::{self, RunState};
use crate::evaluate::{Evaluation, evaluate};
use crate::memory::guard::{Guard, OverLimit};
use crate::metrics::{MetricsFile, StepMetrics};
use crate::model::Model;
use crate::optimizer::Optimizer;
use crate::plan::Plan;
use crate::schedule::learning_rate;
use crate::scores;
use crate::step::{self, Differentiate, LossSums};
use crate::{Error, Result};
use engobe_adapters::Adapter;
use engobe_adapters::method::StepTaken;
use engobe_autograd::{Gradients, Param};
use engobe_data::{Loader, MicroBatch};
use engobe_formats::peft::PeftAdapter;
use engobe_formats::safetensors_file::SafetensorsFile;
use engobe_kernels::dropout::mix;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What is trained at the best evaluation, where the adapter's own file does not hold all of it.
const BEST_STATE: &str = "state.safetensors";

/// Watches a run.
pub trait Observer {
    /// A step is done.
    fn step(&mut self, metrics: &StepMetrics, total: usize);
    /// The validation rows were evaluated after `step`.
    fn evaluated(&mut self, step: usize, evaluation: &Evaluation, best: bool);
    /// A checkpoint was written.
    fn saved(&mut self, path: &Path);
    /// True if the run shall save and end after this step.
    fn stop_requested(&mut self) -> bool;
}

/// Watches nothing.
pub struct Silent;

impl Observer for Silent {
    fn step(&mut self, _: &StepMetrics, _: usize) {}
    fn evaluated(&mut self, _: usize, _: &Evaluation, _: bool) {}
    fn saved(&mut self, _: &Path) {}
    fn stop_requested(&mut self) -> bool {
        false
    }
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// optimizer steps done in all
    pub steps: usize,
    /// steps that the plan asks for
    pub total_steps: usize,
    /// loss of the last step
    pub final_loss: Option<f64>,
    /// best loss on the validation rows
    pub best_eval_loss: Option<f64>,
    /// tokens seen
    pub tokens: u64,
    /// labels learned from
    pub label_tokens: u64,
    /// seconds in steps
    pub seconds: f64,
    /// the observer asked to stop before the end
    pub interrupted: bool,
    /// evaluations stopped getting better
    pub stopped_early: bool,
}

/// One run.
pub struct Trainer<'a> {
    model: Model<'a>,
    adapter: &'a Adapter,
    plan: &'a Plan,
    loader: Loader,
    eval: Vec<MicroBatch>,
    out: PathBuf,
    optimizer: Optimizer,
    state: RunState,
    total_steps: usize,
    guard: Option<Guard>,
}

impl<'a> Trainer<'a> {
    /// Prepares a run that writes into `out`. `fingerprint` says what must not change between the parts of
    /// a resumed run (settings, data, model).
    pub fn new(
        model: impl Into<Model<'a>>,
        adapter: &'a Adapter,
        plan: &'a Plan,
        loader: Loader,
        eval: Vec<MicroBatch>,
        out: &Path,
        fingerprint: String,
    ) -> Result<Self> {
        plan.validate()?;
        let model = model.into();
        check_metric(model, plan.upkeep.metric_for_best_model.as_deref())?;
        let state_file = plan.optimization.state_file.clone().unwrap_or_else(|| out.join("optimizer.state"));
        let optimizer = Optimizer::new(&plan.optimization, &adapter.params(), &state_file)?;
        let accumulation = plan.schedule.gradient_accumulation;
        let steps_per_epoch = loader.len_per_epoch().div_ceil(accumulation);
        if steps_per_epoch == 0 {
            return Err(Error::NoLabels);
        }
        let total_steps = match plan.schedule.max_steps {
            Some(steps) => steps,
            None => ((steps_per_epoch as f64 * plan.schedule.epochs).ceil() as usize).max(1),
        };
        adapter.begin(total_steps)?;
        Ok(Self {
            model,
            adapter,
            plan,
            loader,
            eval,
            out: out.to_path_buf(),
            optimizer,
            state: RunState { fingerprint, ..Default::default() },
            total_steps,
            guard: None,
        })
    }

    /// Sets what watches over the run's memory.
    pub fn guarded_by(mut self, guard: Option<Guard>) -> Self {
        self.guard = guard;
        self
    }

    /// Steps that the run will take.
    pub fn total_steps(&self) -> usize {
        self.total_steps
    }

    /// Steps done.
    pub fn step(&self) -> usize {
        self.state.step
    }

    /// Goes on from the newest checkpoint in the output directory. False if there is none: the run starts
    /// from the beginning.
    pub fn resume(&mut self) -> Result<bool> {
        let Some(dir) = checkpoint::latest(&self.out)? else { return Ok(false) };
        let found = checkpoint::load(&dir)?;
        if found.state.fingerprint != self.state.fingerprint {
            let what = format!(
                "{} belongs to a run with other settings, data or model: {}",
                dir.display(),
                difference(&found.state.fingerprint, &self.state.fingerprint)
            );
            return Err(Error::Resume { what });
        }
        for param in self.adapter.stateful() {
            let value = found.adapter.get(param.name()).ok_or_else(|| Error::Resume {
                what: format!("{} has no tensor {}", dir.display(), param.name()),
            })?;
            param.set(&value.to_device(param.tensor().device())?)?;
        }
        self.optimizer.restore(&found.optimizer)?;
        self.loader.seek(&found.state.cursor);
        self.state = found.state;
        Ok(true)
    }

    /// Trains to the end, or until the observer asks to stop, and writes the adapter.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Outcome> {
        let mut unevaluated = self.state.unevaluated.take();
        let written = self.state.step - usize::from(unevaluated.is_some());
        let mut metrics = MetricsFile::open(&self.out, written)?;
        let params: Vec<Param> = self.adapter.params().into_iter().cloned().collect();
        let params: Vec<&Param> = params.iter().collect();
        let mut interrupted = false;
        while unevaluated.is_some() || self.state.step < self.total_steps && !self.state.stopped_early {
            let mut line = match unevaluated.take() {
                Some(line) => line,
                None => match self.optimizer_step(&params) {
                    Ok(line) => line,
                    Err(error) => return Err(self.over_limit(error, observer)),
                },
            };
            let last = self.state.step >= self.total_steps;
            if due(self.state.step, self.plan.upkeep.eval_steps) || last {
                match self.evaluate(observer) {
                    Ok(None) => {}
                    Ok(Some(found)) => {
                        line.eval_loss = Some(found.loss);
                        line.eval_scores =
                            found.scores.into_iter().filter_map(|(n, v)| Some((n, v?))).collect();
                    }
                    Err(error) => {
                        self.state.unevaluated = Some(line);
                        return Err(self.over_limit(error, observer));
                    }
                }
            }
            metrics.push(&line)?;
            observer.step(&line, self.total_steps);
            interrupted = observer.stop_requested() && !last;
            let ends = last || interrupted || self.state.stopped_early;
            if due(self.state.step, self.plan.upkeep.save_steps) || ends {
                self.save(observer)?;
            }
            if interrupted {
                break;
            }
        }
        if interrupted {
            self.adapter.save(&self.out)?;
        } else {
            self.finish()?;
        }
        Ok(self.outcome(interrupted))
    }

    /// Saves the last whole step if it was the guard that ended this one, or the evaluation after it: parameters and
    /// optimizer are untouched.
    fn over_limit(&mut self, error: Error, observer: &mut dyn Observer) -> Error {
        let cause = match &error {
            Error::Op(engobe_autograd::Error::Stopped(cause)) => cause.downcast_ref::<OverLimit>().copied(),
            _ => None,
        };
        match cause.map(|cause| (cause, self.save(observer))) {
            None => error,
            Some((_, Err(error))) => error,
            Some((cause, Ok(saved))) => match self.state.unevaluated.is_some() {
                true => Error::EvalOverLimit { step: self.state.step, saved, cause },
                false => Error::OverLimit { step: self.state.step + 1, saved, cause },
            },
        }
    }

    fn outcome(&self, interrupted: bool) -> Outcome {
        Outcome {
            steps: self.state.step,
            total_steps: self.total_steps,
            final_loss: self.state.last_loss,
            best_eval_loss: self.state.best_eval_loss,
            tokens: self.state.tokens,
            label_tokens: self.state.label_tokens,
            seconds: self.state.seconds,
            interrupted,
            stopped_early: self.state.stopped_early,
        }
    }

    /// One window of micro-batches and one update.
    fn optimizer_step(&mut self, params: &[&Param]) -> Result<StepMetrics> {
        let started = Instant::now();
        let o = &self.plan.optimization;
        let window = self.loader.next_window(self.plan.schedule.gradient_accumulation);
        let label_tokens: usize = window.iter().map(|b| b.label_tokens).sum();
        let tokens: usize = window.iter().map(|b| b.tokens.len()).sum();
        let mut grads = Gradients::new();
        let mut sums = LossSums::default();
        let step_seed = mix(self.plan.schedule.seed, self.state.step as u64);
        for (i, batch) in window.iter().enumerate() {
            let how = Differentiate {
                checkpointing: self.plan.compute.activation_checkpointing,
                dropout_seed: mix(step_seed, i as u64),
                scale: 1.0 / label_tokens.max(1) as f32,
                half: self.plan.compute.compute_dtype.half(),
                watch: self.guard.as_ref().map(|guard| guard.watch_step(batch.tokens.len())),
            };
            sums.add(step::differentiate(self.model, batch, how, &mut grads)?);
            if let Some(guard) = &mut self.guard {
                guard.stepped(batch.tokens.len());
            }
        }
        let loss = sums.mean() + self.adapter.penalty(&mut grads)?;
        let grad_norm = grads.sum_squares()?.sqrt();
        if !(loss.is_finite() && grad_norm.is_finite()) {
            let rows: Vec<String> =
                window.iter().flat_map(|b| &b.rows).take(5).map(|r| (r + 1).to_string()).collect();
            let value = if loss.is_finite() { grad_norm } else { loss };
            return Err(Error::NotFinite { step: self.state.step + 1, value, rows: rows.join(", ") });
        }
        // torch.nn.utils.clip_grad_norm_
        let clip = match o.max_grad_norm > 0.0 {
            true => (o.max_grad_norm / (grad_norm + 1e-6)).min(1.0),
            false => 1.0,
        };
        let lr = learning_rate(o, self.state.step, self.total_steps);
        self.optimizer.step(params, &grads, lr, clip)?;
        let (step, total) = (self.state.step, self.total_steps);
        self.adapter.after_step(&StepTaken { step, total, grads: &grads, grad_scale: clip as f32 })?;
        let seconds = started.elapsed().as_secs_f64();
        let state = &mut self.state;
        state.step += 1;
        state.cursor = self.loader.cursor();
        state.last_loss = Some(loss);
        state.tokens += tokens as u64;
        state.label_tokens += label_tokens as u64;
        state.seconds += seconds;
        let epoch = self.loader.epochs_done();
        Ok(StepMetrics {
            step: state.step,
            loss,
            lr,
            grad_norm,
            tokens,
            label_tokens,
            seconds,
            epoch,
            eval_loss: None,
            eval_scores: BTreeMap::new(),
        })
    }

    /// Evaluates the validation rows, keeps the best adapter, decides on stopping early.
    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<Option<Evaluation>> {
        if self.eval.is_empty() {
            return Ok(None);
        }
        let upkeep = &self.plan.upkeep;
        let evaluation = evaluate(self.model, &self.eval, self.guard.as_mut(), &mut |_| ())?;
        let best_dir = self.best_dir();
        let state = &mut self.state;
        let metric = upkeep.metric_for_best_model.as_deref().unwrap_or("loss");
        let sign = if scores::less_is_better(metric) { -1.0 } else { 1.0 };
        // a score that is not defined is no gain
        let value = evaluation.score(metric).map_or(f64::NEG_INFINITY, |value| sign * value);
        let threshold = upkeep.early_stopping_threshold;
        let better = state.best_value.is_none_or(|best| value > best + threshold);
        state.best_eval_loss = Some(state.best_eval_loss.map_or(evaluation.loss, |l| l.min(evaluation.loss)));
        if better {
            state.best_value = Some(value);
            state.best_step = Some(state.step);
            state.evals_without_gain = 0;
            if upkeep.load_best {
                self.adapter.save(&best_dir)?;
                if !self.adapter.file_is_whole() {
                    checkpoint::write_tensors(&best_dir.join(BEST_STATE), &self.adapter.state()?)?;
                }
            }
        } else {
            state.evals_without_gain += 1;
            let patience = upkeep.early_stopping_patience;
            state.stopped_early = patience > 0 && state.evals_without_gain >= patience;
        }
        observer.evaluated(state.step, &evaluation, better);
        Ok(Some(evaluation))
    }

    fn best_dir(&self) -> PathBuf {
        self.out.join("best")
    }

    fn save(&mut self, observer: &mut dyn Observer) -> Result<PathBuf> {
        let keep = self.plan.upkeep.save_total_limit;
        let (adapter, optimizer) = (self.adapter.state()?, self.optimizer.state()?);
        let path = checkpoint::save(&self.out, &self.state, &adapter, optimizer, keep)?;
        observer.saved(&path);
        Ok(path)
    }

    /// Writes the run's adapter: the last one, or the best one.
    fn finish(&mut self) -> Result<()> {
        let best = self.best_dir();
        if self.plan.upkeep.load_best && self.state.best_step.is_some() && best.exists() {
            let state = best.join(BEST_STATE);
            match state.exists() {
                true => {
                    let file = SafetensorsFile::open(&state)?;
                    let tensors = file.tensors().map(|t| (t.name.clone(), t.clone())).collect();
                    self.adapter.restore(&state, &tensors)?;
                }
                false => self.adapter.fill(&best, &PeftAdapter::load(&best)?.tensors)?,
            }
        }
        Ok(self.adapter.save(&self.out)?)
    }
}

/// Refuses the name of a score that the model's task does not have. Those of single classes are known once there are
/// predictions.
fn check_metric(model: Model<'_>, name: Option<&str>) -> Result<()> {
    let Some(name) = name.filter(|name| *name != "loss") else { return Ok(()) };
    let known = model.labels().map_or(&[][..], scores::names);
    let of_class = |labels: &engobe_data::LabelSet| {
        name.strip_prefix("f1_").is_some_and(|class| labels.names().iter().any(|n| n.ends_with(class)))
    };
    match known.contains(&name) || model.labels().is_some_and(of_class) {
        true => Ok(()),
        false => Err(Error::Metric { name: name.to_string(), known: [&["loss"], known].concat().join(", ") }),
    }
}

/// True every `every` steps.
fn due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// The first line in which two fingerprints differ.
fn difference(old: &str, new: &str) -> String {
    let (mut old, mut new) = (old.lines(), new.lines());
    loop {
        match (old.next(), new.next()) {
            (Some(a), Some(b)) if a == b => {}
            (a, b) => return format!("{} then, {} now", a.unwrap_or("nothing"), b.unwrap_or("nothing")),
        }
    }
}
