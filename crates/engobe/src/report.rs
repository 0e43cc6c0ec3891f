//! A run as people look at it: `loss.svg` and `report.html`.

mod plot;

pub use plot::{Curve, compare_svg};

use crate::memory::bytes_text;
use crate::terminal::seconds_text;
use crate::training::Summary;
use anyhow::Result;
use engobe_formats::atomic::write_atomic;
use std::fmt::Write;
use std::path::Path;

/// What the model says to one prompt.
pub struct Shown {
    /// what it was given
    pub prompt: String,
    /// what the row has next
    pub expected: String,
    /// what it said before the run
    pub before: String,
    /// what it says now
    pub after: String,
}

/// What stands in a report.
pub struct RunReport<'a> {
    /// the model's name
    pub title: String,
    /// the run
    pub summary: &'a Summary,
    /// the settings as TOML
    pub settings: String,
    /// samples
    pub shown: Vec<Shown>,
}

/// Writes both files into `dir`.
pub fn write(dir: &Path, report: &RunReport<'_>) -> Result<()> {
    let svg = plot::loss_svg(&report.summary.history)?;
    write_atomic(&dir.join("loss.svg"), svg.as_bytes())?;
    Ok(write_atomic(&dir.join("report.html"), html(report, &svg)?.as_bytes())?)
}

const STYLE: &str = "\
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}svg{width:100%;height:auto}
table{border-collapse:collapse}td{padding:.15rem 1rem .15rem 0;vertical-align:top}td:first-child{color:#666}
pre{background:#f5f3ef;padding:.75rem;white-space:pre-wrap;overflow-wrap:anywhere;border-radius:4px;margin:.25rem 0}
.label{color:#666;font-size:.85rem}";

fn html(report: &RunReport<'_>, svg: &str) -> Result<String> {
    let (summary, o) = (report.summary, &report.summary.outcome);
    let mut page = String::new();
    let title = format!("engobe: {}", escape(&report.title));
    write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\n\
         <h1>{title}</h1>\n<table>\n"
    )?;
    let mut row =
        |name: &str, value: String| writeln!(page, "<tr><td>{name}</td><td>{}</td></tr>", escape(&value));
    row("steps", format!("{} of {}", o.steps, o.total_steps))?;
    row("time in steps", seconds_text(o.seconds))?;
    if let (Some(first), Some(last)) = (summary.history.first(), summary.history.last()) {
        row("training loss", format!("{:.4} at first, {:.4} at last", first.loss, last.loss))?;
    }
    if let Some(best) = o.best_eval_loss {
        row("best validation loss", format!("{best:.4}"))?;
    }
    row("trained parameters", summary.trainable_parameters.to_string())?;
    row("tokens", format!("{} seen, {} learned from", o.tokens, o.label_tokens))?;
    row("speed", format!("{:.0} tokens/s", summary.tokens_per_second()))?;
    if let Some(bytes) = summary.peak_rss_bytes {
        row("peak memory", bytes_text(bytes))?;
    }
    let body = svg.find("<svg").map_or("", |at| &svg[at..]);
    writeln!(page, "</table>\n<h2>Loss</h2>\n{body}")?;
    if !report.shown.is_empty() {
        writeln!(page, "<h2>What it says</h2>")?;
    }
    for shown in &report.shown {
        for (label, text) in [
            ("prompt", &shown.prompt),
            ("the row's answer", &shown.expected),
            ("before", &shown.before),
            ("after", &shown.after),
        ] {
            writeln!(page, "<div class=\"label\">{label}</div><pre>{}</pre>", escape(text.trim()))?;
        }
        writeln!(page, "<hr>")?;
    }
    writeln!(page, "<h2>Settings</h2>\n<pre>{}</pre>\n</body></html>", escape(&report.settings))?;
    Ok(page)
}

/// Text that a page may hold, whatever a model said.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_words_cannot_break_the_page() {
        assert_eq!(escape("</pre><script>\"&"), "&lt;/pre&gt;&lt;script&gt;&quot;&amp;");
    }
}
