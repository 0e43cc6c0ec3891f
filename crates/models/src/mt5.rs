//! mT5 (Xue et al. 2021): T5's v1.1 over many languages' tokens. transformers' `MT5ForConditionalGeneration` never scales what
//! its head reads, and takes gated GELU where nothing is said.

use crate::seq2seq::Seq2SeqArchitecture;
use crate::t5::{build, sizes};

/// The architecture.
pub static ARCHITECTURE: Seq2SeqArchitecture = Seq2SeqArchitecture { model_type: "mt5", sizes, build };
