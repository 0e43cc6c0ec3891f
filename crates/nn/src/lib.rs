//! Layers of transformers over the tape, and the seams at which adapters attach.
//!
//! A layer knows its Hugging Face module path (`model.layers.3.self_attn.q_proj`). Adapters find layers by
//! path through [`ModuleTree`] and attach through the seams; they never see an architecture, and an
//! architecture never sees a method.
//!
//! Must not know: names of models, names of adapter methods, files.

pub mod cache;
mod causal;
pub mod decoder;
mod encoder;
mod entry;
mod linear;
mod modules;
mod prefix;
pub mod rope;
mod seq2seq;
mod sub_layer;
mod task;

pub use cache::KvCache;
pub use causal::{CausalLm, ModelInfo, TokenBatch};
pub use encoder::{Encoder, EncoderStack, Pooler, embed_types};
pub use engobe_autograd::{Error, FrozenWeight, HostBytes, Result};
pub use entry::{Entry, InputRows, Takes};
pub use linear::{Linear, LinearAdapter, linear_group};
pub use modules::{
    Embedding, EmbeddingAdapter, LayerNorm, ModuleMut, ModuleTree, Norm, RmsNorm, SiteMut, Weight,
};
pub use prefix::{KeyValueRows, KvPrefix};
pub use seq2seq::{EncoderStates, Seq2Seq, Seq2SeqCache};
pub use sub_layer::{Closing, NormAfter, SubLayer, SubLayerAdapter, SubLayerKind};
pub use task::{HeadLayer, HeadlessDecoder, Pooling, TaskHead, TaskModel, pool};
