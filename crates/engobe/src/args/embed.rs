//! Flags of `engobe embed`.

use super::{Common, ModelArgs};
use clap::Args;
use std::path::PathBuf;

/// `engobe embed`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  engobe embed --model ./all-MiniLM-L6-v2 --text \"A cat sat.\" --text \"Cats sit.\"\n  engobe embed --model ./all-MiniLM-L6-v2 --data texts.jsonl --out vectors.npy"
)]
pub struct EmbedArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// A text; repeatable
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub text: Vec<String>,
    /// JSONL, JSON, CSV, TSV or Parquet file with a column text (and text_pair)
    #[arg(long, value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// mean, cls, last or pooler [what 1_Pooling beside the model says, else mean]
    #[arg(long, value_name = "HOW")]
    pub pooling: Option<String>,
    /// Scale vectors to length 1: true or false [what modules.json beside the model says]
    #[arg(long, value_name = "BOOL")]
    pub normalize: Option<bool>,
    /// Tokens after which a text is cut [what sentence_bert_config.json says, else what the model has positions for]
    #[arg(long, value_name = "N")]
    pub max_seq_len: Option<usize>,
    /// File for the vectors: .npy, or JSON lines [standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}
