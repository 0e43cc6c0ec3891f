//! Several LoRA adapters as one: PEFT's `add_weighted_adapter`.
//!
//! With weights wᵢ, scales sᵢ and factors Aᵢ, Bᵢ of each layer, the result is an adapter of scale 1:
//!
//! ```text
//! cat      A = [w₁s₁A₁; w₂s₂A₂; …],  B = [B₁, B₂, …]            the sum of all changes, exactly; rank Σ rᵢ
//! svd      B·A = the best of rank max rᵢ to Σ wᵢsᵢBᵢAᵢ            (B takes the singular values)
//! linear   A = Σ ±√|wᵢsᵢ|·Aᵢ,  B = Σ √|wᵢsᵢ|·Bᵢ                  factors on their own: not the sum of changes
//! ```
//!
//! The others put a rule in the place of the sum of `linear` (or, with `_svd`, of `svd`): TIES (Yadav et al. 2023) keeps
//! the largest `density` of each, elects a sign for each element and averages those that have it; DARE (Yu et al. 2024)
//! drops elements at random and scales the rest by 1/density; `magnitude_prune` keeps the largest and adds.

use crate::lora::rank_of;
use crate::random::generator;
use crate::target::Targets;
use crate::{Error, Result, fill, lora};
use candle_core::{Device, Tensor};
use engobe_autograd::{host, tensor_of};
use engobe_formats::peft::{BiasMode, InitLoraWeights, LoraConfig, PeftAdapter, TargetModules};
use engobe_formats::tensor::TensorView;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What stands in the place of a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    Sum,
    Ties,
}

/// What is left out before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Prune {
    Nothing,
    Smallest,
    Random,
}

/// A way to combine adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Combination {
    rule: Rule,
    prune: Prune,
    form: Form,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// factors on their own
    Factors,
    /// factors side by side
    SideBySide,
    /// the changes, decomposed
    Decomposed,
}

/// PEFT's names; `dare` is `dare_linear`.
const NAMES: [(&str, Rule, Prune); 6] = [
    ("linear", Rule::Sum, Prune::Nothing),
    ("ties", Rule::Ties, Prune::Smallest),
    ("dare_linear", Rule::Sum, Prune::Random),
    ("dare_ties", Rule::Ties, Prune::Random),
    ("magnitude_prune", Rule::Sum, Prune::Smallest),
    ("dare", Rule::Sum, Prune::Random),
];

impl Combination {
    /// All names.
    pub fn names() -> String {
        let plain: Vec<&str> = NAMES.iter().map(|(name, ..)| *name).collect();
        format!(
            "cat, svd, {}, and ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd",
            plain.join(", ")
        )
    }

    /// The one that PEFT calls `name`.
    pub fn find(name: &str) -> Option<Self> {
        match name {
            "cat" => return Some(Self { rule: Rule::Sum, prune: Prune::Nothing, form: Form::SideBySide }),
            "svd" => return Some(Self { rule: Rule::Sum, prune: Prune::Nothing, form: Form::Decomposed }),
            "linear_svd" => return None,
            _ => {}
        }
        let (plain, form) = match name.strip_suffix("_svd") {
            Some(plain) => (plain, Form::Decomposed),
            None => (name, Form::Factors),
        };
        let (_, rule, prune) = NAMES.iter().find(|(n, ..)| *n == plain)?;
        Some(Self { rule: *rule, prune: *prune, form })
    }

    /// It leaves elements out, and needs a density.
    pub fn prunes(self) -> bool {
        self.prune != Prune::Nothing
    }
}

/// How to combine.
#[derive(Clone, Copy, Debug)]
pub struct CombineOptions {
    /// the way
    pub how: Combination,
    /// share of elements that stay, for those that leave some out
    pub density: f32,
    /// rank of decomposed changes; without, the largest of all
    pub rank: Option<usize>,
    /// seed of what is left out at random
    pub seed: u64,
}

/// A LoRA adapter and its weight.
struct Part {
    weight: f32,
    config: LoraConfig,
    targets: Targets,
    tensors: BTreeMap<String, TensorView>,
    dir: PathBuf,
}

/// One adapter's part in a module.
struct Pair {
    /// `[r, in]`
    a: Tensor,
    /// `[out, r]`
    b: Tensor,
    /// weight times scale
    weight: f32,
}

/// Combines the adapters in `dirs`, each with its weight, and writes the result to `out`.
///
/// # Errors
/// An adapter that is more than LoRA pairs, ranks that differ where they must not, shapes that do not fit.
pub fn combine(dirs: &[(PathBuf, f32)], options: &CombineOptions, out: &Path) -> Result<()> {
    let parts = dirs.iter().map(|(dir, weight)| Part::load(dir, *weight)).collect::<Result<Vec<_>>>()?;
    let Some(first) = parts.first() else {
        return Err(Error::Conflict {
            keys: "adapter",
            reason: "is missing: name the adapters to combine".into(),
        });
    };
    let largest = parts.iter().map(Part::largest_rank).max().unwrap_or(1);
    let same = parts.iter().all(|p| p.largest_rank() == largest);
    let rank = match options.how.form {
        Form::SideBySide => parts.iter().map(Part::largest_rank).sum(),
        Form::Decomposed => options.rank.unwrap_or(largest),
        Form::Factors if same => largest,
        Form::Factors => {
            let ranks: Vec<String> = parts.iter().map(|p| p.largest_rank().to_string()).collect();
            let reason =
                format!("differs ({}): only cat and the svd forms combine other ranks", ranks.join(", "));
            return Err(Error::Conflict { keys: "r", reason: reason.into() });
        }
    };
    let modules: BTreeSet<(String, &str)> = parts.iter().flat_map(Part::modules).collect();
    let mut tensors = Vec::new();
    let mut names = BTreeSet::new();
    for (path, level) in &modules {
        let pairs =
            parts.iter().filter_map(|p| p.pair(path, level).transpose()).collect::<Result<Vec<_>>>()?;
        let mut rng = generator(options.seed, path);
        let (a, b) = padded(joined(path, &pairs, options, rank, &mut rng)?, rank)?;
        let [name_a, name_b] = names_of(path, level);
        for (name, t) in [(name_a, a), (name_b, b)] {
            tensors.push((name, t.dims().to_vec(), host(&t)?.to_vec()));
        }
        names.insert(path.clone());
    }
    let config = LoraConfig {
        r: rank,
        lora_alpha: rank as f64,
        use_rslora: false,
        target_modules: Some(targets_of(&parts, names)),
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: Vec::new(),
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        init_lora_weights: InitLoraWeights::Kaiming,
        ..first.config.clone()
    };
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape, data)| (name, shape, data.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    Ok(PeftAdapter::save(out, &config, &tensors)?)
}

/// The union of the adapters' names where all are lists that hold for all layers; else every module's path.
fn targets_of(parts: &[Part], paths: BTreeSet<String>) -> TargetModules {
    let mut union = BTreeSet::new();
    for part in parts {
        match &part.config {
            LoraConfig {
                target_modules: Some(TargetModules::List(names)),
                layers_to_transform: None,
                exclude_modules: None,
                ..
            } => union.extend(names.iter().cloned()),
            _ => return TargetModules::List(paths.into_iter().collect()),
        }
    }
    TargetModules::List(union.into_iter().collect())
}

const PREFIX: &str = "base_model.model.";

fn names_of(path: &str, level: &str) -> [String; 2] {
    match level {
        "lora_embedding" => ["A", "B"].map(|k| format!("{PREFIX}{path}.lora_embedding_{k}")),
        _ => ["A", "B"].map(|k| format!("{PREFIX}{path}.lora_{k}.weight")),
    }
}

impl Part {
    fn load(dir: &Path, weight: f32) -> Result<Self> {
        let file = PeftAdapter::load(dir)?;
        let config = LoraConfig::read(&file.config)?;
        let more = [
            ("use_dora", config.use_dora),
            ("lora_bias", config.lora_bias),
            ("bias", config.bias != BiasMode::None),
            ("modules_to_save", !config.modules_to_save.is_empty()),
            ("trainable_token_indices", config.trainable_token_indices.is_some()),
            ("init_lora_weights", config.init_lora_weights.changes_base()),
        ];
        if let Some((keys, _)) = more.iter().find(|(_, on)| *on) {
            let reason =
                format!("of {} is more than LoRA pairs, which is all that can be combined", dir.display());
            return Err(Error::Conflict { keys, reason: reason.into() });
        }
        let targets = Targets::new(&config)?;
        Ok(Self { weight, targets, tensors: file.tensors, config, dir: dir.to_path_buf() })
    }

    fn largest_rank(&self) -> usize {
        self.config.rank_pattern.iter().map(|(_, r)| *r).fold(self.config.r, usize::max)
    }

    /// Paths of what it adapts, and of which kind.
    fn modules(&self) -> Vec<(String, &'static str)> {
        let of = |name: &String| {
            let inner = name.strip_prefix(PREFIX)?;
            let linear = inner.strip_suffix(".lora_A.weight").map(|p| (p.to_string(), "lora"));
            linear.or_else(|| Some((inner.strip_suffix(".lora_embedding_A")?.to_string(), "lora_embedding")))
        };
        self.tensors.keys().filter_map(of).collect()
    }

    fn pair(&self, path: &str, level: &str) -> Result<Option<Pair>> {
        let [a, b] = names_of(path, level);
        let (Some(a), Some(b)) = (self.tensors.get(&a), self.tensors.get(&b)) else { return Ok(None) };
        let (r, scale) = rank_of(&self.targets, &self.config, path);
        let fits = matches!((a.shape.as_slice(), b.shape.as_slice()), ([x, _], [_, y]) if *x == r && *y == r);
        if !fits {
            let problem =
                format!("{path}: A {:?} and B {:?}, the configuration says rank {r}", a.shape, b.shape);
            return Err(Error::DoesNotFit { path: self.dir.clone(), problems: vec![problem] });
        }
        let (a, b) = (fill::value(a, &self.dir)?, fill::value(b, &self.dir)?);
        Ok(Some(Pair { a, b, weight: self.weight * scale as f32 }))
    }
}

/// A and B of one module.
fn joined(
    path: &str,
    pairs: &[Pair],
    options: &CombineOptions,
    rank: usize,
    rng: &mut ChaCha8Rng,
) -> Result<(Tensor, Tensor)> {
    match options.how.form {
        Form::SideBySide => {
            let a =
                pairs.iter().map(|p| &p.a * f64::from(p.weight)).collect::<candle_core::Result<Vec<_>>>()?;
            let b: Vec<&Tensor> = pairs.iter().map(|p| &p.b).collect();
            Ok((Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?.contiguous()?))
        }
        Form::Factors => {
            let root = |w: f32| w.abs().sqrt();
            let weights: Vec<f32> = pairs.iter().map(|p| root(p.weight)).collect();
            let signed: Vec<f32> =
                pairs.iter().map(|p| root(p.weight) * if p.weight < 0.0 { -1.0 } else { 1.0 }).collect();
            let a: Vec<&Tensor> = pairs.iter().map(|p| &p.a).collect();
            let b: Vec<&Tensor> = pairs.iter().map(|p| &p.b).collect();
            Ok((mixed(&a, &signed, options, rng)?, mixed(&b, &weights, options, rng)?))
        }
        Form::Decomposed => {
            // the changes have their scales in them; what is left of the weight is the user's
            let changes = pairs.iter().map(|p| p.b.matmul(&p.a)).collect::<candle_core::Result<Vec<_>>>()?;
            let weights: Vec<f32> = pairs.iter().map(|p| p.weight).collect();
            let changes: Vec<&Tensor> = changes.iter().collect();
            lora::decomposed_change(path, &mixed(&changes, &weights, options, rng)?, rank)
        }
    }
}

/// The rule over tensors of one shape.
fn mixed(
    tensors: &[&Tensor],
    weights: &[f32],
    options: &CombineOptions,
    rng: &mut ChaCha8Rng,
) -> Result<Tensor> {
    let shape = tensors.first().map(|t| t.dims().to_vec()).unwrap_or_default();
    if tensors.iter().any(|t| t.dims() != shape) {
        let reason = "and shapes differ between the adapters: were they trained over one base?";
        return Err(Error::Conflict { keys: "r", reason: reason.into() });
    }
    let kept =
        tensors.iter().map(|t| Ok(pruned(host(t)?.to_vec(), options, rng))).collect::<Result<Vec<_>>>()?;
    let element = |i: usize| {
        let values = kept.iter().map(|t| t[i]);
        let weighted = || values.clone().zip(weights).map(|(v, w)| v * w);
        match options.how.rule {
            Rule::Sum => weighted().sum::<f32>(),
            Rule::Ties => {
                let positive = values.clone().sum::<f32>() >= 0.0;
                let elected = values.clone().map(|v| v != 0.0 && (v > 0.0) == positive);
                let count = elected.clone().filter(|e| *e).count();
                let sum: f32 = weighted().zip(elected).filter(|(_, e)| *e).map(|(v, _)| v).sum();
                sum / count.max(1) as f32
            }
        }
    };
    let len = shape.iter().product();
    Ok(tensor_of((0..len).map(element).collect(), shape)?)
}

/// What stays of a tensor.
fn pruned(mut t: Vec<f32>, options: &CombineOptions, rng: &mut ChaCha8Rng) -> Vec<f32> {
    if options.density >= 1.0 {
        return t;
    }
    match options.how.prune {
        Prune::Nothing => {}
        Prune::Smallest => {
            let keep = (f64::from(options.density) * t.len() as f64) as usize;
            let mut order: Vec<usize> = (0..t.len()).collect();
            order.sort_by(|i, j| t[*j].abs().total_cmp(&t[*i].abs()).then(i.cmp(j)));
            order[keep..].iter().for_each(|i| t[*i] = 0.0);
        }
        Prune::Random => {
            for v in &mut t {
                *v = if rng.random::<f32>() < options.density { *v / options.density } else { 0.0 };
            }
        }
    }
    t
}

/// Factors of a lower rank, filled up with zeros.
fn padded((a, b): (Tensor, Tensor), rank: usize) -> Result<(Tensor, Tensor)> {
    let missing = rank.saturating_sub(a.dim(0)?);
    if missing == 0 {
        return Ok((a.contiguous()?, b.contiguous()?));
    }
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, a.dtype(), &Device::Cpu);
    let (rows, cols) = (zeros((missing, a.dim(1)?))?, zeros((b.dim(0)?, missing))?);
    Ok((Tensor::cat(&[&a, &rows], 0)?, Tensor::cat(&[&b, &cols], 1)?.contiguous()?))
}
