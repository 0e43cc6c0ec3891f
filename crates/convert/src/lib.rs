//! From one format to another: LoRA adapters between PEFT, mlx-lm and GGUF, and models (with or without an
//! adapter) into GGUF files for llama.cpp.
//!
//! Every tensor of the source is mapped and reported ([`Mapped`]); one that cannot be mapped is an error. What a
//! format cannot say (scales by module, ranks that differ) is baked into the numbers, so that the target computes
//! what the source does.
//!
//! Must not know: the training loop, command lines, printing.

mod error;
pub mod lora;
pub mod model;
mod types;

pub use error::{Error, Result};
pub use lora::{AdapterFormat, Lora};
pub use types::GgufType;

/// One tensor that was mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// name in the source
    pub from: String,
    /// name in the target
    pub to: String,
    /// shape in the target, outermost first
    pub shape: Vec<usize>,
    /// type in the target
    pub dtype: String,
}
