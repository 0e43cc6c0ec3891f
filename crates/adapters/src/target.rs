//! Which modules an adapter touches: PEFT's rules (`check_target_module_exists`, `get_pattern_key` and
//! `_set_trainable` of PEFT 0.21).

use crate::{Error, Result};
use engobe_formats::peft::{LoraConfig, TargetModules};
use fancy_regex::Regex;

/// A setting's pattern, ready to match module paths.
#[derive(Debug)]
enum Matcher {
    /// the path, or its end after a dot
    Suffixes(Vec<String>),
    /// the whole path
    Regex(Regex),
    /// every linear layer but the heads
    AllLinear,
}

/// What PEFT calls the heads of tasks (`classifier_module_names`).
const HEADS: [&str; 2] = ["classifier", "score"];

/// The rules of one configuration.
#[derive(Debug)]
pub struct Targets {
    include: Matcher,
    exclude: Option<Matcher>,
    saved: Vec<Regex>,
    modules_to_save: Vec<String>,
    layers: Option<Layers>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

#[derive(Debug)]
struct Layers {
    indices: Vec<usize>,
    patterns: Vec<Regex>,
}

fn regex(key: &'static str, pattern: &str, wrap: impl Fn(&str) -> String) -> Result<Regex> {
    Regex::new(&wrap(pattern)).map_err(|e| Error::Pattern {
        key,
        pattern: pattern.to_string(),
        reason: e.to_string(),
    })
}

fn is_match(pattern: &Regex, path: &str) -> bool {
    pattern.is_match(path).unwrap_or(false)
}

impl Matcher {
    fn new(key: &'static str, modules: &TargetModules) -> Result<Self> {
        Ok(match modules {
            TargetModules::List(names) => Self::Suffixes(names.clone()),
            TargetModules::Regex(pattern) => Self::Regex(regex(key, pattern, |p| format!("^(?:{p})$"))?),
            TargetModules::AllLinear => Self::AllLinear,
        })
    }

    fn matches(&self, path: &str, is_plain_linear: bool) -> bool {
        match self {
            Self::Suffixes(names) => names.iter().any(|n| ends_with_module(path, n)),
            Self::Regex(pattern) => is_match(pattern, path),
            Self::AllLinear => is_plain_linear,
        }
    }
}

/// True if `path` is `name`, or ends with it after a dot.
pub(crate) fn ends_with_module(path: &str, name: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|head| head.ends_with('.'))
}

impl Targets {
    /// Reads the rules of a configuration.
    ///
    /// # Errors
    /// A pattern that is no regular expression, or settings that exclude each other.
    pub fn new(config: &LoraConfig) -> Result<Self> {
        let modules = config.target_modules.as_ref().ok_or(Error::NoTargets)?;
        let include = Matcher::new("target_modules", modules)?;
        let saved = config
            .modules_to_save
            .iter()
            .map(|m| regex("modules_to_save", m, |m| format!(r"^(?:^|.*\.)(?:{m})(?:$|\..*)")))
            .collect::<Result<_>>()?;
        let pattern_key = |key, pattern: &str| regex(key, pattern, |p| format!(r"^(?:.*\.)?(?:{p})$"));
        Ok(Self {
            layers: Layers::new(config, &include)?,
            include,
            exclude: config
                .exclude_modules
                .as_ref()
                .map(|m| Matcher::new("exclude_modules", m))
                .transpose()?,
            saved,
            modules_to_save: config.modules_to_save.clone(),
            ranks: config
                .rank_pattern
                .iter()
                .map(|(p, r)| Ok((pattern_key("rank_pattern", p)?, *r)))
                .collect::<Result<_>>()?,
            alphas: config
                .alpha_pattern
                .iter()
                .map(|(p, a)| Ok((pattern_key("alpha_pattern", p)?, *a)))
                .collect::<Result<_>>()?,
        })
    }

    /// Rules that name modules to train in full, and no others.
    ///
    /// # Errors
    /// A name that is no regular expression.
    pub fn saving(names: &[String]) -> Result<Self> {
        Self::new(&LoraConfig {
            target_modules: Some(TargetModules::List(Vec::new())),
            modules_to_save: names.to_vec(),
            ..LoraConfig::default()
        })
    }

    /// True if the module at `path` gets an adapter; `is_plain_linear`: it is a linear layer and no head.
    pub fn adapts(&self, path: &str, is_plain_linear: bool) -> bool {
        if self.exclude.as_ref().is_some_and(|m| m.matches(path, is_plain_linear))
            || self.saved.iter().any(|m| is_match(m, path))
            || !self.include.matches(path, is_plain_linear)
        {
            return false;
        }
        match (&self.layers, &self.include) {
            // a path that is spelled out in full is taken whatever its layer
            (Some(_), Matcher::Suffixes(names)) if names.iter().any(|n| n == path) => true,
            (Some(layers), _) => layers.contain(path),
            (None, _) => true,
        }
    }

    /// True if the module at `path` (or one that holds it) is trained in full. PEFT compares the ends of
    /// module names here, without regard to dots.
    pub fn saves(&self, path: &str) -> bool {
        let parents = path.match_indices('.').map(|(at, _)| &path[..at]);
        parents.chain([path]).any(|p| self.modules_to_save.iter().any(|m| p.ends_with(m.as_str())))
    }

    /// Entries of `modules_to_save` and of a `target_modules` list that match none of `paths`.
    pub fn unmatched<'a>(&'a self, paths: &[String]) -> (Vec<&'a str>, Vec<&'a str>) {
        let unmatched_targets = match &self.include {
            Matcher::Suffixes(names) => {
                let missing = |n: &&String| !paths.iter().any(|p| ends_with_module(p, n));
                names.iter().filter(missing).map(String::as_str).collect()
            }
            _ => Vec::new(),
        };
        let is_saved = |m: &str| {
            let hit =
                |p: &str| p.match_indices('.').map(|(at, _)| &p[..at]).chain([p]).any(|p| p.ends_with(m));
            paths.iter().any(|p| hit(p))
        };
        let mut saved: Vec<&str> =
            self.modules_to_save.iter().map(String::as_str).filter(|m| !is_saved(m)).collect();
        // PEFT writes both for every task with a head; a model has one of them
        if HEADS.iter().any(|head| is_saved(head) && self.modules_to_save.iter().any(|m| m == head)) {
            saved.retain(|name| !HEADS.contains(name));
        }
        (unmatched_targets, saved)
    }

    /// Rank of the module at `path`.
    pub fn rank(&self, path: &str, default: usize) -> usize {
        self.ranks.iter().find(|(p, _)| is_match(p, path)).map_or(default, |(_, r)| *r)
    }

    /// Alpha of the module at `path`.
    pub fn alpha(&self, path: &str, default: f64) -> f64 {
        self.alphas.iter().find(|(p, _)| is_match(p, path)).map_or(default, |(_, a)| *a)
    }
}

impl Layers {
    fn new(config: &LoraConfig, include: &Matcher) -> Result<Option<Self>> {
        let Some(indices) = config.layers_to_transform.clone().filter(|l| !l.is_empty()) else {
            return match config.layers_pattern.is_empty() {
                true => Ok(None),
                false => Err(Error::Conflict {
                    keys: "layers_pattern",
                    reason: "needs layers_to_transform beside it".into(),
                }),
            };
        };
        if !matches!(include, Matcher::Suffixes(_)) {
            return Err(Error::Conflict {
                keys: "layers_to_transform",
                reason: "works only with target_modules as a list of names, not with a regex or all-linear"
                    .into(),
            });
        }
        let patterns = match config.layers_pattern.as_slice() {
            [] => vec![regex("layers_pattern", "", |_| r"^.*?\.[^.]*\.(?P<idx>\d+)\.".to_string())?],
            names => names
                .iter()
                .map(|n| regex("layers_pattern", n, |n| format!(r"^(?:^|.*?\.){n}\.(?P<idx>\d+)\.")))
                .collect::<Result<_>>()?,
        };
        Ok(Some(Self { indices, patterns }))
    }

    fn contain(&self, path: &str) -> bool {
        let captures = self.patterns.iter().find_map(|p| p.captures(path).ok().flatten());
        captures
            .and_then(|c| c.name("idx")?.as_str().parse::<usize>().ok())
            .is_some_and(|index| self.indices.contains(&index))
    }
}
