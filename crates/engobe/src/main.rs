//! engobe: parameter-efficient fine-tuning of language models from one binary.
//!
//! This crate is the command line: what was typed ([`args`]), what it means ([`settings`]), and how it is told
//! ([`terminal`], [`report`]). The work is in the library crates.

mod allocator;
mod any_model;
mod args;
mod beside;
mod commands;
mod companions;
mod dataset;
mod demo_rows;
mod fetch;
mod forecast;
mod hub;
mod keys;
mod memory;
mod quantization;
mod report;
mod scoring;
mod settings;
mod tasks;
mod terminal;
mod text_scores;
mod training;
mod verification;
mod workbench;

use args::{Cli, Task};
use std::process::ExitCode;
use terminal::say;

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

fn main() -> ExitCode {
    terminal::start_clock();
    allocator::keep_freed_pages();
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        say(&format!("engobe: a mistake of ours at {place}: please report it with the command that you ran"));
    }));
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(line) => {
            say(&format!("engobe: {line} (engobe --help lists what there is)"));
            return ExitCode::from(2);
        }
    };
    let done = match cli.command {
        Task::Demo(args) => commands::demo::run(&args),
        Task::Fetch(args) => commands::fetch::run(&args),
        Task::Plan(args) => commands::plan::run(&args),
        Task::Train(args) => commands::train::run(&args),
        Task::Compare(args) => commands::compare::run(&args),
        Task::Methods(args) => commands::methods::run(&args),
        Task::Eval(args) => commands::eval::run(&args),
        Task::Embed(args) => commands::embed::run(&args),
        Task::Generate(args) => commands::generate::run(&args),
        Task::Merge(args) => commands::merge::run(&args),
        Task::Quantize(args) => commands::quantize::run(&args),
        Task::Convert(args) => commands::convert::run(&args),
        Task::Inspect(args) => commands::inspect::run(&args),
        Task::Lint(args) => commands::lint::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("engobe: {}", one_line(&error)));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

/// The error and its causes in one line. Some errors have their cause in their own words already.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !line.ends_with(&cause) {
            line += if line.is_empty() { "" } else { ": " };
            line += &cause;
        }
    }
    line.replace('\n', " ")
}

/// A mistake in how engobe was called: exit status 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The reader of our output has gone: nobody is left to tell.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let of = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(of))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_cause_is_told_once() {
        let io = || std::io::Error::other("disk full");
        let twice = engobe_formats::Error::Io { path: "a".into(), source: io() };
        assert_eq!(one_line(&anyhow::Error::from(twice)), "a: disk full");
        let context = Err::<(), _>(io()).context("writing\na");
        assert_eq!(one_line(&context.unwrap_err()), "writing a: disk full");
    }
}
