//! What makes models and adapters out of others: `engobe merge`, `engobe quantize`, `engobe convert`.

use super::Common;
use clap::Args;
use std::path::PathBuf;

/// `engobe merge`
#[derive(Debug, Args)]
#[command(after_help = MERGE_HELP)]
pub struct MergeArgs {
    /// Hugging Face directory, .gguf file, hub id, or known name
    #[arg(long, value_name = "MODEL", required_unless_present = "combine", conflicts_with = "combine")]
    pub model: Option<String>,
    /// PEFT directory; with --combine several, each with its weight: DIR=0.7
    #[arg(long, value_name = "DIR", required = true)]
    pub adapter: Vec<String>,
    /// Make one LoRA adapter of several: cat, svd, linear, ties, dare_linear, dare_ties, magnitude_prune,
    /// or one of the last four with _svd
    #[arg(long, value_name = "HOW")]
    pub combine: Option<String>,
    /// With --combine: share of elements that ties, dare and magnitude_prune keep
    #[arg(long, value_name = "SHARE", requires = "combine")]
    pub density: Option<f32>,
    /// With --combine: rank of what svd gives [the largest of the adapters]
    #[arg(long, value_name = "R", requires = "combine")]
    pub svd_rank: Option<usize>,
    /// With --combine: seed of what dare drops
    #[arg(long, value_name = "N", requires = "combine", default_value_t = 42)]
    pub seed: u64,
    /// Directory to write, or a file that ends in .gguf; must not exist, or be empty
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// f32, bf16, f16 [as stored; f32 for quantized weights]; for .gguf as convert's --type
    #[arg(long, value_name = "TYPE", visible_alias = "type")]
    pub dtype: Option<String>,
    /// Most bytes in one file, in GB
    #[arg(long, value_name = "GB", default_value_t = 5.0)]
    pub max_shard_size: f64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub verify: VerifyArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

const MERGE_HELP: &str = "\
Examples:
  engobe merge --model smollm2-135m --adapter my-adapter --out merged --dtype bf16
  engobe merge --model smollm2-135m --adapter my-adapter --out merged.gguf
  engobe merge --model ./Llama-3.2-1B --adapter my-adapter --out m.gguf --type q4_k --verify-data rows.jsonl
  engobe merge --adapter ./a=0.7 --adapter ./b=0.3 --combine linear --out combined

Where weights are quantized, rounding the sum of weight and adapter can lose what was learned.
So the merged model is run beside base + adapter: mean KL divergence a token, perplexity and
likeliest tokens are compared, and what is too far away is not written.";

/// `engobe quantize`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  engobe quantize --model ./Llama-3.2-1B --to nf4 --double-quant --out llama-nf4\n  engobe quantize --model ./Llama-3.2-1B --to int8 --out llama-int8"
)]
pub struct QuantizeArgs {
    /// Hugging Face directory, .gguf file, hub id, or known name; its weights in f32, bf16 or f16
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// nf4, fp4 or int8
    #[arg(long, value_name = "TYPE")]
    pub to: String,
    /// Quantize the factors of 4-bit blocks too
    #[arg(long)]
    pub double_quant: bool,
    /// Elements in a 4-bit block: 32 to 4096, a power of two [default: 64]
    #[arg(long, value_name = "N")]
    pub block_size: Option<usize>,
    /// Directory to write; must not exist, or be empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Most bytes in one file, in GB
    #[arg(long, value_name = "GB", default_value_t = 5.0, allow_negative_numbers = true)]
    pub max_shard_size: f64,
    /// Threads [all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `engobe convert`
#[derive(Debug, Args)]
#[command(after_help = CONVERT_HELP)]
pub struct ConvertArgs {
    /// What to make: gguf-lora, gguf, mlx, peft
    #[arg(long, value_name = "KIND")]
    pub to: String,
    /// PEFT directory, mlx-lm directory, or GGUF LoRA (.gguf)
    #[arg(long, value_name = "ADAPTER")]
    pub adapter: Option<PathBuf>,
    /// The base model; adapters are checked against it [what the adapter's files name]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// File (gguf, gguf-lora) or directory (mlx, peft) to write; must not exist
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// gguf: keep, f32, f16, bf16, q8_0, q6_k, q5_k, q4_k, q4_0 [keep; q8_0 if an
    /// adapter is merged into quantized weights]; gguf-lora: f32, f16 [f32]
    #[arg(long = "type", value_name = "TYPE")]
    pub kind: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub verify: VerifyArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

const CONVERT_HELP: &str = "\
What can be made:
  gguf-lora  an adapter for llama.cpp's --lora over the same base: not merged, so nothing is lost
  gguf       a whole model for llama.cpp, with the adapter baked in if one is given
  mlx, peft  an adapter for mlx-lm or PEFT

Examples:
  engobe convert --to gguf-lora --model smollm2-135m --adapter my-adapter --out lora.gguf
  engobe convert --to gguf --model smollm2-135m --adapter my-adapter --out merged.gguf
  engobe convert --to gguf --model ./Llama-3.2-1B --type q4_k --out llama.gguf
  engobe convert --to mlx --model ./Llama-3.2-1B --adapter my-adapter --out mlx-adapter
  engobe convert --to peft --model smollm2-135m --adapter lora.gguf --out peft-adapter

Ranks and scales that differ by module, and rsLoRA, are baked into the numbers where a format
has no place for them. Every tensor is listed with where it went; one that cannot be converted
is an error. With --type keep, tensors of a GGUF base that the adapter does not touch stay byte
for byte. Below 8 bits the output head keeps 6 or more; rows that are not whole blocks of a type
get the next one that fits, as in llama.cpp's quantize.";

/// How a merged model is held against the base with its adapter.
#[derive(Clone, Debug, Default, Args)]
pub struct VerifyArgs {
    /// Measure also where nothing is quantized
    #[arg(long, help_heading = "Verification")]
    pub verify: bool,
    /// Do not measure
    #[arg(long, help_heading = "Verification", conflicts_with_all = ["verify", "verify_data", "max_kl", "accept_drift"])]
    pub no_verify: bool,
    /// Rows to measure on, as --data of eval [a page of mixed text]
    #[arg(long, value_name = "FILE", help_heading = "Verification")]
    pub verify_data: Vec<PathBuf>,
    /// Refuse to write what is further from base + adapter, in nats a token [0.1]
    #[arg(long, value_name = "X", help_heading = "Verification", allow_negative_numbers = true)]
    pub max_kl: Option<f64>,
    /// Write it however far it is
    #[arg(long, help_heading = "Verification")]
    pub accept_drift: bool,
}
