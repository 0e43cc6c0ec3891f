//! `engobe convert`, and how merged models are verified.

use super::Common;
use clap::Args;
use std::path::PathBuf;

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
