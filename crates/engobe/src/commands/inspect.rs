//! todo
use anyhow::Result;
#[allow(missing_docs)]
pub fn run<T>(_: &T) -> Result<()> {
    Ok(())
}
