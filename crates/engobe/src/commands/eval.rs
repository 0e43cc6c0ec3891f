//! `engobe eval`

use crate::args::EvalArgs;
use crate::dataset::{self, Dataset, RowSettings};
use crate::terminal::{Note, Progress};
use crate::text_scores::{self, Completed};
use crate::workbench::{self, Bench};
use crate::{scoring, tasks};
use anyhow::{Result, bail};
use engobe_data::{Encoder, Prompt, Task};
use engobe_train::evaluate;

/// Scores a model on rows.
pub fn run(args: &EvalArgs) -> Result<()> {
    let mut note = Note::new(&args.common);
    workbench::set_threads(args.model.threads)?;
    let path = workbench::resolve(&args.model.model, &args.common, &mut note)?;
    let adapter = workbench::one_adapter(&args.model)?;
    let hints = tasks::Hints {
        asked: args.task.as_deref(),
        model: &path,
        adapter: adapter.as_deref(),
        data: &args.rows.data,
    };
    match tasks::choose(&hints, &mut note)? {
        Task::CausalLm => next_tokens(args, &mut note),
        Task::Seq2SeqLm => tasks::seq2seq::eval(args, &path, &mut note),
        task => {
            let options = workbench::options_of(&args.model)?;
            tasks::eval::run(args, task, &path, adapter.as_deref(), &options, &mut note)
        }
    }
}

/// Scores a decoder.
fn next_tokens(args: &EvalArgs, note: &mut Note) -> Result<()> {
    let wanted = text_scores::wanted(args, "next tokens")?;
    let mut bench = Bench::open(&args.model, &args.common, note)?;
    workbench::set_chat_template(bench.tokenizer.as_mut(), args.rows.chat_template.as_deref())?;
    let settings = RowSettings {
        train_on: &args.rows.train_on,
        template: &args.rows.template,
        max_seq_len: args.max_seq_len,
    };
    let encoder = settings.encoder(bench.tokenizer.as_ref(), bench.model.info().vocab_size)?;
    let rows = dataset::load(&args.rows.data, &encoder, note)?;
    let batches = scoring::eval_batches(&rows.samples);
    let mut progress = Progress::new("batches", batches.len(), 0, note);
    let found = evaluate(bench.model.as_ref(), &batches, None, &mut |done| {
        progress.update(done, || "measuring the loss".to_string())
    })?;
    drop(progress);
    let completed = match wanted.is_empty() && args.predictions.is_none() {
        true => Completed::default(),
        false => completions(args, &bench, &rows, &encoder, &wanted, note)?,
    };
    let scores = completed.scores(&wanted);
    text_scores::show(args.common.json, &found, rows.samples.len(), &scores, completed.scored())
}

fn prompts_of(rows: &Dataset, encoder: &Encoder<'_>) -> Result<Vec<Prompt>> {
    let mut prompts = Vec::new();
    for row in rows.files.iter().flat_map(|f| &f.rows) {
        prompts.extend(encoder.prompt(row)?);
    }
    Ok(prompts)
}

/// Generates the rows' completions, and writes them if they were asked for.
fn completions(
    args: &EvalArgs,
    bench: &Bench,
    rows: &Dataset,
    encoder: &Encoder<'_>,
    wanted: &[&'static str],
    note: &Note,
) -> Result<Completed> {
    let prompts = prompts_of(rows, encoder)?;
    if prompts.is_empty() {
        let flag = if args.exact_match { "--exact-match" } else { "completions' scores and --predictions" };
        let needs = if args.exact_match { "needs" } else { "need" };
        bail!("{flag} {needs} rows with a prompt and a completion; these have none");
    }
    let mut progress = Progress::new("rows", prompts.len(), 0, note);
    let mut tell = |done| progress.update(done, || "completing".to_string());
    let texts = match wanted {
        // what runs on beyond the completion is wrong already
        ["exact_match"] if args.predictions.is_none() => {
            scoring::exact_matches(bench, &prompts, args.max_new_tokens, &mut tell)?.0
        }
        _ => scoring::complete(bench, &prompts, args.max_new_tokens, &mut tell)?,
    };
    drop(progress);
    let completed = Completed(prompts.into_iter().map(|p| Some(p.completion)).zip(texts).collect());
    if let Some(file) = &args.predictions {
        completed.write(file)?;
    }
    Ok(completed)
}
