//! `engobe generate`

use crate::Usage;
use crate::args::GenerateArgs;
use crate::tasks::{self, seq2seq::Answerer};
use crate::terminal::{Note, print, print_json, say, since_start};
use crate::workbench::{self, Bench};
use anyhow::{Context, Result, bail};
use engobe_data::template::message;
use engobe_data::{ChatTemplate, TextTokenizer};
use engobe_infer::{
    Activations, Generated, Generator, Sampler, Sampling, StopReason, StopStrings, generate_from,
};
use engobe_nn::{ModelInfo, Seq2Seq};
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;

/// Continues a prompt, or talks.
pub fn run(args: &GenerateArgs) -> Result<()> {
    if args.prompt.is_none() && args.prompt_ids.is_empty() && !args.chat {
        bail!(Usage("--prompt is missing: text to continue (or --chat for a dialogue)".to_string()));
    }
    if args.common.json && args.prompt.is_none() && args.prompt_ids.is_empty() {
        bail!(Usage("--json needs a --prompt: a dialogue prints text".to_string()));
    }
    let mut sampler = Sampler::new(sampling(args))
        .map_err(|e| Usage(format!("--{}", e.to_string().replacen('_', "-", 1))))?;
    let mut note = Note::new(&args.common);
    workbench::set_threads(args.model.threads)?;
    let path = workbench::resolve(&args.model.model, &args.common, &mut note)?;
    if tasks::is_seq2seq(&path) {
        return answer(args, &path, &mut sampler, &mut note);
    }
    let mut bench = Bench::open_at(&path, &args.model)?;
    workbench::set_chat_template(bench.tokenizer.as_mut(), args.chat_template.as_deref())?;
    let speaker = Speaker::Decoder { bench: &bench, generator: None };
    let mut talk = Talk { args, tokenizer: bench.tokenizer.as_ref(), end: bench.end_ids()?, speaker };
    if !args.prompt_ids.is_empty() {
        return talk.finish(args.prompt_ids.clone(), &mut sampler, &mut note);
    }
    let tokenizer = bench.need_tokenizer()?;
    match (&args.prompt, args.chat) {
        (Some(prompt), false) => talk.finish(tokenizer.encode(prompt, true)?, &mut sampler, &mut note),
        (Some(prompt), true) => {
            let ids = chat_ids(tokenizer, &template(tokenizer)?, &talk.opening(prompt))?;
            talk.finish(ids, &mut sampler, &mut note)
        }
        (None, _) => talk.dialogue(tokenizer, &mut sampler),
    }
}

/// What an encoder-decoder makes of a text.
fn answer(args: &GenerateArgs, path: &Path, sampler: &mut Sampler, note: &mut Note) -> Result<()> {
    if args.chat {
        bail!(Usage("--chat: an encoder-decoder holds no dialogue; give it a --prompt".to_string()));
    }
    let answerer = Answerer::open(path, &args.model)?;
    let activations = workbench::activations(&args.model);
    let speaker = Speaker::EncoderDecoder { model: answerer.model()?, activations };
    let mut talk = Talk { args, tokenizer: answerer.tokenizer(), end: answerer.end_ids()?, speaker };
    let ids = match &args.prompt {
        Some(prompt) => answerer.need_tokenizer()?.encode(prompt, true)?,
        None => args.prompt_ids.clone(),
    };
    talk.finish(ids, sampler, note)
}

fn sampling(args: &GenerateArgs) -> Sampling {
    Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    }
}

fn template(tokenizer: &TextTokenizer) -> Result<ChatTemplate> {
    let none = || {
        format!(
            "{}: the model has no chat template: leave --chat out, or give one with --chat-template",
            tokenizer.origin()
        )
    };
    tokenizer.compile_chat_template()?.with_context(none)
}

/// A conversation as the model expects it, up to where its answer begins.
fn chat_ids(tokenizer: &TextTokenizer, template: &ChatTemplate, messages: &[Value]) -> Result<Vec<u32>> {
    // the template writes the special tokens itself
    Ok(tokenizer.encode(&template.render(messages, None, true)?, false)?)
}

/// A model in conversation.
struct Talk<'a> {
    args: &'a GenerateArgs,
    tokenizer: Option<&'a TextTokenizer>,
    end: Vec<u32>,
    speaker: Speaker<'a>,
}

/// What makes the tokens.
enum Speaker<'a> {
    /// a decoder, with what it has read and said so far
    Decoder { bench: &'a Bench, generator: Option<Generator<'a>> },
    /// an encoder-decoder, which begins anew with each text
    EncoderDecoder { model: &'a dyn Seq2Seq, activations: Activations },
}

impl Speaker<'_> {
    fn info(&self) -> &ModelInfo {
        match self {
            Self::Decoder { bench, .. } => bench.model.info(),
            Self::EncoderDecoder { model, .. } => model.info(),
        }
    }

    fn generate(
        &mut self,
        ids: &[u32],
        most: usize,
        end: &[u32],
        sampler: &mut Sampler,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated> {
        match self {
            Self::Decoder { bench, generator } => {
                if generator.is_none() {
                    let (model, activations) = (bench.model.as_ref(), bench.activations);
                    *generator = Some(Generator::new(model, ids.len() + most, activations)?);
                }
                let Some(generator) = generator else { bail!("no generator") };
                Ok(generator.generate(ids, most, end, sampler, on_token)?)
            }
            Self::EncoderDecoder { model, activations } => {
                Ok(generate_from(*model, ids, most, end, *activations, sampler, on_token)?)
            }
        }
    }
}

/// An answer.
struct Answer {
    text: String,
    generated: Generated,
    /// from the start of the process to the first token
    first_token_seconds: Option<f64>,
}

impl<'a> Talk<'a> {
    /// The first messages.
    fn opening(&self, prompt: &str) -> Vec<Value> {
        let system = self.args.system.iter().map(|s| message("system", s));
        system.chain([message("user", prompt)]).collect()
    }

    /// One continuation, and the end.
    fn finish(&mut self, ids: Vec<u32>, sampler: &mut Sampler, note: &mut Note) -> Result<()> {
        self.check(&ids)?;
        let stream = !self.args.common.json;
        let answer = self.answer(&ids, sampler, stream)?;
        if stream {
            print("\n")?;
            if std::io::stderr().is_terminal() {
                note.line(&speed(ids.len(), &answer.generated));
            }
            return Ok(());
        }
        print_json(&json!({
            "prompt_tokens": ids.len(),
            "token_ids": answer.generated.token_ids,
            "text": answer.text,
            "finish_reason": match answer.generated.reason {
                StopReason::EndToken => "end_token",
                StopReason::Length => "length",
                StopReason::Caller => "stop_string",
            },
            "prompt_seconds": answer.generated.prompt_time.as_secs_f64(),
            "first_token_seconds": answer.first_token_seconds,
            "decode_tokens_per_second": answer.generated.decode_tokens_per_second(),
        }))
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.speaker.info().vocab_size;
        match ids.iter().find(|id| **id as usize >= vocab) {
            Some(id) => bail!("--prompt-ids: {id} is beyond the model's vocabulary of {vocab}"),
            None => Ok(()),
        }
    }

    /// Continues `ids`, showing the text as it comes if it is to be streamed.
    fn answer(&mut self, ids: &[u32], sampler: &mut Sampler, stream: bool) -> Result<Answer> {
        let mut text = String::new();
        let mut stops = StopStrings::new(self.args.stop.iter().cloned());
        let mut decoder = self.tokenizer.map(|t| t.decode_stream(true));
        let mut failed = None;
        let mut first_token_seconds = None;
        let show = |piece: &str, text: &mut String| -> Result<()> {
            text.push_str(piece);
            if stream { print(piece) } else { Ok(()) }
        };
        let mut on_token = |id: u32| -> ControlFlow<()> {
            first_token_seconds.get_or_insert_with(|| since_start().as_secs_f64());
            let Some(decoder) = &mut decoder else {
                // without a tokenizer the ids are all there is to show
                return match show(&format!("{id} "), &mut text) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(e) => stop(&mut failed, e),
                };
            };
            let piece = match decoder.push(id) {
                Ok(piece) => piece.unwrap_or_default(),
                Err(e) => return stop(&mut failed, e.into()),
            };
            let emit = stops.push(&piece);
            match show(&emit.text, &mut text) {
                Ok(()) if !emit.stopped => ControlFlow::Continue(()),
                Ok(()) => ControlFlow::Break(()),
                Err(e) => stop(&mut failed, e),
            }
        };
        let most = self.args.max_new_tokens;
        let mut generated = self.speaker.generate(ids, most, &self.end, sampler, &mut on_token)?;
        if let Some(error) = failed {
            return Err(error);
        }
        if generated.reason != StopReason::Caller {
            let rest = decoder.as_mut().map(|d| d.finish()).transpose()?.flatten().unwrap_or_default();
            let emit = stops.push(&rest);
            show(&emit.text, &mut text)?;
            match emit.stopped {
                true => generated.reason = StopReason::Caller,
                false => show(&stops.finish(), &mut text)?,
            }
        }
        Ok(Answer { text, generated, first_token_seconds })
    }

    /// Reads lines from stdin until they end.
    fn dialogue(&mut self, tokenizer: &TextTokenizer, sampler: &mut Sampler) -> Result<()> {
        let template = template(tokenizer)?;
        let person = std::io::stdin().is_terminal();
        if person {
            say("An empty line or Ctrl-D ends the dialogue.");
        }
        let mut messages: Vec<Value> = Vec::new();
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if person {
                eprint!("> ");
                std::io::stderr().flush()?;
            }
            let Some(line) = lines.next().transpose()? else { break };
            if line.trim().is_empty() {
                break;
            }
            match messages.is_empty() {
                true => messages = self.opening(&line),
                false => messages.push(message("user", &line)),
            }
            let ids = chat_ids(tokenizer, &template, &messages)?;
            let answer = self.answer(&ids, sampler, true)?;
            print("\n")?;
            messages.push(message("assistant", &answer.text));
        }
        Ok(())
    }
}

fn stop(failed: &mut Option<anyhow::Error>, error: anyhow::Error) -> ControlFlow<()> {
    *failed = Some(error);
    ControlFlow::Break(())
}

fn speed(prompt_tokens: usize, generated: &Generated) -> String {
    let prompt = prompt_tokens as f64 / generated.prompt_time.as_secs_f64().max(1e-9);
    let decode =
        generated.decode_tokens_per_second().map_or(String::new(), |r| format!(", then {r:.0} tokens/s"));
    format!("prompt of {prompt_tokens} tokens at {prompt:.0} tokens/s{decode}")
}
