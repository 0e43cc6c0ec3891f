//! Parquet, row by row, without arrow.

use super::{Place, RawRow, name};
use crate::{Error, Result};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

pub(super) fn rows(path: &Path) -> Result<Vec<RawRow>> {
    let error = |what: String| Error::File { path: path.into(), what };
    let file = std::fs::File::open(path).map_err(|source| Error::Io { path: path.into(), source })?;
    // the library's row reader has assertions that a damaged file can reach
    match catch_unwind(AssertUnwindSafe(|| read(file, path))) {
        Ok(rows) => rows.map_err(|e| error(format!("not a readable Parquet file: {e}"))),
        Err(_) => Err(error(
            "not a readable Parquet file: it is damaged, or has a column type that is not supported".into(),
        )),
    }
}

fn read(file: std::fs::File, path: &Path) -> parquet::errors::Result<Vec<RawRow>> {
    let reader = SerializedFileReader::new(file)?;
    let file = name(path);
    let mut rows = Vec::new();
    for row in reader.get_row_iter(None)? {
        let place = Place { file: file.clone(), number: rows.len() + 1, unit: "row" };
        rows.push(RawRow { place, fields: fields(&row?) });
    }
    Ok(rows)
}

fn fields(row: &Row) -> Map<String, Value> {
    row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(v) => Value::from(*v),
        Field::Byte(v) => Value::from(*v),
        Field::Short(v) => Value::from(*v),
        Field::Int(v) => Value::from(*v),
        Field::Long(v) => Value::from(*v),
        Field::UByte(v) => Value::from(*v),
        Field::UShort(v) => Value::from(*v),
        Field::UInt(v) => Value::from(*v),
        Field::ULong(v) => Value::from(*v),
        Field::Float16(v) => Value::from(v.to_f32()),
        Field::Float(v) => Value::from(*v),
        Field::Double(v) => Value::from(*v),
        Field::Str(v) => Value::from(v.as_str()),
        Field::Bytes(v) => Value::from(String::from_utf8_lossy(v.data())),
        Field::Group(row) => Value::Object(fields(row)),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let text = |key: &Field| match key {
                Field::Str(key) => key.clone(),
                other => other.to_string(),
            };
            Value::Object(map.entries().iter().map(|(k, v)| (text(k), value(v))).collect())
        }
        // dates, times and decimals carry no text to learn from
        other => Value::from(other.to_string()),
    }
}
