//! UMT5 (Chung et al. 2023): mT5 with a table of biases in every layer.
//!
//! Whether what its head reads is scaled, `tie_word_embeddings` says, as it did for all of T5's kin in transformers 4: the
//! published checkpoints say false, and mean by it that it is not. transformers 5 takes and writes true whatever it read,
//! and so scales their logits by d_model^-0.5.

use crate::seq2seq::Seq2SeqArchitecture;
use crate::t5::{build, sizes};

/// The architecture.
pub static ARCHITECTURE: Seq2SeqArchitecture = Seq2SeqArchitecture { model_type: "umt5", sizes, build };
