//! Methods of parameter-efficient fine-tuning, one file each: configuration, initialisation, what they add
//! to a forward pass, merging, and the names of their parameters in files.
//!
//! A method attaches to a model through the seams of `engobe-nn` and finds modules by path.
//!
//! Must not know: names of models, the training loop.

mod adapter;
mod base_copies;
mod error;
mod lora;
pub mod merge;
mod saved;
mod target;

pub use adapter::{Adapter, AdapterSizes, LayerSizes, Start};
pub use error::{Error, Result};
pub use lora::LoraLayer;
pub use target::Targets;
