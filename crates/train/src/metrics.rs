//! `metrics.jsonl`: one line a step.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// from 1
    pub step: usize,
    /// mean loss over the window's labelled tokens
    pub loss: f64,
    /// learning rate of this step
    pub lr: f64,
    /// global gradient norm before clipping
    pub grad_norm: f64,
    /// tokens of the window
    pub tokens: usize,
    /// labelled tokens of the window
    pub label_tokens: usize,
    /// duration of the step
    pub seconds: f64,
    /// passes over the data, with a fraction
    pub epoch: f64,
    /// loss on the validation rows, if they were evaluated after this step
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// the task's scores on them
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub eval_scores: BTreeMap<String, f64>,
}

/// The file, open for appending.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens `metrics.jsonl` in `out`, keeping the lines of the first `steps` steps.
    pub fn open(out: &Path, steps: usize) -> Result<Self> {
        let path = out.join("metrics.jsonl");
        let kept: Vec<StepMetrics> = read(&path)?.into_iter().filter(|m| m.step <= steps).collect();
        let mut text = String::new();
        for line in &kept {
            text.push_str(&to_json(&path, line)?);
        }
        engobe_formats::atomic::write_atomic(&path, text.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(Error::io(&path))?;
        Ok(Self { path, file })
    }

    /// Adds a line.
    pub fn push(&mut self, line: &StepMetrics) -> Result<()> {
        let json = to_json(&self.path, line)?;
        self.file.write_all(json.as_bytes()).map_err(Error::io(&self.path))
    }
}

fn to_json(path: &Path, line: &StepMetrics) -> Result<String> {
    let bad = |e: serde_json::Error| Error::BadFile { path: path.to_path_buf(), what: e.to_string() };
    Ok(serde_json::to_string(line).map_err(bad)? + "\n")
}

/// The lines of a metrics file; none if there is no file. A last line that a kill cut short is left out.
pub fn read(path: &Path) -> Result<Vec<StepMetrics>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    Ok(text.lines().map_while(|line| serde_json::from_str(line).ok()).collect())
}
