//! engobe: parameter-efficient fine-tuning of language models from one binary.
//!
//! This crate is the command line: what was typed ([`args`]), what it means ([`settings`]), and how it is told
//! ([`terminal`], [`report`]). The work is in the library crates.

mod allocator;
mod args;
mod beside;
mod commands;
mod dataset;
mod demo_rows;
mod fetch;
mod hub;
mod keys;
mod memory;
mod report;
mod scoring;
mod settings;
mod terminal;
mod training;
mod verification;
mod workbench;

use args::{Cli, Task};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

fn main() -> ExitCode {
    terminal::start_clock();
    allocator::keep_freed_pages();
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        eprintln!("engobe: a mistake of ours at {place}: please report it with the command that you ran");
    }));
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(line) => {
            eprintln!("engobe: {line} (engobe --help lists what there is)");
            return ExitCode::from(2);
        }
    };
    let done = match cli.command {
        Task::Demo(args) => commands::demo::run(&args),
        Task::Fetch(args) => commands::fetch::run(&args),
        Task::Train(args) => commands::train::run(&args),
        Task::Eval(args) => commands::eval::run(&args),
        Task::Generate(args) => commands::generate::run(&args),
        Task::Merge(args) => commands::merge::run(&args),
        Task::Convert(args) => commands::convert::run(&args),
        Task::Inspect(args) => commands::inspect::run(&args),
        Task::Lint(args) => commands::lint::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let line = format!("{error:#}").replace('\n', " ");
            eprintln!("engobe: {line}");
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
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
