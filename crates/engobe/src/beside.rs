//! Results that are made beside their place and put there when they are good.

use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// A file or directory in the making. Dropped before [`Beside::keep`], it leaves nothing behind.
pub struct Beside {
    out: PathBuf,
    partial: PathBuf,
}

impl Beside {
    /// What shall become the directory `out`, which must not exist, or be empty.
    pub fn dir(out: &Path) -> Result<Self> {
        match fs::read_dir(out) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    bail!("{}: is not empty; choose a new directory for --out", out.display());
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| out.display().to_string()),
        }
        let this = Self::new(out)?;
        fs::create_dir_all(&this.partial).with_context(|| this.partial.display().to_string())?;
        Ok(this)
    }

    /// What shall become the file `out`, which must not exist.
    pub fn file(out: &Path) -> Result<Self> {
        if out.exists() {
            bail!("{}: exists; choose another --out", out.display());
        }
        let this = Self::new(out)?;
        if let Some(parent) = this.partial.parent() {
            fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        }
        Ok(this)
    }

    fn new(out: &Path) -> Result<Self> {
        let name = out
            .file_name()
            .with_context(|| format!("--out {}: is no name of a file or directory", out.display()))?;
        let mut partial = OsString::from(".");
        partial.push(name);
        partial.push(format!(".{}.partial", std::process::id()));
        // (a bare name has an empty parent)
        let partial = match out.parent().filter(|p| !p.as_os_str().is_empty()) {
            Some(parent) => parent.join(partial),
            None => Path::new(".").join(partial),
        };
        Ok(Self { out: out.to_path_buf(), partial })
    }

    /// Where it is made.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Puts it into its place.
    pub fn keep(self) -> Result<()> {
        if self.out.is_dir() {
            // an empty one, or this fails
            fs::remove_dir(&self.out).with_context(|| self.out.display().to_string())?;
        }
        fs::rename(&self.partial, &self.out).with_context(|| self.out.display().to_string())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // what was kept is no longer there
        let _ = fs::remove_dir_all(&self.partial);
        let _ = fs::remove_file(&self.partial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_kept_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let begun = Beside::dir(&out).unwrap();
        fs::write(begun.path().join("x"), b"1").unwrap();
        drop(begun);
        let begun = Beside::file(&dir.path().join("model.gguf")).unwrap();
        fs::write(begun.path(), b"1").unwrap();
        drop(begun);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_kept_is_whole_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        fs::create_dir(&out).unwrap();
        let begun = Beside::dir(&out).unwrap();
        fs::write(begun.path().join("x"), b"1").unwrap();
        begun.keep().unwrap();
        assert_eq!(fs::read(out.join("x")).unwrap(), b"1");
        assert!(Beside::dir(&out).err().unwrap().to_string().contains("not empty"));
        let file = dir.path().join("a");
        fs::write(&file, b"old").unwrap();
        assert!(Beside::file(&file).err().unwrap().to_string().contains("choose another"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
