//! `engobe train`

use crate::args::TrainArgs;
use crate::terminal::{Note, print_json};
use crate::training::{self, Summary};
use anyhow::Result;
use serde_json::json;

/// Trains an adapter.
pub fn run(args: &TrainArgs) -> Result<()> {
    let given = args.settings.given()?;
    let summary = training::run(&given, args.resume, &args.common)?;
    training::tell(&summary, &mut Note::new(&args.common));
    if args.common.json {
        print_json(&to_json(&summary))?;
    }
    Ok(())
}

fn to_json(summary: &Summary) -> serde_json::Value {
    let o = &summary.outcome;
    json!({
        "steps": o.steps,
        "total_steps": o.total_steps,
        "final_loss": o.final_loss,
        "best_eval_loss": o.best_eval_loss,
        "eval_scores": summary.history.iter().rev().find(|m| !m.eval_scores.is_empty()).map(|m| &m.eval_scores),
        "tokens": o.tokens,
        "label_tokens": o.label_tokens,
        "tokens_per_second": summary.tokens_per_second(),
        "label_tokens_per_second": summary.label_tokens_per_second(),
        "peak_rss_bytes": summary.peak_rss_bytes,
        "startup_seconds": summary.startup_seconds,
        "trainable_parameters": summary.trainable_parameters,
        "interrupted": o.interrupted,
        "stopped_early": o.stopped_early,
        "adapter": summary.out,
    })
}
