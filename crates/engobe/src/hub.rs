//! Models from the Hugging Face hub, through its cache.
//!
//! The cache is the one that Python's `huggingface_hub` keeps (`HF_HUB_CACHE`, or `HF_HOME/hub`), so what is there
//! already is not loaded twice. `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean there.

use anyhow::{Context, Result, bail};
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How the hub is used.
#[derive(Clone, Copy, Debug, Default)]
pub struct HubOptions {
    /// take what the cache has and contact nobody
    pub offline: bool,
}

/// A name on the hub: `org/name`, `org/name@revision`, `org/name:file.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HubId {
    repo: String,
    revision: String,
    file: Option<String>,
}

impl HubId {
    fn parse(text: &str) -> Option<Self> {
        let (rest, file) = match text.split_once(':') {
            Some((rest, file)) => (rest, Some(file.to_string())),
            None => (text, None),
        };
        let (repo, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let (org, name) = repo.split_once('/')?;
        let plain = |part: &str| {
            let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty() && !part.starts_with('.') && part.chars().all(good)
        };
        let file_is_plain = file.as_deref().is_none_or(|f| f.ends_with(".gguf") && f.split('/').all(plain));
        (plain(org) && plain(name) && plain(revision) && file_is_plain).then(|| Self {
            repo: repo.to_string(),
            revision: revision.to_string(),
            file,
        })
    }
}

/// True for what reads as a name on the hub.
pub fn is_hub_id(text: &str) -> bool {
    HubId::parse(text).is_some()
}

/// True if the environment asks to contact nobody.
pub fn offline_by_environment() -> bool {
    std::env::var("HF_HUB_OFFLINE")
        .is_ok_and(|v| matches!(v.to_lowercase().as_str(), "1" | "true" | "yes" | "on"))
}

/// Where the hub is.
fn endpoint() -> String {
    let set = std::env::var("HF_ENDPOINT").ok().filter(|e| !e.is_empty());
    set.map_or_else(|| "https://huggingface.co".to_string(), |e| e.trim_end_matches('/').to_string())
}

fn cache() -> Cache {
    match std::env::var_os("HF_HUB_CACHE").filter(|c| !c.is_empty()) {
        Some(path) => Cache::new(path.into()),
        None => Cache::from_env(),
    }
}

/// An error if the hub does not answer within seconds: downloads themselves may take as long as they need.
fn check_reachable() -> Result<()> {
    let config = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(5)));
    let agent: ureq::Agent = config.http_status_as_error(false).build().into();
    let url = endpoint();
    agent.head(&url).call().with_context(|| format!("{url} cannot be reached"))?;
    Ok(())
}

fn api(cache: Cache) -> Result<Api> {
    let token = std::env::var("HF_TOKEN").ok().filter(|t| !t.is_empty()).or_else(|| cache.token());
    let builder = ApiBuilder::from_cache(cache).with_endpoint(endpoint()).with_token(token);
    Ok(builder.with_retries(2).with_progress(std::io::IsTerminal::is_terminal(&std::io::stderr())).build()?)
}

/// The directory, or GGUF file, of a model on the hub, downloaded if the cache does not have it.
pub fn download(id: &str, options: &HubOptions) -> Result<PathBuf> {
    let name = HubId::parse(id).with_context(|| format!("{id}: not a hub id (org/name)"))?;
    let repo = Repo::with_revision(name.repo.clone(), RepoType::Model, name.revision.clone());
    let cache = cache();
    let cached = || complete_in_cache(&cache, &repo, name.file.as_deref());
    if options.offline || offline_by_environment() {
        return cached().with_context(|| {
            format!("{id}: not complete in {}; offline mode downloads nothing", cache.path().display())
        });
    }
    if let Err(error) = check_reachable() {
        return cached().ok_or(error).with_context(|| id.to_string());
    }
    let api = api(cache.clone())?;
    let remote = Remote { repo: api.repo(repo.clone()), id };
    remote.fetch(&cache, &repo, name.file.as_deref())
}

/// One file of a repository on the hub.
pub fn download_file(repo: &str, file: &str) -> Result<PathBuf> {
    check_reachable()?;
    let api = api(cache())?;
    api.model(repo.to_string()).get(file).map_err(|e| explain(&format!("{repo}/{file}"), e))
}

/// What must be there beside the weights, and what may.
const NEEDED: &str = "config.json";
const OPTIONAL: [&str; 6] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The directory of a revision in the cache.
fn snapshot(cache: &Cache, repo: &Repo) -> Option<PathBuf> {
    // a branch or tag names its commit in a file; a commit stands for itself
    let reference = cache.path().join(repo.folder_name()).join("refs").join(repo.revision());
    let commit = std::fs::read_to_string(reference).unwrap_or_else(|_| repo.revision().to_string());
    let dir = cache.repo(repo.clone()).pointer_path(commit.trim());
    dir.is_dir().then_some(dir)
}

/// What was asked for, if all of it is in the cache.
fn complete_in_cache(cache: &Cache, repo: &Repo, file: Option<&str>) -> Option<PathBuf> {
    let dir = snapshot(cache, repo)?;
    let there = |name: &str| Some(dir.join(name)).filter(|path| path.exists());
    if let Some(file) = file {
        return there(file);
    }
    if there(NEEDED).is_some() {
        let complete = match there(INDEX) {
            Some(index) => shards(&index).ok()?.iter().all(|s| there(s).is_some()),
            None => there(SINGLE).is_some(),
        };
        return complete.then_some(dir);
    }
    // a repository of one GGUF file
    let files = std::fs::read_dir(&dir).ok()?.flatten().map(|e| e.path());
    let ggufs: Vec<PathBuf> = files.filter(|p| p.extension().is_some_and(|e| e == "gguf")).collect();
    <[PathBuf; 1]>::try_from(ggufs).ok().map(|[one]| one)
}

/// Names of the shards in an index.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read(index).with_context(|| index.display().to_string())?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).with_context(|| index.display().to_string())?;
    let map =
        json["weight_map"].as_object().with_context(|| format!("{}: has no weight_map", index.display()))?;
    Ok(map.values().filter_map(|v| v.as_str().map(str::to_string)).collect())
}

struct Remote<'a> {
    repo: ApiRepo,
    id: &'a str,
}

impl Remote<'_> {
    fn fetch(&self, cache: &Cache, repo: &Repo, file: Option<&str>) -> Result<PathBuf> {
        let info = self.repo.info().map_err(|e| explain(self.id, e))?;
        let names: Vec<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
        // the cache's branch may be older than the hub's
        let cached = cache.repo(repo.clone());
        let current = cached.pointer_path(&info.sha);
        let get = |name: &str| -> Result<PathBuf> {
            let there = current.join(name);
            match there.exists() {
                true => Ok(there),
                false => self.repo.download(name).map_err(|e| explain(&format!("{}: {name}", self.id), e)),
            }
        };
        if let Some(file) = file {
            return get(file);
        }
        if !names.contains(&NEEDED) {
            let ggufs: Vec<&str> = names.iter().filter(|n| n.ends_with(".gguf")).copied().collect();
            return match ggufs.as_slice() {
                [] => bail!("{}: has neither config.json nor .gguf files", self.id),
                [one] => get(one),
                [first, ..] => {
                    let list = ggufs.join(", ");
                    bail!(
                        "{}: has several .gguf files: name one, as in {}:{first} ({list})",
                        self.id,
                        self.id
                    )
                }
            };
        }
        let config = get(NEEDED)?;
        for name in OPTIONAL.into_iter().filter(|n| names.contains(n)) {
            get(name)?;
        }
        match (names.contains(&INDEX), names.contains(&SINGLE)) {
            (true, _) => {
                for shard in shards(&get(INDEX)?)? {
                    get(&shard)?;
                }
            }
            (false, true) => drop(get(SINGLE)?),
            (false, false) => bail!("{}: has no safetensors weights", self.id),
        }
        cached.create_ref(&info.sha)?;
        config.parent().map(Path::to_path_buf).with_context(|| self.id.to_string())
    }
}

/// The hub's refusals in words.
fn explain(what: &str, error: hf_hub::api::sync::ApiError) -> anyhow::Error {
    let text = error.to_string();
    let hint = match () {
        () if text.contains("401") || text.contains("403") => {
            ": no such model, or it is private or gated: accept its terms and set HF_TOKEN"
        }
        () if text.contains("404") => ": the hub has no such model or file",
        () => "",
    };
    anyhow::anyhow!("{what}{hint} ({text})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_hub() {
        let id = HubId::parse("org/a.b-C_1@v2:q/x.Q4_1.gguf").unwrap();
        assert_eq!((id.repo.as_str(), id.revision.as_str()), ("org/a.b-C_1", "v2"));
        assert_eq!(id.file.as_deref(), Some("q/x.Q4_1.gguf"));
        for bad in ["plain", "./dir/x", "/abs/x", "a/b/c", "../x", "a/b:../x.gguf", "a/b:x.bin", "a /b", "a/"]
        {
            assert!(!is_hub_id(bad), "{bad}");
        }
    }
}
