//! Methods of parameter-efficient fine-tuning, one file each: configuration, initialisation, what they add
//! to a forward pass, merging, and the names of their parameters in files.
//!
//! A method attaches to a model through the seams of `engobe-nn` and finds modules by path.
//!
//! Must not know: names of models, the training loop.

mod adalora;
mod adapter;
mod base_copies;
mod bottleneck;
pub mod combine;
mod error;
mod fill;
mod ia3;
mod lora;
pub mod merge;
pub mod method;
mod miss;
mod modules;
mod own;
mod p_tuning;
mod prefix_tuning;
mod prompt_tuning;
mod random;
mod saved;
mod target;
mod tokens;
mod trainable_tokens;
mod vera;
mod virtual_tokens;

pub use adapter::{Adapter, AdapterSizes, LayerSizes, Start};
pub use error::{Error, Result};
pub use method::{Method, StartText};
pub use target::Targets;
