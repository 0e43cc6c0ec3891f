//! Settings that stay below a limit.

use super::{Estimate, Run, estimate};
use crate::plan::{OptimizerKind, Plan};
use engobe_models::TensorUse;

/// Estimates may be a few per cent too low.
const SAFETY: f64 = 1.03;

/// True if a run of this estimate is taken to stay below `limit` bytes.
pub fn fits(estimate: &Estimate, limit: u64) -> bool {
    estimate.peak as f64 * SAFETY <= limit as f64
}

/// The plan that stays below `limit` with the least done to it: smaller micro-batches first, then checkpointing.
/// Micro-batches in a window become more as they become smaller, so that the optimizer sees the same rows together.
/// `None` if nothing helps.
pub fn choose(run: &Run<'_>, limit: u64) -> Option<(Plan, Estimate)> {
    let checkpointing = [run.plan.compute.activation_checkpointing, true];
    let batch = run.plan.schedule.batch_size;
    let sizes = (1..=batch).rev().filter(|b| batch.is_multiple_of(*b));
    let candidates = checkpointing.iter().flat_map(|on| sizes.clone().map(move |b| (*on, b)));
    for (on, b) in candidates {
        let mut plan = run.plan.clone();
        plan.compute.activation_checkpointing = on;
        plan.schedule.batch_size = b;
        plan.schedule.gradient_accumulation *= batch / b;
        let found = estimate(&Run { plan: &plan, ..run.clone() });
        if fits(&found, limit) {
            return Some((plan, found));
        }
    }
    None
}

/// Other ways to keep the base weights.
pub struct Storage {
    /// settings that ask for it
    pub settings: Vec<(String, String)>,
    /// the tensors then
    pub tensors: Vec<TensorUse>,
}

/// Settings that would stay below a limit, and what the run would take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suggestion {
    /// names and values of the settings to change
    pub settings: Vec<(String, String)>,
    /// what the run would take
    pub estimate: Estimate,
}

/// What a setting costs in time or quality; few and cheap changes are suggested first.
struct Change {
    cost: u32,
    settings: Vec<(String, String)>,
}

/// Sets of changes that stay below `limit` and none of which is needless, the cheapest first, at most `most`.
pub fn suggestions(run: &Run<'_>, others: &[Storage], limit: u64, most: usize) -> Vec<Suggestion> {
    let mut found: Vec<(u32, Suggestion)> = Vec::new();
    for (storage_cost, storage) in [(0, None)].into_iter().chain(others.iter().map(|s| (3, Some(s)))) {
        for (plan, changes) in plans(run.plan) {
            let tensors = storage.map_or(run.tensors, |s| &s.tensors);
            let found_estimate = estimate(&Run { plan: &plan, tensors, ..run.clone() });
            if !fits(&found_estimate, limit) {
                continue;
            }
            let mut settings = storage.map(|s| s.settings.clone()).unwrap_or_default();
            settings.extend(changes.settings);
            found.push((storage_cost + changes.cost, Suggestion { settings, estimate: found_estimate }));
        }
    }
    found.sort_by_key(|(cost, s)| (*cost, s.settings.len()));
    let mut kept: Vec<Suggestion> = Vec::new();
    for (_, candidate) in found {
        // another one that changes some of the same settings, and no other ones, is enough
        let names = |s: &Suggestion| s.settings.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
        let mine = names(&candidate);
        let needless = kept.iter().any(|k| names(k).iter().all(|n| mine.contains(n)));
        if !needless && kept.len() < most {
            kept.push(candidate);
        }
    }
    kept
}

/// The plan and its variations.
fn plans(asked: &Plan) -> Vec<(Plan, Change)> {
    let mut plans = Vec::new();
    let (batch, len) = (asked.schedule.batch_size, asked.schedule.max_seq_len);
    let lens = std::iter::successors(Some(len), |l| Some(l / 2)).take_while(|l| *l >= 64 || *l == len);
    let kinds = match asked.optimization.optimizer.unpaged() {
        OptimizerKind::Sgd => vec![],
        _ => vec![OptimizerKind::AdamW8bit, OptimizerKind::PagedAdamW8bit],
    };
    let kinds = [asked.optimization.optimizer].into_iter().chain(kinds);
    for (halvings, len) in lens.enumerate() {
        for (k, kind) in kinds.clone().enumerate() {
            for b in (1..=batch).rev().filter(|b| batch.is_multiple_of(*b)) {
                for on in [asked.compute.activation_checkpointing, true] {
                    let mut plan = asked.clone();
                    let mut change = Change { cost: 0, settings: Vec::new() };
                    let mut set = |name: &str, value: String, cost: u32| {
                        change.settings.push((name.to_string(), value));
                        change.cost += cost;
                    };
                    if b != batch {
                        plan.schedule.batch_size = b;
                        plan.schedule.gradient_accumulation *= batch / b;
                        set("batch_size", b.to_string(), 1);
                        set("gradient_accumulation", plan.schedule.gradient_accumulation.to_string(), 0);
                    }
                    if on != asked.compute.activation_checkpointing {
                        plan.compute.activation_checkpointing = on;
                        set("activation_checkpointing", "true".to_string(), 2);
                    }
                    if k > 0 {
                        plan.optimization.optimizer = kind;
                        plan.optimization.state_file =
                            plan.optimization.state_file.filter(|_| kind.is_paged());
                        set("optimizer", kind.name().to_string(), k as u32 + 1);
                    }
                    if halvings > 0 {
                        plan.schedule.max_seq_len = len;
                        set("max_seq_len", len.to_string(), 3 * halvings as u32);
                    }
                    plans.push((plan, change));
                }
            }
        }
    }
    plans
}
