//! Files mapped into memory.

use crate::{Error, Result};
use memmap2::{Mmap, MmapMut};
use std::fs::File;
use std::io::Write;
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

/// A file of our own, mapped for reading and writing: memory that the system may move to the disk. It is removed when
/// this is dropped.
#[derive(Debug)]
pub struct ScratchFile {
    path: PathBuf,
    map: MmapMut,
}

impl ScratchFile {
    /// Makes a file of `len` zeros; what was there is overwritten. The zeros are written out, so that a full disk is an
    /// error here and not a crash later.
    pub fn create(path: &Path, len: usize) -> Result<Self> {
        match Self::map(path, len) {
            Ok(map) => Ok(Self { path: path.to_path_buf(), map }),
            Err(error) => {
                let _ = std::fs::remove_file(path);
                Err(Error::io(path)(error))
            }
        }
    }

    fn map(path: &Path, len: usize) -> std::io::Result<MmapMut> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        // a map of nothing is an error on most systems
        let len = len.max(1);
        for at in (0..len).step_by(ZEROS.len()) {
            file.write_all(&ZEROS[..ZEROS.len().min(len - at)])?;
        }
        // SAFETY: the file was made by us for us; nobody else has a reason to shorten it.
        unsafe { MmapMut::map_mut(&file) }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }

    /// Says that `range` is not needed for a while: the system writes it to the disk in its own time, and it no longer
    /// counts as memory of this process.
    pub fn release(&self, range: std::ops::Range<usize>) {
        // a range that can't be written now is written when the system needs the page
        let _ = self.map.flush_async_range(range.start, range.len());
        #[cfg(unix)]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is shared with its file, so that pages that are let go keep what was written to them.
            let _ = unsafe { self.map.unchecked_advise_range(advice, range.start, range.len()) };
        }
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Addresses that read as zeros and take no memory until something is written, which nothing does.
#[derive(Debug)]
pub struct Zeros(Mmap);

impl Zeros {
    /// `len` of them.
    pub fn new(len: usize) -> Result<Self> {
        let map = MmapMut::map_anon(len.max(1)).and_then(MmapMut::make_read_only);
        Ok(Self(map.map_err(Error::io(Path::new("anonymous memory")))?))
    }
}

impl AsRef<[u8]> for Zeros {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_released_comes_back() {
        let dir = std::env::temp_dir().join(format!("engobe-scratch-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("state");
        for len in [0, 1, 70_000] {
            let mut file = ScratchFile::create(&path, len).unwrap();
            assert!(file.bytes()[..len].iter().all(|b| *b == 0));
            file.bytes_mut()[..len].fill(7);
            file.release(0..len);
            assert!(file.bytes()[..len].iter().all(|b| *b == 7));
        }
        assert!(!path.exists());
        let error = ScratchFile::create(&dir.join("no/state"), 1).unwrap_err().to_string();
        assert!(error.contains("no/state"), "{error}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
