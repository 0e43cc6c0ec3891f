//! Data: from files to micro-batches.
//!
//! rows ([`reader`]) -> text (by [`ChatTemplate`]) -> ids and labels ([`encode`]) -> checks ([`lint`]) ->
//! micro-batches ([`Loader`]). This crate knows no model and no device.

pub mod error;
pub mod template;
pub mod tokenizer;

pub use error::{Error, Result};
pub use template::ChatTemplate;
pub use tokenizer::TextTokenizer;
