//! LoRA adapters, whatever format they come from or go to.
//!
//! [`Lora`] holds what all formats mean: for each adapted linear layer A `[r, in]`, B `[out, r]` and the factor
//! alpha/r on B·A. One file a format reads and writes it.

mod gguf;
mod mlx;
mod peft;

use crate::{Error, Mapped, Result};
use engobe_formats::mlx::is_mlx_dir;
use engobe_formats::shorten;
use engobe_formats::tensor::TensorView;
use engobe_kernels::codec;
use engobe_kernels::storage::StorageType;
use engobe_models::Outline;
use std::path::{Path, PathBuf};

/// What an adapter lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterFormat {
    /// PEFT's directory
    Peft,
    /// mlx-lm's directory
    Mlx,
    /// llama.cpp's file
    Gguf,
}

impl AdapterFormat {
    /// Looks at what is there.
    pub fn of(path: &Path) -> Result<Self> {
        if path.is_file() && path.extension().is_some_and(|e| e == "gguf") {
            return Ok(Self::Gguf);
        }
        match path.is_dir() {
            true if is_mlx_dir(path) => Ok(Self::Mlx),
            true if path.join("adapter_config.json").exists() => Ok(Self::Peft),
            _ => Err(Error::NoAdapter { path: path.to_path_buf() }),
        }
    }
}

/// The factors beside one linear layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// the layer's Hugging Face module path
    pub path: String,
    /// names of A and B in the source
    pub from: [String; 2],
    /// r
    pub rank: usize,
    /// in
    pub width: usize,
    /// out
    pub out: usize,
    /// the factor on B·A, times r
    pub alpha: f64,
    /// A `[r, in]`
    pub a: Vec<f32>,
    /// B `[out, r]`
    pub b: Vec<f32>,
}

impl Pair {
    /// The factor on B·A.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}

/// A LoRA adapter.
#[derive(Clone, Debug)]
pub struct Lora {
    /// where it was read
    pub origin: PathBuf,
    /// the base model's name or path, as a note
    pub base: Option<String>,
    /// dropout in training
    pub dropout: f64,
    /// pairs by module path
    pub pairs: Vec<Pair>,
}

impl Lora {
    /// Reads an adapter in any of the formats. With the base model's `outline`, names and shapes are checked
    /// against it; a GGUF LoRA cannot be read without. `base` is where the base model lies, for copies of its
    /// weights that PEFT stores beside an adapter.
    ///
    /// # Errors
    /// Files that are broken; tensors that are no LoRA pair of a linear layer, do not fit the model, or are missing.
    pub fn read(path: &Path, outline: Option<&Outline>, base: Option<&Path>) -> Result<Self> {
        let mut this = match AdapterFormat::of(path)? {
            AdapterFormat::Peft => peft::read(path, outline, base)?,
            AdapterFormat::Mlx => mlx::read(path)?,
            AdapterFormat::Gguf => gguf::read(path, outline)?,
        };
        this.pairs.sort_by(|a, b| a.path.cmp(&b.path));
        if let Some(outline) = outline {
            this.check(outline)?;
        }
        Ok(this)
    }

    /// Writes a PEFT directory. With the base's `outline`, targets are named as people name them.
    pub fn write_peft(
        &self,
        dir: &Path,
        outline: Option<&Outline>,
        base: Option<&str>,
    ) -> Result<Vec<Mapped>> {
        peft::write(self, dir, outline, base)
    }

    /// Writes an mlx-lm directory. With the base's `outline`, targets are named as mlx-lm names them.
    pub fn write_mlx(
        &self,
        dir: &Path,
        outline: Option<&Outline>,
        base: Option<&str>,
    ) -> Result<Vec<Mapped>> {
        mlx::write(self, dir, outline, base)
    }

    /// Writes a GGUF LoRA in f32 or f16 for the base of that outline.
    pub fn write_gguf(&self, path: &Path, outline: &Outline, storage: StorageType) -> Result<Vec<Mapped>> {
        gguf::write(self, path, outline, storage)
    }

    /// Every pair must belong to a linear layer of the model and fit it.
    fn check(&self, outline: &Outline) -> Result<()> {
        let problem = |pair: &Pair| {
            let name = &pair.from[0];
            match outline.linear(&pair.path) {
                None => Some(format!("{name}: the model has no linear layer {}", pair.path)),
                Some(l) if (l.cols, l.rows) != (pair.width, pair.out) => Some(format!(
                    "{name} and its partner are for [{}, {}], {} is [{}, {}]",
                    pair.out, pair.width, pair.path, l.rows, l.cols
                )),
                Some(_) => None,
            }
        };
        let problems: Vec<String> = self.pairs.iter().filter_map(problem).collect();
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::DoesNotFit { path: self.origin.clone(), problems: shorten(problems) }),
        }
    }

    fn cannot(&self, what: &str, why: &str) -> Error {
        cannot(&self.origin, what, why)
    }

    /// The value that most pairs have; the first of equally frequent ones.
    fn most_common<T: PartialEq + Copy>(&self, of: impl Fn(&Pair) -> T) -> Option<T> {
        let values: Vec<T> = self.pairs.iter().map(of).collect();
        let mut best: Option<(usize, T)> = None;
        for value in &values {
            let count = values.iter().filter(|v| *v == value).count();
            if best.is_none_or(|(most, _)| count > most) {
                best = Some((count, *value));
            }
        }
        best.map(|(_, value)| value)
    }
}

fn cannot(path: &Path, what: &str, why: &str) -> Error {
    Error::Cannot { path: path.to_path_buf(), what: what.to_string(), why: why.to_string() }
}

/// A tensor in f32; infinities and NaN are errors.
fn floats(view: &TensorView) -> Result<Vec<f32>> {
    let storage = view.storage()?;
    let mut data = vec![0f32; view.elements()];
    codec::decode(storage, view.bytes(), &mut data);
    match data.iter().all(|v| v.is_finite()) {
        true => Ok(data),
        false => Err(Error::NotFinite {
            path: view.file.path().to_path_buf(),
            tensor: view.name.clone(),
            storage: "a finite number".to_string(),
        }),
    }
}

/// `data` `[rows, cols]` with rows and columns exchanged.
fn transposed(data: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(data.len());
    for col in 0..cols {
        out.extend((0..rows).map(|row| data[row * cols + col]));
    }
    out
}

/// B with another factor in it; exactly as it was if the factor is 1.
fn scaled(b: &[f32], factor: f64) -> Vec<f32> {
    if factor == 1.0 {
        return b.to_vec();
    }
    b.iter().map(|v| (f64::from(*v) * factor) as f32).collect()
}

fn to_bytes(data: &[f32]) -> Vec<u8> {
    data.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The two rows of a pair's report.
fn mapped(pair: &Pair, to: [String; 2], shapes: [[usize; 2]; 2], storage: StorageType) -> [Mapped; 2] {
    let row = |i: usize| Mapped {
        from: pair.from[i].clone(),
        to: to[i].clone(),
        shape: shapes[i].to_vec(),
        dtype: storage.to_string(),
    };
    [row(0), row(1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_twice_is_nothing() {
        let data: Vec<f32> = (0..6).map(|i| i as f32).collect();
        assert_eq!(transposed(&data, 2, 3), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(transposed(&transposed(&data, 2, 3), 3, 2), data);
    }
}
