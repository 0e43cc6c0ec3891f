//! Files mapped into memory.

use crate::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file mapped read-only; it knows its path.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps a file. An empty one is an error, and so is a directory.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let file = File::open(path).map_err(Error::io(path))?;
        let meta = file.metadata().map_err(Error::io(path))?;
        if !meta.is_file() {
            return Err(Error::corrupt(path, "is not a file"));
        }
        if meta.len() == 0 {
            return Err(Error::corrupt(path, "is empty"));
        }
        // SAFETY: the map is read-only and private. As with every memory-mapped model loader, another process
        // that truncates the file while it is in use would end this one; we never write to mapped files.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Arc::new(Self { path: path.to_path_buf(), map }))
    }

    /// Lets go of the pages that hold `range`. What is read there later comes from the file again.
    pub fn release(&self, range: std::ops::Range<usize>) {
        #[cfg(unix)]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is read-only and backed by the file, so pages that are let go hold nothing that the
            // file does not; whoever reads them meanwhile or later gets the same bytes.
            let done = unsafe { self.map.unchecked_advise_range(advice, range.start, range.len()) };
            // advice that is not taken costs memory, nothing else
            let _ = done;
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}
