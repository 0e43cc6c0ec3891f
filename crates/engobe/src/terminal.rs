//! What people see while engobe works: remarks and progress, both on stderr.

use crate::args::Common;
use crate::memory;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

static STARTED: OnceLock<Instant> = OnceLock::new();

/// Remembers when the process began.
pub fn start_clock() {
    STARTED.get_or_init(Instant::now);
}

/// Time since the process began.
pub fn since_start() -> Duration {
    STARTED.get_or_init(Instant::now).elapsed()
}

/// Prints the last line of stdout: one JSON object.
pub fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}

/// Prints to stdout; the error tells if nobody reads any more.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Prints a line to stderr. A reader that has gone, or a terminal that was closed, is no reason to end a run.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Remarks.
#[derive(Clone, Debug)]
pub struct Note {
    quiet: bool,
}

impl Note {
    /// Remarks unless `--quiet`.
    pub fn new(common: &Common) -> Self {
        Self { quiet: common.quiet }
    }

    /// One remark.
    pub fn line(&mut self, text: &str) {
        if !self.quiet {
            say(text);
        }
    }
}

/// Between plain lines, where there is no terminal.
const EVERY: Duration = Duration::from_secs(5);

/// Progress of one piece of work: a bar on a terminal, plain lines elsewhere, and nothing before it has taken
/// a second.
pub struct Progress {
    what: &'static str,
    total: u64,
    started: Instant,
    said: Instant,
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl Progress {
    /// Work of `total` parts, called `what` ("steps", "rows").
    pub fn new(what: &'static str, total: usize, done: usize, note: &Note) -> Self {
        let bar = (!note.quiet && std::io::stderr().is_terminal()).then(|| {
            let bar =
                ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr_with_hz(8));
            let template = "{bar:24} {pos}/{len} {prefix} · {msg} · {elapsed} gone, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
            }
            bar.set_prefix(what);
            bar.set_position(done as u64);
            bar.reset_eta();
            bar
        });
        let now = Instant::now();
        // the first plain line comes after a second
        let said = now.checked_sub(EVERY - Duration::from_secs(1)).unwrap_or(now);
        Self { what, total: total as u64, started: now, said, bar, quiet: note.quiet }
    }

    /// `done` parts are done; `detail` says how it goes.
    pub fn update(&mut self, done: usize, detail: impl FnOnce() -> String) {
        let memory =
            || memory::resident_bytes().map_or(String::new(), |b| format!(" · {}", memory::bytes_text(b)));
        match &self.bar {
            Some(bar) => {
                bar.set_position(done as u64);
                bar.set_message(detail() + &memory());
            }
            None if !self.quiet && self.said.elapsed() >= EVERY => {
                self.said = Instant::now();
                let share = done as f64 / self.total.max(1) as f64;
                let left = self.started.elapsed().as_secs_f64() * (1.0 - share) / share.max(1e-9);
                // the first parts say little about the rest
                let left =
                    if share < 0.05 { String::new() } else { format!(" · {} left", seconds_text(left)) };
                let text = [detail(), memory()].concat();
                say(&format!("{done}/{} {} · {text}{left}", self.total, self.what));
            }
            None => {}
        }
    }

    /// As [`Self::update`], for work whose size is known only on the way.
    pub fn of(&mut self, done: usize, total: usize, detail: impl FnOnce() -> String) {
        self.total = total as u64;
        if let Some(bar) = &self.bar {
            bar.set_length(self.total);
        }
        self.update(done, detail);
    }

    /// A remark that must not tear the bar.
    pub fn remark(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None if !self.quiet => say(text),
            None => {}
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// `3 min 20 s` and the like.
pub fn seconds_text(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// The curve in one line of block characters: means of `width` equal stretches.
pub fn sparkline(values: &[f64], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let width = width.min(values.len());
    let means: Vec<f64> = (0..width)
        .map(|i| {
            let part = &values[i * values.len() / width..(i + 1) * values.len() / width];
            part.iter().sum::<f64>() / part.len() as f64
        })
        .collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let block = |v: &f64| {
        let share = if high > low { (v - low) / (high - low) } else { 0.0 };
        BLOCKS[(share * 7.0).round() as usize]
    };
    means.iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        for (seconds, text) in [(0.4, "0 s"), (59.4, "59 s"), (200.0, "3 min 20 s"), (7300.0, "2 h 1 min")] {
            assert_eq!(seconds_text(seconds), text);
        }
    }

    #[test]
    fn a_falling_curve_falls() {
        assert_eq!(sparkline(&[3.0, 2.0, 1.0, 0.0], 4), "█▆▃▁");
        assert_eq!(sparkline(&[4.0, 2.0, 1.0, 1.0], 2), "█▁");
        assert_eq!(sparkline(&[1.0, 1.0], 8), "▁▁");
        assert_eq!(sparkline(&[], 8), "");
    }
}
