//! `engobe lint`

use crate::args::LintArgs;
use crate::dataset::{self, Dataset, RowSettings};
use crate::tasks::{self, Hints};
use crate::terminal::{Note, print, print_json};
use crate::workbench;
use anyhow::{Result, bail};
use engobe_data::{LintReport, Task, TextTokenizer, show};
use engobe_models::vocab_size;
use serde_json::json;
use std::io::IsTerminal;
use std::path::Path;

/// Checks rows as training would.
pub fn run(args: &LintArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    let path = workbench::resolve(&args.model, &args.common, &mut note)?;
    let mut tokenizer = workbench::tokenizer(&path)?;
    workbench::set_chat_template(tokenizer.as_mut(), args.rows.chat_template.as_deref())?;
    let allow = dataset::allowed(&args.allow)?;
    let hints = Hints { asked: args.task.as_deref(), model: &path, adapter: None, data: &args.rows.data };
    let (train, report) = match tasks::choose(&hints, &mut note)? {
        Task::CausalLm => next_tokens(args, &path, tokenizer.as_ref(), &mut note)?,
        task => {
            let (data, val) = (&args.rows.data, &args.val_data);
            tasks::checked(task, &path, tokenizer.as_ref(), (data, val), args.max_seq_len, &mut note)?
        }
    };
    if args.show > 0 {
        print(&shown(&train, tokenizer.as_ref(), args.show))?;
    }
    let labels: usize = train.samples.iter().map(|s| s.label_tokens()).sum();
    let tokens: usize = train.samples.iter().map(|s| s.ids.len()).sum();
    let errors: Vec<&str> = report.errors(&allow).map(|f| f.kind.name()).collect();
    if args.common.json {
        print_json(&json!({
            "rows": train.samples.len(),
            "tokens": tokens,
            "label_tokens": labels,
            "errors": errors,
            "findings": findings(&report),
        }))?;
    } else {
        let mut text = format!("{} rows, {tokens} tokens, {labels} of them labels\n", train.samples.len());
        for finding in &report.findings {
            let level = if errors.contains(&finding.kind.name()) { "error" } else { "warning" };
            text += &format!("{level}: {}: {}\n", finding.kind.name(), finding.message);
        }
        if report.findings.is_empty() {
            text += "nothing to complain about\n";
        }
        print(&text)?;
    }
    if !errors.is_empty() {
        bail!("the rows have errors: {}; --allow NAME accepts one", errors.join(", "));
    }
    Ok(())
}

/// Rows of next tokens, and what is to be said of them.
fn next_tokens(
    args: &LintArgs,
    path: &Path,
    tokenizer: Option<&TextTokenizer>,
    note: &mut Note,
) -> Result<(Dataset, LintReport)> {
    let settings = RowSettings {
        train_on: &args.rows.train_on,
        template: &args.rows.template,
        max_seq_len: args.max_seq_len,
    };
    let encoder = settings.encoder(tokenizer, vocab_size(path)?)?;
    let train = dataset::load(&args.rows.data, &encoder, note)?;
    let val = match args.val_data.as_slice() {
        [] => Dataset::default(),
        paths => dataset::load(paths, &encoder, note)?,
    };
    let report = dataset::check(&train, &val.samples, &encoder, tokenizer, args.max_seq_len);
    Ok((train, report))
}

fn findings(report: &LintReport) -> serde_json::Value {
    let one = |f: &engobe_data::Finding| json!({ "kind": f.kind.name(), "count": f.count, "rows": f.rows, "message": f.message });
    report.findings.iter().map(one).collect()
}

/// The first rows' tokens: labels green on a terminal, between ⟦ and ⟧ elsewhere.
fn shown(rows: &Dataset, tokenizer: Option<&TextTokenizer>, n: usize) -> String {
    let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (on, off, dim) = if colours { ("\x1b[32m", "\x1b[0m", "\x1b[2m") } else { ("⟦", "⟧", "") };
    let end = if colours { "\x1b[0m" } else { "" };
    let mut text = String::new();
    for sample in rows.samples.iter().take(n) {
        let labels = sample.label_tokens();
        text += &format!("{}: {} tokens, {labels} labels\n", sample.place, sample.ids.len());
        for run in show(sample, tokenizer).chunk_by(|a, b| a.1 == b.1) {
            // a bar between tokens shows where they part
            let tokens: Vec<&str> = run.iter().map(|(t, _)| t.as_str()).collect();
            let joined = tokens.join("|");
            text += &if run[0].1 { format!("{on}{joined}{off}") } else { format!("{dim}{joined}{end}") };
        }
        text += "\n\n";
    }
    text
}
