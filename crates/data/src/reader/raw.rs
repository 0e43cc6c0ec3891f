//! Files to JSON objects, each with its place.

mod parquet;

use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;

/// Where a row stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// the file, as it was named
    pub file: Arc<str>,
    /// line of a text file, row of other files; from 1
    pub number: usize,
    /// what `number` counts
    pub unit: &'static str,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.file, self.unit, self.number)
    }
}

impl Place {
    pub(crate) fn error(&self, what: impl Into<String>) -> Error {
        Error::Row { place: self.to_string(), what: what.into() }
    }
}

/// A row as it stands in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct RawRow {
    /// where it stands
    pub place: Place,
    /// its columns
    pub fields: Map<String, Value>,
}

/// What a file's name says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Jsonl,
    Json,
    Separated(u8),
    Parquet,
}

pub(super) const ENDINGS: &str = ".jsonl, .ndjson, .json, .csv, .tsv or .parquet";

impl Format {
    pub(super) fn of(path: &Path) -> Option<Self> {
        Some(match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "jsonl" | "ndjson" => Self::Jsonl,
            "json" => Self::Json,
            "csv" => Self::Separated(b','),
            "tsv" => Self::Separated(b'\t'),
            "parquet" => Self::Parquet,
            _ => return None,
        })
    }
}

/// All rows of a file.
pub fn read_rows(path: &Path) -> Result<Vec<RawRow>> {
    let Some(format) = Format::of(path) else {
        // a missing file is the likelier mistake
        std::fs::metadata(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let what = format!("unknown kind of data file; data files end in {ENDINGS}");
        return Err(Error::File { path: path.into(), what });
    };
    match format {
        Format::Parquet => parquet::rows(path),
        Format::Separated(delimiter) => separated(path, &read(path)?, delimiter),
        Format::Jsonl => jsonl(path, &read(path)?),
        Format::Json => json(path, &read(path)?),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source })
}

fn name(path: &Path) -> Arc<str> {
    path.display().to_string().into()
}

/// A byte order mark is no part of the text.
fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

fn jsonl(path: &Path, bytes: &[u8]) -> Result<Vec<RawRow>> {
    let file = name(path);
    let mut rows = Vec::new();
    for (i, line) in without_mark(bytes).split(|&b| b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let place = Place { file: file.clone(), number: i + 1, unit: "line" };
        let value = serde_json::from_slice(line)
            .map_err(|e| place.error(format!("invalid JSON: {}", at_column(&e, &e.to_string()))))?;
        rows.push(object(place, value)?);
    }
    Ok(rows)
}

/// serde_json counts lines from the start of what it was given, here always one line.
fn at_column(error: &serde_json::Error, text: &str) -> String {
    let what = text.split(" at line ").next().unwrap_or(text);
    format!("{what} at column {}", error.column())
}

fn object(place: Place, value: Value) -> Result<RawRow> {
    match value {
        Value::Object(fields) => Ok(RawRow { place, fields }),
        other => {
            Err(place
                .error(format!("a row is a JSON object like {{\"text\": ...}}, this is {}", kind(&other))))
        }
    }
}

/// What a JSON value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A list of rows, or an object that holds one under `data`, `rows` or `train`. JSON lines under the wrong name
/// are read as such.
fn json(path: &Path, bytes: &[u8]) -> Result<Vec<RawRow>> {
    let bytes = without_mark(bytes);
    if bytes.trim_ascii().is_empty() {
        return Ok(Vec::new());
    }
    let error = |what: String| Error::File { path: path.into(), what };
    let value: Value = match serde_json::from_slice(bytes) {
        Ok(value) => value,
        Err(e) => {
            let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
            if e.is_syntax() && matches!(values.next(), Some(Ok(Value::Object(_)))) && values.next().is_some()
            {
                return jsonl(path, bytes);
            }
            return Err(error(format!("invalid JSON: {e}")));
        }
    };
    let rows = match value {
        Value::Array(rows) => rows,
        Value::Object(mut fields) => {
            let key = ["data", "rows", "train"]
                .into_iter()
                .find(|key| fields.get(*key).is_some_and(Value::is_array));
            match key.and_then(|key| fields.remove(key)) {
                Some(Value::Array(rows)) => rows,
                // one row
                _ => vec![Value::Object(fields)],
            }
        }
        other => return Err(error(format!("a JSON data file is a list of rows, this is {}", kind(&other)))),
    };
    let file = name(path);
    let place = |i| Place { file: file.clone(), number: i + 1, unit: "row" };
    rows.into_iter().enumerate().map(|(i, row)| object(place(i), row)).collect()
}

/// CSV with a header. A cell that holds a JSON list or object is read as that: messages and ids can be columns.
///
/// Many sets of labelled texts come as TSV without a header: where the first line ends in a number, its columns are
/// `text`, `text_pair` if there are three, and `label`.
fn separated(path: &Path, bytes: &[u8], delimiter: u8) -> Result<Vec<RawRow>> {
    let file = name(path);
    let bytes = without_mark(bytes);
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(delimiter != b'\t' || quotes_are_marks(bytes))
        .has_headers(false)
        .from_reader(bytes);
    let place = |number| Place { file: file.clone(), number, unit: "line" };
    let explain = |e: csv::Error, line: usize| {
        let what = match e.kind() {
            csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                format!("{len} fields where the header has {expected_len}")
            }
            csv::ErrorKind::Utf8 { .. } => "not UTF-8; save the file as UTF-8".to_owned(),
            _ => e.to_string(),
        };
        place(e.position().map_or(line, |p| p.line() as usize)).error(what)
    };
    let mut records = reader.records();
    let Some(first) = records.next().transpose().map_err(|e| explain(e, 1))? else { return Ok(Vec::new()) };
    let (header, first) = match headerless(&first) {
        Some(header) => (header, Some(Ok(first))),
        None => (first, None),
    };
    if let Some(twice) =
        header.iter().enumerate().find(|(i, name)| header.iter().take(*i).any(|n| n == *name))
    {
        return Err(place(1).error(format!("column {:?} stands twice in the header", twice.1)));
    }
    let mut rows = Vec::new();
    for record in first.into_iter().chain(records) {
        let record = record.map_err(|e| explain(e, rows.len() + 2))?;
        let place = place(record.position().map_or(rows.len() + 2, |p| p.line() as usize));
        let fields =
            header.iter().zip(&record).map(|(key, cell)| (key.to_owned(), cell_value(key, cell))).collect();
        rows.push(RawRow { place, fields });
    }
    Ok(rows)
}

/// The columns of a file whose first line is a row already.
fn headerless(first: &csv::StringRecord) -> Option<csv::StringRecord> {
    let label = first.iter().next_back()?.trim();
    let columns: &[&str] = match first.len() {
        2 => &["text", "label"],
        3 => &["text", "text_pair", "label"],
        _ => return None,
    };
    label.parse::<f64>().ok().filter(|n| n.is_finite()).map(|_| columns.to_vec().into())
}

/// True if quotes enclose cells of a TSV file: each cell that begins with one ends with one on its line. GLUE's files
/// have quotes that are part of the text.
fn quotes_are_marks(bytes: &[u8]) -> bool {
    let mut lines = bytes.split(|b| *b == b'\n').map(|l| l.strip_suffix(b"\r").unwrap_or(l));
    lines.all(|line| {
        line.split(|b| *b == b'\t').all(|cell| match cell.strip_prefix(b"\"") {
            None => true,
            Some(rest) => {
                let inner = rest.strip_suffix(b"\"");
                // a quote within a quoted cell stands twice
                inner.is_some_and(|inner| !odd_quotes(inner))
            }
        })
    })
}

fn odd_quotes(cell: &[u8]) -> bool {
    cell.split(|b| *b != b'"').any(|run| run.len() % 2 == 1)
}

fn cell_value(key: &str, cell: &str) -> Value {
    let structured = [
        "messages",
        "conversations",
        "conversation",
        "tools",
        "input_ids",
        "labels",
        "prompt",
        "completion",
        "tokens",
        "words",
        "tags",
        "ner_tags",
        "pos_tags",
        "chunk_tags",
        "label",
    ];
    if structured.contains(&key)
        && cell.starts_with(['[', '{'])
        && let Ok(value) = serde_json::from_str(cell)
    {
        return value;
    }
    Value::from(cell)
}
