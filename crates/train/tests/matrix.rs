//! Every method on every family that the registry knows: it is trained for a few steps, saved and loaded again. What came
//! out is the table in docs/models.md, which is compared with it.

#[path = "support/base.rs"]
mod base;

use base::{Base, Kind};
use candle_core::Device;
use engobe_adapters::method::METHODS;
use engobe_adapters::{Adapter, Method, Start};
use engobe_data::{Goal, Loader, LoaderOptions, MicroBatch, Place, Sample};
use engobe_formats::peft::PeftConfig;
use engobe_models::{ENCODERS, SEQ2SEQS, decoder_types};
use engobe_testkit::{assert_relative, cases, golden, json};
use engobe_train::plan::Plan;
use engobe_train::{Silent, Trainer, evaluate};
use serde_json::{Value, json};
use std::fmt::Write;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const STEPS: usize = 8;
/// Tokens that every tiny model knows.
const VOCABULARY: usize = 40;

/// Modules that must be trained beside the method's parameters.
fn saved(base: &Base) -> Vec<String> {
    match base {
        Base::Decoder(_) | Base::Answerer(_) => Vec::new(),
        Base::Headed(model, _) => model.head().saved.clone(),
    }
}

fn samples(base: &Base) -> Vec<Sample> {
    let sample = |i: usize| {
        let ids: Vec<u32> = (0..5 + i).map(|j| (3 + (i * 11 + j * 7) % (VOCABULARY - 3)) as u32).collect();
        let place = Place { file: "rows".into(), number: i + 1, unit: "row" };
        let goal = match base {
            Base::Decoder(_) => Goal::NextTokens,
            Base::Headed(..) => Goal::Class(i as u32 % 2),
            Base::Answerer(_) => Goal::Sequence(ids.iter().rev().skip(i).copied().collect()),
        };
        let labels = ids.iter().map(|id| (goal == Goal::NextTokens).then_some(*id)).collect();
        Sample { ids, labels, place, truncated: 0, goal, second_type_from: None }
    };
    (0..4).map(sample).collect()
}

/// The directories of a family's tiny models: of a decoder or an encoder one, of encoder-decoders all, as what they share
/// is a name (heads of their own or not, gated or not, decoders deeper than encoders).
fn tiny(model_type: &str, kind: Kind) -> Vec<PathBuf> {
    let groups = ["decoders", "encoders", "llama", "t5"];
    let all =
        groups.iter().flat_map(|group| cases(group).into_iter().map(move |name| golden(group).join(name)));
    let of_family = all.filter(|dir| dir.join("config.json").exists()).filter(|dir| {
        let config: Value = json(&dir.join("config.json"));
        config["model_type"] == model_type
    });
    let found: Vec<PathBuf> =
        of_family.take(if kind == Kind::EncoderDecoder { usize::MAX } else { 1 }).collect();
    assert!(!found.is_empty(), "golden/ has no tiny model of {model_type}");
    found
}

/// The method's usual settings, small.
fn config(method: &dyn Method, saved: Vec<String>) -> PeftConfig {
    let mut config = PeftConfig::new(method.peft_type());
    let has = |name: &str| method.settings().iter().any(|s| s.name == name);
    for (name, value) in method.defaults() {
        config.set(name, value);
    }
    let small =
        [("num_virtual_tokens", json!(3)), ("r", json!(4)), ("init_r", json!(4)), ("target_r", json!(2))];
    for (name, value) in small.into_iter().chain([("token_indices", json!([3, 10, 14]))]) {
        if has(name) {
            config.set(name, value);
        }
    }
    if !saved.is_empty() {
        config.set("task_type", "SEQ_CLS");
        config.set("modules_to_save", saved);
    }
    config
}

fn loss(base: &Base, batches: &[MicroBatch]) -> f64 {
    evaluate(base.model(), batches, None, &mut |_| ()).unwrap().loss
}

/// Trains, saves and loads.
///
/// # Errors
/// Why the method does not go with the family.
fn cell(method: &'static dyn Method, dir: &Path, kind: Kind) -> Result<(), String> {
    let what = format!("{} over {}", method.name(), dir.display());
    let mut base = Base::load(dir, kind);
    let saved = saved(&base);
    if !saved.is_empty() && !method.settings().iter().any(|s| s.name == "modules_to_save") {
        return Err("PEFT's has no `modules_to_save`, so there is no head beside it".to_string());
    }
    let samples = samples(&base);
    let batches = [MicroBatch::of(&samples, &[0, 1, 2, 3])];
    let config = config(method, saved);
    let adapter =
        Adapter::attach(base.tree(), config, Start { seed: 7 }, &Device::Cpu).map_err(|e| e.to_string())?;
    let before = loss(&base, &batches);
    let mut plan = Plan::default();
    plan.schedule.max_steps = Some(STEPS);
    plan.schedule.batch_size = 4;
    plan.optimization.learning_rate = method.card().learning_rate.unwrap_or(2e-3);
    let order =
        LoaderOptions { batch_size: 4, max_seq_len: 64, packing: false, shuffle: false, seed: 0, lead: 0 };
    let out = tempfile::tempdir().unwrap();
    let loader = Loader::new(Arc::new(samples), order);
    Trainer::new(base.model(), &adapter, &plan, loader, vec![], out.path(), String::new())
        .and_then(|mut trainer| trainer.run(&mut Silent))
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    let after = loss(&base, &batches);
    assert!(after < before, "{what}: the loss went from {before} to {after}");
    let mut again = Base::load(dir, kind);
    Adapter::load(again.tree(), out.path(), &Device::Cpu).unwrap_or_else(|e| panic!("{what}: {e}"));
    // AdaLoRA's file leaves out directions of nothing, and a prompt's its encoder: sums in another order
    assert_relative(loss(&again, &batches), after, 1e-6, &format!("{what}: after loading"));
    Ok(())
}

/// The table, and the reasons for what is not in it.
fn table() -> String {
    let families = decoder_types()
        .map(|name| (name, Kind::Decoder))
        .chain(ENCODERS.iter().map(|a| (a.model_type, Kind::Encoder)))
        .chain(SEQ2SEQS.iter().map(|a| (a.model_type, Kind::EncoderDecoder)));
    let names: Vec<String> = METHODS.iter().map(|m| format!("`{}`", m.name())).collect();
    let mut text = format!("| | {} |\n|---|{}\n", names.join(" | "), ":-:|".repeat(names.len()));
    let mut reasons: Vec<(String, String)> = Vec::new();
    let mut failed: Vec<String> = Vec::new();
    for (family, kind) in families {
        let dirs = tiny(family, kind);
        let mut row = format!("| `{family}` |");
        for method in METHODS {
            let found = std::panic::catch_unwind(AssertUnwindSafe(|| {
                dirs.iter().try_for_each(|dir| cell(method, dir, kind))
            }));
            let Ok(found) = found else {
                failed.push(format!("{} over {family}", method.name()));
                continue;
            };
            let _ = write!(row, " {} |", if found.is_ok() { "yes" } else { "–" });
            if let Err(reason) = found {
                reasons.push((format!("`{}` over `{family}`", method.name()), reason));
            }
        }
        text += &format!("{row}\n");
    }
    assert!(failed.is_empty(), "{failed:?}: see above");
    // one line a reason
    let mut lines: Vec<(Vec<String>, String)> = Vec::new();
    for (cell, reason) in reasons {
        match lines.iter_mut().find(|(_, known)| *known == reason) {
            Some((cells, _)) => cells.push(cell),
            None => lines.push((vec![cell], reason)),
        }
    }
    text += "\n";
    for (cells, reason) in lines {
        text += &format!("- {}: {reason}\n", cells.join(", "));
    }
    text
}

#[test]
fn the_table_of_methods_and_families_is_that_of_the_docs() {
    let found = table();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/models.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    let (start, end) = ("<!-- matrix -->\n", "<!-- end of matrix -->");
    let written = docs.split(start).nth(1).and_then(|rest| rest.split(end).next()).unwrap_or_default();
    assert!(written == found, "docs/models.md should have between {start}and {end}:\n\n{found}");
}
