//! File formats: bytes in, names and views out; names and tensors in, whole files out.
//!
//! Every file is hostile: each claim of a header is checked against what is there before anything is
//! allocated or sliced. Files are written beside their place, fsynced and renamed.
//!
//! Must not know: layers, candle.

pub mod adapter_hub;
pub mod atomic;
pub mod bitsandbytes;
pub mod checkpoint;
mod error;
pub mod gguf;
pub mod hf_config;
pub mod mlx;
pub mod mmap;
pub mod peft;
pub mod safetensors_file;
pub mod sharded;
pub mod tensor;

pub use error::{Error, Result, nearest, shorten};
