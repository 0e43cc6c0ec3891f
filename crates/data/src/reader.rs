//! Rows of data files, and the form they have.
//!
//! JSONL, JSON, CSV, TSV and Parquet; files or directories of them. A file's form is recognised by its first row and
//! holds for all its rows: a row that does not fit is an error that names the row and the key it lacks.

mod form;
mod label;
mod raw;

pub use form::{Content, Form, Row};
pub use label::Label;
pub use raw::{Place, RawRow, read_rows};

use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The rows of one file.
#[derive(Clone, Debug)]
pub struct DataFile {
    /// where it lies
    pub path: PathBuf,
    /// how its rows are read
    pub form: Form,
    /// columns that are not used
    pub ignored: Vec<String>,
    /// the rows in the file's order
    pub rows: Vec<Row>,
}

impl DataFile {
    /// One line for a person: what was recognised and what is not used.
    pub fn describe(&self) -> String {
        let n = self.rows.len();
        let s = if n == 1 { "" } else { "s" };
        let mut line = format!("{}: {n} row{s} of {}", self.path.display(), self.form.describe());
        if !self.ignored.is_empty() {
            line += &format!("; not used: {}", self.ignored.join(", "));
        }
        line
    }
}

/// Reads files and directories (their data files in order of name). No rows at all is an error.
pub fn read(paths: &[PathBuf]) -> Result<Vec<DataFile>> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            files.extend(data_files(path)?);
        } else {
            files.push(path.clone());
        }
    }
    let files = files.iter().map(|path| read_file(path)).collect::<Result<Vec<_>>>()?;
    if files.iter().all(|file| file.rows.is_empty()) {
        let paths = paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
        return Err(Error::Empty { paths });
    }
    Ok(files)
}

/// Reads one file.
pub fn read_file(path: &Path) -> Result<DataFile> {
    let raw = read_rows(path)?;
    let Some(first) = raw.first() else {
        return Err(Error::Empty { paths: path.display().to_string() });
    };
    let form = Form::recognise(first)?.widened(&raw);
    let ignored = form.ignored(first);
    let rows = raw.into_iter().map(|row| form.row(row)).collect::<Result<Vec<_>>>()?;
    Ok(DataFile { path: path.to_path_buf(), form, ignored, rows })
}

fn data_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io { path: dir.to_path_buf(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.is_file() && raw::Format::of(&path).is_some() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        let what = format!("no data files in this directory; data files end in {}", raw::ENDINGS);
        return Err(Error::File { path: dir.to_path_buf(), what });
    }
    Ok(files)
}
