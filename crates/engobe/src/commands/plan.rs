//! `engobe plan`

use crate::Usage;
use crate::args::TrainArgs;
use crate::forecast::{Forecast, flags};
use crate::memory::bytes_text;
use crate::tasks;
use crate::terminal::{Note, print, print_json};
use crate::workbench::{self, thousands};
use anyhow::Result;
use engobe_data::Task;
use engobe_train::memory::advice::{Suggestion, fits};
use engobe_train::memory::{Estimate, MemoryLimit};
use engobe_train::plan::ComputeDtype;
use serde_json::{Value, json};

/// Says what a run would take.
pub fn run(args: &TrainArgs) -> Result<()> {
    let given = args.settings.given()?;
    let mut note = Note::new(&args.common);
    let mut plan = given.plan()?;
    let model = given.text("model").ok_or(Usage("--model is missing".to_string()))?;
    workbench::set_threads(given.whole("threads"))?;
    let options = given.load_options()?;
    let path = workbench::resolve(model, &args.common, &mut note)?;
    let (task, head) = tasks::of_plan(&given, &path, &mut note)?;
    if task != Task::CausalLm && !given.has("packing") {
        // as train has it for labels, and for texts out of texts
        plan.schedule.packing = false;
    }
    let forecast = Forecast::new(&given, &plan, &path, &options, head)?;
    let estimate = forecast.estimate();
    let limit = plan.compute.memory_limit;
    let suggestions = limit.map(|limit| forecast.suggestions(limit)).unwrap_or_default();
    print(&(table(&forecast, &estimate, limit, &suggestions) + "\n"))?;
    if args.common.json {
        print_json(&to_json(&forecast, &estimate, limit, &suggestions))?;
    }
    Ok(())
}

/// Kinds of weights with their bytes, the largest first.
fn storages(forecast: &Forecast) -> Vec<(String, usize)> {
    let mut kinds: Vec<(String, usize)> = Vec::new();
    for t in &forecast.outline.tensors {
        match kinds.iter_mut().find(|(storage, _)| *storage == t.storage) {
            Some((_, bytes)) => *bytes += t.owned + t.mapped,
            None => kinds.push((t.storage.clone(), t.owned + t.mapped)),
        }
    }
    kinds.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    kinds
}

fn table(forecast: &Forecast, e: &Estimate, limit: Option<MemoryLimit>, found: &[Suggestion]) -> String {
    let plan = &forecast.plan;
    let kinds: Vec<String> = storages(forecast).into_iter().map(|(storage, _)| storage).collect();
    let s = &plan.schedule;
    let recomputed = if plan.compute.activation_checkpointing { ", checkpointed" } else { "" };
    let kept = match plan.compute.compute_dtype {
        ComputeDtype::F32 => String::new(),
        half => format!(", kept in {}", half.name()),
    };
    let tokens = format!("{} x {} tokens{recomputed}{kept}", s.batch_size, s.max_seq_len);
    let optimizer = match e.optimizer_file {
        0 => plan.optimization.optimizer.name().to_string(),
        bytes => {
            format!("{}, and {} in a file", plan.optimization.optimizer.name(), bytes_text(bytes as u64))
        }
    };
    let rows = [
        ("weights", e.weights, kinds.join(", ")),
        ("adapter", e.adapter, format!("{} parameters", thousands(forecast.adapter.num_parameters()))),
        ("optimizer", e.optimizer, optimizer),
        ("gradients", e.gradients, "of the adapter".to_string()),
        ("activations", e.activations, tokens),
        ("head", e.head, head_text(forecast)),
        ("everything else", e.other, "process, tokenizer, scratch".to_string()),
    ];
    let mut text = String::new();
    for (name, bytes, detail) in rows {
        text += &format!("{name:<16}{:>10}   {detail}\n", bytes_text(bytes as u64));
    }
    text += &format!(
        "{:<16}{:>10}   gradients, activations and head are not all there at once\n",
        "peak",
        bytes_text(e.peak as u64)
    );
    let (trainable, all) = counts(forecast);
    let share = 100.0 * trainable as f64 / all.max(1) as f64;
    text += &format!(
        "trainable params: {} || all params: {} || trainable%: {share:.4}",
        thousands(trainable),
        thousands(all)
    );
    if let Some(limit) = limit {
        text += &match fits(e, limit.0) {
            true => format!("\nfits {limit} as it is"),
            false => format!("\ndoes not fit {limit} as it is"),
        };
        if !fits(e, limit.0) {
            for s in found {
                let peak = bytes_text(s.estimate.peak as u64);
                text += &format!("\n  fits with {}: {peak}", flags(&s.settings));
            }
            if found.is_empty() {
                text += "; no setting of the run makes it fit: take a smaller model";
            }
        }
    }
    text
}

fn head_text(forecast: &Forecast) -> String {
    let logits = thousands(forecast.outline.sizes.vocab);
    match forecast.outline.saved {
        None => format!("vocabulary of {logits}"),
        Some(_) => format!("{logits} logits"),
    }
}

/// Trained elements, and all elements with those that the adapter adds.
fn counts(forecast: &Forecast) -> (usize, usize) {
    (forecast.adapter.num_parameters(), forecast.base_parameters + forecast.adapter.num_added())
}

fn parts(e: &Estimate) -> Value {
    json!({
        "weights_bytes": e.weights,
        "adapter_bytes": e.adapter,
        "optimizer_bytes": e.optimizer,
        "optimizer_file_bytes": e.optimizer_file,
        "gradients_bytes": e.gradients,
        "activations_bytes": e.activations,
        "head_bytes": e.head,
        "other_bytes": e.other,
        "peak_bytes": e.peak,
    })
}

fn to_json(forecast: &Forecast, e: &Estimate, limit: Option<MemoryLimit>, found: &[Suggestion]) -> Value {
    let (trainable, all) = counts(forecast);
    let mut object = parts(e);
    object["trainable_parameters"] = json!(trainable);
    object["all_parameters"] = json!(all);
    object["has_weights"] = json!(forecast.outline.has_weights);
    object["storages"] = storages(forecast).into_iter().collect();
    if let Some(limit) = limit {
        object["memory_limit_bytes"] = json!(limit.0);
        object["fits"] = json!(fits(e, limit.0));
        let settings = |s: &Suggestion| {
            let pairs = s.settings.iter().map(|(n, v)| (n.clone(), json!(v)));
            let mut suggestion = parts(&s.estimate);
            suggestion["settings"] = Value::Object(pairs.collect());
            suggestion
        };
        object["would_fit"] = found.iter().map(settings).collect();
    }
    object
}
