//! A run in pieces is the run in one piece, bit for bit; checkpoints survive what kills leave behind.

use engobe_adapters::{Adapter, Start};
use engobe_data::{EncodeOptions, Encoder, Loader, LoaderOptions, MicroBatch, PromptStyle, TrainOn, reader};
use engobe_formats::peft::{LoraConfig, PeftConfig, TargetModules};
use engobe_models::{LoadOptions, load_causal_lm};
use engobe_testkit::golden;
use engobe_train::memory::guard::Guard;
use engobe_train::memory::resident::resident_bytes;
use engobe_train::plan::{ComputeDtype, Plan};
use engobe_train::{Error, Evaluation, Observer, Outcome, StepMetrics, Trainer, checkpoint, metrics};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Asks to stop after a step.
struct StopAfter(usize);

impl Observer for StopAfter {
    fn step(&mut self, metrics: &StepMetrics, _: usize) {
        self.0 = self.0.saturating_sub(usize::from(metrics.step > 0));
    }
    fn evaluated(&mut self, _: usize, _: &Evaluation, _: bool) {}
    fn saved(&mut self, _: &Path) {}
    fn stop_requested(&mut self) -> bool {
        self.0 == 0
    }
}

fn plan() -> Plan {
    let mut plan = Plan::default();
    plan.schedule.max_steps = Some(14);
    plan.schedule.batch_size = 2;
    plan.schedule.gradient_accumulation = 2;
    plan.schedule.max_seq_len = 48;
    plan.optimization.learning_rate = 3e-3;
    plan.optimization.warmup_steps = 3;
    plan.upkeep.save_steps = 3;
    plan.upkeep.eval_steps = 4;
    plan.upkeep.load_best = true;
    plan
}

/// Up to `steps` steps in a fresh process, as it were.
fn part(out: &Path, plan: &Plan, steps: usize, fingerprint: &str) -> Result<Outcome, Error> {
    guarded(out, plan, steps, fingerprint, None)
}

/// The same under a limit on memory.
fn guarded(
    out: &Path,
    plan: &Plan,
    steps: usize,
    fingerprint: &str,
    guard: Option<Guard>,
) -> Result<Outcome, Error> {
    let config = LoraConfig {
        // 72 rows of 64 numbers are above the 4096 from which moments take 8 bits
        r: if plan.optimization.optimizer.is_8bit() { 72 } else { 4 },
        lora_dropout: 0.2,
        target_modules: Some(TargetModules::AllLinear),
        ..Default::default()
    };
    of_method(out, plan, steps, fingerprint, guard, PeftConfig::from(&config))
}

/// The same with an adapter of any method.
fn of_method(
    out: &Path,
    plan: &Plan,
    steps: usize,
    fingerprint: &str,
    guard: Option<Guard>,
    config: PeftConfig,
) -> Result<Outcome, Error> {
    let device = candle_core::Device::Cpu;
    let mut model = load_causal_lm(&golden("llama/gqa_tied"), &LoadOptions::default()).unwrap();
    let adapter = Adapter::attach(model.as_mut(), config, Start { seed: 1 }, &device).unwrap();
    let files = reader::read(&[golden("peft/rows.jsonl")]).unwrap();
    let encode = EncodeOptions { train_on: TrainOn::All, style: PromptStyle::Auto, max_seq_len: 48 };
    let samples = Encoder::new(None, model.info().vocab_size, encode).unwrap().encode(&files).unwrap();
    let eval = vec![MicroBatch::of(&samples, &[0, 3, 5])];
    let s = &plan.schedule;
    let order =
        LoaderOptions { batch_size: 2, max_seq_len: 48, packing: s.packing, shuffle: true, seed: 9, lead: 0 };
    let loader = Loader::new(Arc::new(samples), order);
    let mut trainer =
        Trainer::new(model.as_ref(), &adapter, plan, loader, eval, out, fingerprint.to_string())?
            .guarded_by(guard);
    trainer.resume()?;
    trainer.run(&mut StopAfter(steps))
}

fn files(out: &Path) -> (Vec<u8>, Vec<(usize, u64, u64)>) {
    let lines = metrics::read(&out.join("metrics.jsonl")).unwrap();
    let numbers = lines.iter().map(|m| (m.step, m.loss.to_bits(), m.grad_norm.to_bits())).collect();
    (fs::read(out.join("adapter_model.safetensors")).unwrap(), numbers)
}

#[test]
fn pieces_make_the_whole() {
    use ComputeDtype::{BF16, F16, F32};
    for (packing, dtype, checkpointing) in
        [(true, F32, false), (false, F32, false), (true, BF16, false), (false, BF16, true), (true, F16, true)]
    {
        let mut plan = plan();
        plan.schedule.packing = packing;
        plan.compute.compute_dtype = dtype;
        plan.compute.activation_checkpointing = checkpointing;
        let (whole, pieces) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        part(whole.path(), &plan, 99, "f").unwrap();
        for steps in [1, 4, 2, 99] {
            let outcome = part(pieces.path(), &plan, steps, "f").unwrap();
            assert_eq!(outcome.interrupted, outcome.steps < 14);
        }
        assert_eq!(files(whole.path()), files(pieces.path()), "packing {packing} {dtype:?}");
    }
}

#[test]
fn threads_change_no_bit_in_16_bits_either() {
    let run = |threads: usize, dtype| {
        let mut plan = plan();
        plan.compute.compute_dtype = dtype;
        let out = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| part(out.path(), &plan, 99, "f").unwrap());
        files(out.path())
    };
    let f32 = run(1, ComputeDtype::F32);
    for dtype in [ComputeDtype::BF16, ComputeDtype::F16] {
        let one = run(1, dtype);
        assert_eq!(one, run(2, dtype), "{dtype:?}");
        assert_ne!(one, f32, "{dtype:?} changed nothing");
    }
}

/// What a start takes out of the base is taken out again; importance and what was given up are in checkpoints.
#[test]
fn pieces_make_the_whole_with_lora_s_kin() {
    let all = "all-linear";
    for (kind, settings) in [
        ("LORA", json!({ "r": 2, "target_modules": all, "use_dora": true, "init_lora_weights": "pissa" })),
        ("LORA", json!({ "r": 2, "target_modules": ["embed_tokens", "v_proj"], "lora_bias": false })),
        ("LORA", json!({ "r": 2, "target_modules": ["v_proj"], "trainable_token_indices": [4, 7] })),
        ("LORA", json!({ "r": 4, "target_modules": all, "init_lora_weights": "loftq" })),
        ("ADALORA", json!({ "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "target_modules": all })),
        ("IA3", json!({ "target_modules": ["k_proj", "down_proj"] })),
        ("VERA", json!({ "r": 6, "target_modules": all, "vera_dropout": 0.1 })),
        ("LN_TUNING", json!({})),
    ] {
        let mut config = PeftConfig::new(kind);
        for (key, value) in settings.as_object().unwrap() {
            config.set(key, value.clone());
        }
        let mut plan = plan();
        plan.optimization.loraplus_lr_ratio = (kind == "LORA").then_some(4.0);
        let (whole, pieces) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        of_method(whole.path(), &plan, 99, "f", None, config.clone()).unwrap();
        plan.compute.activation_checkpointing = true;
        for steps in [3, 5, 99] {
            of_method(pieces.path(), &plan, steps, "f", None, config.clone()).unwrap();
        }
        assert_eq!(files(whole.path()), files(pieces.path()), "{}", config.to_json());
    }
}

/// Encoders of prompts are no part of an adapter's file, but of checkpoints and of what is kept of the best evaluation.
#[test]
fn pieces_make_the_whole_through_an_encoder() {
    let mut projected = PeftConfig::new("PREFIX_TUNING");
    projected.set("prefix_projection", true);
    for config in [PeftConfig::new("P_TUNING"), projected] {
        let (whole, pieces) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let run = |out: &Path, steps| of_method(out, &plan(), steps, "f", None, config.clone()).unwrap();
        run(whole.path(), 99);
        for steps in [1, 4, 2, 99] {
            run(pieces.path(), steps);
        }
        assert_eq!(files(whole.path()), files(pieces.path()), "{}", config.peft_type());
    }
}

#[test]
fn pieces_make_the_whole_with_every_optimizer() {
    use engobe_train::plan::OptimizerKind::{AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, Sgd};
    let run = |kind, pieces: &[usize]| {
        let mut plan = plan();
        plan.optimization.optimizer = kind;
        let out = tempfile::tempdir().unwrap();
        for steps in pieces {
            part(out.path(), &plan, *steps, "f").unwrap();
        }
        assert!(!out.path().join("optimizer.state").exists(), "a paged state outlives its run");
        files(out.path())
    };
    for kind in [AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, Sgd] {
        let whole = run(kind, &[99]);
        assert_eq!(whole, run(kind, &[1, 4, 2, 99]), "{kind:?}");
        // where the moments lie makes no difference
        assert_eq!(whole, run(kind.unpaged(), &[99]), "{kind:?}");
    }
    // the file of a paged run can lie elsewhere, and an old one there does not matter
    let elsewhere = tempfile::tempdir().unwrap();
    let mut plan = plan();
    plan.optimization.optimizer = PagedAdamW8bit;
    plan.optimization.state_file = Some(elsewhere.path().join("moments"));
    std::fs::write(elsewhere.path().join("moments"), vec![7; 100_000]).unwrap();
    let out = tempfile::tempdir().unwrap();
    part(out.path(), &plan, 99, "f").unwrap();
    assert_eq!(files(out.path()), run(PagedAdamW8bit, &[99]));
}

#[test]
fn a_limit_ends_the_run_before_it_is_passed_and_loses_no_step() {
    let whole = tempfile::tempdir().unwrap();
    part(whole.path(), &plan(), 99, "f").unwrap();
    for checkpointing in [false, true] {
        let mut plan = plan();
        plan.compute.activation_checkpointing = checkpointing;
        let out = tempfile::tempdir().unwrap();
        // memory grows with each look, whatever was planned, and passes the limit in the middle of some step
        let held = Arc::new(AtomicU64::new(0));
        let grows = move || Some(held.fetch_add(1, Ordering::Relaxed));
        let guard = Guard::over(300, 0.0, Arc::new(grows));
        let error = guarded(out.path(), &plan, 99, "f", Some(guard)).unwrap_err();
        let Error::OverLimit { step, saved, cause } = &error else { panic!("{error}") };
        assert!((2..14).contains(step) && cause.limit == 300 && cause.held == 301, "{error}");
        assert!(saved.ends_with(format!("checkpoints/step-{:08}", step - 1)) && saved.exists(), "{error}");
        assert!(error.to_string().contains("--resume"), "{error}");
        part(out.path(), &plan, 99, "f").unwrap();
        assert_eq!(files(whole.path()), files(out.path()), "checkpointing {checkpointing}");
    }
}

/// A guard that finds all well for `looks` looks and too much held from then on, and the looks so far.
fn after(looks: u64) -> (Guard, Arc<AtomicU64>) {
    let count = Arc::new(AtomicU64::new(0));
    let seen = count.clone();
    let held = move || Some(if seen.fetch_add(1, Ordering::Relaxed) < looks { 0 } else { 101 });
    (Guard::over(100, 0.0, Arc::new(held)), count)
}

#[test]
fn a_limit_is_kept_in_evaluations_too_and_they_are_made_up_for() {
    let mut plain = plan();
    plain.upkeep.eval_steps = 0;
    let (guard, looks) = after(u64::MAX);
    guarded(tempfile::tempdir().unwrap().path(), &plain, 4, "f", Some(guard)).unwrap();
    let looks = looks.load(Ordering::Relaxed);
    // the evaluation at the run's end must not be lost either
    for last in [false, true] {
        let mut plan = plan();
        if last {
            plan.schedule.max_steps = Some(4);
        }
        let whole = tempfile::tempdir().unwrap();
        part(whole.path(), &plan, 99, "f").unwrap();
        let out = tempfile::tempdir().unwrap();
        let lines = out.path().join("metrics.jsonl");
        // the next look is the first one of the evaluation after step 4
        let error = guarded(out.path(), &plan, 99, "f", Some(after(looks).0)).unwrap_err();
        let Error::EvalOverLimit { step: 4, saved, .. } = &error else { panic!("{error}") };
        assert!(saved.ends_with("checkpoints/step-00000004"), "{error}");
        assert_eq!(metrics::read(&lines).unwrap().len(), 3);
        // twice: what is saved after the evaluation does not replace the checkpoint
        for steps in [1, 99] {
            part(out.path(), &plan, steps, "f").unwrap();
        }
        assert_eq!(files(whole.path()), files(out.path()));
        let losses = |out: &Path| {
            let lines = metrics::read(&out.join("metrics.jsonl")).unwrap();
            lines.iter().map(|m| m.eval_loss.map(f64::to_bits)).collect::<Vec<_>>()
        };
        assert_eq!(losses(whole.path()), losses(out.path()));
        assert!(losses(out.path())[3].is_some());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_process_that_is_over_the_limit_already_does_no_step() {
    let out = tempfile::tempdir().unwrap();
    let guard = Guard::new(resident_bytes().unwrap() / 2, 0.0);
    let error = guarded(out.path(), &plan(), 99, "f", Some(guard)).unwrap_err();
    assert!(matches!(error, Error::OverLimit { step: 1, .. }), "{error}");
    assert!(metrics::read(&out.path().join("metrics.jsonl")).unwrap().is_empty());
}

#[test]
fn the_margin_is_what_a_larger_batch_may_add() {
    let out = tempfile::tempdir().unwrap();
    // 90 are held, a token may add 1, and the first micro-batch has more than 10 tokens
    let guard = Guard::over(100, 1.0, Arc::new(|| Some(90)));
    let error = guarded(out.path(), &plan(), 99, "f", Some(guard)).unwrap_err();
    assert!(matches!(error, Error::OverLimit { step: 1, .. }), "{error}");
}

#[test]
fn what_a_kill_leaves_is_passed_over() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    part(whole.path(), &plan(), 99, "f").unwrap();
    part(killed.path(), &plan(), 7, "f").unwrap();
    let checkpoints = killed.path().join("checkpoints");
    // steps were done after the checkpoint, and a checkpoint was being written
    let newest = checkpoint::latest(killed.path()).unwrap().unwrap();
    fs::remove_dir_all(newest).unwrap();
    let partial = checkpoints.join("partial-00000009");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("adapter.safetensors"), b"half").unwrap();
    let metrics = killed.path().join("metrics.jsonl");
    let mut text = fs::read_to_string(&metrics).unwrap();
    text.push_str("{\"step\": 8, \"lo");
    fs::write(&metrics, text).unwrap();
    part(killed.path(), &plan(), 99, "f").unwrap();
    assert_eq!(files(whole.path()), files(killed.path()));
    assert!(!partial.exists());
}

#[test]
fn old_checkpoints_go_and_the_newest_stay() {
    let out = tempfile::tempdir().unwrap();
    part(out.path(), &plan(), 99, "f").unwrap();
    let mut names: Vec<_> =
        fs::read_dir(out.path().join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["step-00000012", "step-00000014"]);
}

#[test]
fn another_run_cannot_be_resumed() {
    let out = tempfile::tempdir().unwrap();
    part(out.path(), &plan(), 2, "r = 4\nseed = 1").unwrap();
    let error = part(out.path(), &plan(), 2, "r = 4\nseed = 2").unwrap_err().to_string();
    assert!(error.contains("seed = 1 then, seed = 2 now"), "{error}");
}
