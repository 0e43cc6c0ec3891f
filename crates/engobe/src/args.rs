//! What can be typed. What it means is decided in the commands.

mod conversion;
mod embed;
mod settings;

pub use conversion::{ConvertArgs, MergeArgs, QuantizeArgs, VerifyArgs};
pub use embed::EmbedArgs;
pub use settings::SettingArgs;

use clap::{Arg, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

/// Fine-tune language models with small adapters: one binary, no Python.
#[derive(Debug, Parser)]
#[command(name = "engobe", version, max_term_width = 110, after_help = START)]
pub struct Cli {
    /// what to do
    #[command(subcommand)]
    pub command: Task,
}

const START: &str = "\
Start here:
  engobe demo                                         see a real model learn something, in minutes
  engobe train --model smollm2-135m --data rows.jsonl --out my-adapter
  engobe generate --model smollm2-135m --adapter my-adapter --prompt \"Once upon a time\"

MODEL is a Hugging Face directory, a .gguf file, a hub id (org/name), or a known name (smollm2-135m).";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Train a small real model on a small real skill, and see the difference
    Demo(DemoArgs),
    /// Download a known model into the cache
    Fetch(FetchArgs),
    /// The methods, and the settings of one
    Methods(MethodsArgs),
    /// Train several methods under one budget, over one load of the base, and compare them
    #[command(after_help = COMPARE_EXAMPLES)]
    Compare(Box<CompareArgs>),
    /// What a run would take in memory, and which settings would fit a limit
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(Box<TrainArgs>),
    /// Train an adapter on your rows
    Train(Box<TrainArgs>),
    /// Loss and scores on rows, and predictions
    Eval(EvalArgs),
    /// Vectors of texts, from an encoder
    Embed(EmbedArgs),
    /// Continue a prompt, or hold a dialogue
    Generate(GenerateArgs),
    /// Bake an adapter into its model: a new Hugging Face directory or GGUF file
    Merge(MergeArgs),
    /// Quantize a model as bitsandbytes does: a new Hugging Face directory
    Quantize(QuantizeArgs),
    /// Turn adapters and models into other formats: GGUF for llama.cpp, mlx-lm, PEFT
    Convert(ConvertArgs),
    /// What is in a model, adapter, checkpoint or GGUF file
    Inspect(InspectArgs),
    /// Check rows as training would, before training
    Lint(LintArgs),
}

/// Flags that most commands share.
#[derive(Clone, Debug, Default, Args)]
pub struct Common {
    /// Print one JSON object as the last line of stdout
    #[arg(long, help_heading = "Common")]
    pub json: bool,
    /// No progress and no remarks on stderr
    #[arg(long, short, help_heading = "Common")]
    pub quiet: bool,
    /// Never contact the hub or a package index
    #[arg(long, help_heading = "Common")]
    pub offline: bool,
    /// Where fetched models are kept [$ENGOBE_CACHE, or the system's]
    #[arg(long, value_name = "DIR", help_heading = "Common")]
    pub cache_dir: Option<PathBuf>,
}

/// Which model, and how it is held.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// Hugging Face directory, .gguf file, hub id, or known name
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// PEFT directory, or name=DIR
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<String>,
    /// How base weights are kept: stored, f32, bf16, f16 (arithmetic is f32)
    #[arg(long, value_name = "DTYPE", default_value = "stored")]
    pub dtype: String,
    /// Quantize linear layers as they are read: nf4, fp4, int8
    #[arg(long, value_name = "TYPE")]
    pub quantize: Option<String>,
    /// Quantize the factors of 4-bit blocks too
    #[arg(long)]
    pub double_quant: bool,
    /// Elements in a 4-bit block: 32 to 4096, a power of two [default: 64]
    #[arg(long, value_name = "N")]
    pub quant_block_size: Option<usize>,
    /// cpu, cuda, `cuda:N` or metal
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// Threads [all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// When generating over quantized weights, keep activations in f32 instead of rounding them to 8 bits per
    /// block as llama.cpp does: slower, a little more exact
    #[arg(long)]
    pub exact_activations: bool,
}

/// How rows become tokens.
#[derive(Clone, Debug, Args)]
pub struct RowArgs {
    /// JSONL, JSON, CSV, TSV or Parquet file, or a directory of them
    #[arg(long, value_name = "FILE", required = true)]
    pub data: Vec<PathBuf>,
    /// Labels: completions, all, last
    #[arg(long, value_name = "WHAT", default_value = "completions")]
    pub train_on: String,
    /// Prompts as chat turns or plain text: auto, chat, plain
    #[arg(long, value_name = "STYLE", default_value = "auto")]
    pub template: String,
    /// Chat template: a Jinja file, or chatml [the model's own]
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<String>,
}

/// `engobe demo`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  engobe demo --out my-demo")]
pub struct DemoArgs {
    /// Directory for the rows, the adapter and the report
    #[arg(long, value_name = "DIR", default_value = "engobe-demo")]
    pub out: PathBuf,
    /// Seed of the rows and the training
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Optimizer steps
    #[arg(long, value_name = "N")]
    pub max_steps: Option<usize>,
    /// Threads [all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `engobe fetch`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  engobe fetch smollm2-135m")]
pub struct FetchArgs {
    /// smollm2-135m, or a hub id (org/name)
    #[arg(value_name = "MODEL")]
    pub model: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `engobe train`
#[derive(Debug, Args)]
#[command(after_help = TRAIN_EXAMPLES)]
pub struct TrainArgs {
    /// Go on from OUT's newest checkpoint; from the start if there is none
    #[arg(long)]
    pub resume: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub settings: SettingArgs,
}

/// `engobe methods`
#[derive(Debug, Args)]
pub struct MethodsArgs {
    /// The method whose settings to show
    pub method: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

const COMPARE_EXAMPLES: &str = "\
The base is loaded once; methods are attached to it, trained and taken away again one after the
other. All see the rows in the same order for the same number of steps (a prompt's rows count in
what a step takes); --only gives one of them settings of its own. Peak memory is the base's weights and the most that tensors took beside.

Examples:
  engobe compare --model smollm2-135m --methods lora,prefix-tuning --data train.jsonl --out compared
  engobe compare --model smollm2-135m --methods lora,ia3 --data a.jsonl --test-data b.jsonl --out c2
  engobe compare --config c.toml --methods lora,p-tuning --only lora.learning_rate=1e-3 --out c3";

/// `engobe compare`
#[derive(Debug, Args)]
// --methods and the training data say these here; they are refused
#[command(mut_arg("method", |arg| arg.hide(true)), mut_arg("init_adapter", |arg| arg.hide(true)))]
pub struct CompareArgs {
    /// Methods to train, in this order (see --method of train)
    #[arg(long, value_name = "A,B", value_delimiter = ',', required = true)]
    pub methods: Vec<String>,
    /// A setting of one method alone; may be repeated
    #[arg(long, value_name = "METHOD.NAME=VALUE")]
    pub only: Vec<String>,
    /// Rows whose completions are to be matched exactly
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    pub test_data: Vec<PathBuf>,
    /// Most tokens of an answer to a row of --test-data
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    /// Go on with a comparison that was stopped
    #[arg(long)]
    pub resume: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub settings: SettingArgs,
}

const PLAN_EXAMPLES: &str = "\
Takes the flags of train and reads headers alone: a model of which only the config.json is there
will do. What is counted, and how: docs/memory.md.

Examples:
  engobe plan --model smollm2-135m
  engobe plan --model ./Llama-2-13B --r 64 --max-seq-len 2048 --memory-limit 16GB
  engobe plan --model ./config.json --batch-size 8 --optimizer paged_adamw_8bit --json";

const TRAIN_EXAMPLES: &str = "\
Examples:
  engobe train --model smollm2-135m --data rows.jsonl --out my-adapter
  engobe train --model ./Llama-3.2-1B --data chats.jsonl --val-split 0.1 --eval-steps 50 --load-best --out run1
  engobe train --config run1/run.toml --learning-rate 1e-4 --out run2
  engobe train --model smollm2-135m --data rows.jsonl --out my-adapter --resume";

/// `engobe eval`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  engobe eval --model smollm2-135m --adapter my-adapter --data held-out.jsonl --exact-match\n  engobe eval --model ./tiny --data rows.jsonl --json\n  engobe eval --model ./MiniLM --adapter sst2 --data dev.tsv --predictions said.jsonl"
)]
pub struct EvalArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub rows: RowArgs,
    /// Tokens after which a row is cut
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub max_seq_len: usize,
    /// What for: causal-lm, seq2seq-lm, seq-cls, token-cls, regression [the adapter's, or by the model's configuration and the rows]
    #[arg(long, value_name = "TASK")]
    pub task: Option<String>,
    /// Scores to print (default: all): of labels accuracy, f1_macro, matthews, pearson, ...; of completions, which are then
    /// generated greedily, exact_match, bleu, rouge_l
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub metrics: Vec<String>,
    /// Write what the model says of each row, as JSON lines
    #[arg(long, value_name = "FILE")]
    pub predictions: Option<PathBuf>,
    /// Also generate each row's completion greedily and count those that are exactly right
    #[arg(long)]
    pub exact_match: bool,
    /// Most tokens of a completion with --exact-match
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_new_tokens: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `engobe generate`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  engobe generate --model smollm2-135m --prompt \"The sea is\"\n  engobe generate --model smollm2-135m --adapter my-adapter --chat\n  engobe generate --model smollm2-135m --chat --prompt \"Hi!\" --temperature 0.7 --top-p 0.9 --seed 1"
)]
pub struct GenerateArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// Text to continue; with --chat, what the user says
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Token ids to continue, instead of text
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "prompt")]
    pub prompt_ids: Vec<u32>,
    /// Use the model's chat template; without --prompt, hold a dialogue
    #[arg(long)]
    pub chat: bool,
    /// What the system message says, with --chat
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Chat template: a Jinja file, or chatml [the model's own]
    #[arg(long, value_name = "FILE", requires = "chat")]
    pub chat_template: Option<String>,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; higher is more varied
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "Sampling")]
    pub temperature: f32,
    /// Choose among the K likeliest; 0: all
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Sampling")]
    pub top_k: usize,
    /// Choose among the likeliest that together reach P
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Sampling")]
    pub top_p: f32,
    /// Choose among those at least P times as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Sampling")]
    pub min_p: f32,
    /// Above 1: push down what was said already
    #[arg(long, value_name = "X", default_value_t = 1.0, help_heading = "Sampling")]
    pub repetition_penalty: f32,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Sampling")]
    pub seed: u64,
    /// Stop before this text
    #[arg(long, value_name = "TEXT", help_heading = "Sampling", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `engobe inspect`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  engobe inspect smollm2-135m\n  engobe inspect my-adapter --tensors\n  engobe inspect my-adapter --model smollm2-135m"
)]
pub struct InspectArgs {
    /// Model, adapter directory, run directory, checkpoint, .gguf or .safetensors file
    #[arg(value_name = "WHAT")]
    pub what: String,
    /// List every tensor
    #[arg(long)]
    pub tensors: bool,
    /// Count trainable parameters over this base, as PEFT prints them
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `engobe lint`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  engobe lint --model smollm2-135m --data rows.jsonl --show 3")]
pub struct LintArgs {
    /// The model whose tokenizer and template are used
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// What the rows are for; by default what training would take them for
    #[arg(long, value_name = "TASK")]
    pub task: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub rows: RowArgs,
    /// Tokens after which training cuts a row
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_seq_len: usize,
    /// Validation rows, to find training rows among them
    #[arg(long, value_name = "FILE")]
    pub val_data: Vec<PathBuf>,
    /// Findings that are not errors
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    pub allow: Vec<String>,
    /// Print the first N rows' tokens, labels coloured
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub show: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

impl Cli {
    /// The command line. A negative number is a value, never a flag: what is wrong with it is said of the flag before.
    fn description() -> Command {
        let number = |arg: Arg| match arg.get_action().takes_values() && arg.get_long().is_some() {
            true => arg.allow_negative_numbers(true),
            false => arg,
        };
        Self::command().mut_subcommands(|command| command.mut_args(number))
    }

    /// Reads the command line; what is wrong with it is one line and exit status 2.
    pub fn read() -> Result<Self, String> {
        Self::read_from(std::env::args_os()).map_err(|e| {
            use clap::error::ErrorKind::{
                DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion,
            };
            if matches!(e.kind(), DisplayHelp | DisplayVersion) {
                e.exit();
            }
            if e.kind() == DisplayHelpOnMissingArgumentOrSubcommand {
                let _ = e.print();
                std::process::exit(2);
            }
            one_line(&e.to_string())
        })
    }

    fn read_from<T: Into<OsString> + Clone>(args: impl IntoIterator<Item = T>) -> Result<Self, clap::Error> {
        let mut description = Self::description();
        let matches = description.try_get_matches_from_mut(args)?;
        Self::from_arg_matches(&matches).map_err(|e| e.format(&mut description))
    }
}

/// clap's message without its usage block.
fn one_line(message: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for line in message.lines().map(str::trim) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        if !line.is_empty() {
            parts.push(line.trim_start_matches("error: "));
        }
    }
    parts.join(" ").replace("  tip:", ";").replace(" tip:", ";")
}

#[cfg(test)]
mod tests;
