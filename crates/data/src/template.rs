//! Chat templates: Jinja2 as transformers runs it, on minijinja.
//!
//! What transformers adds to Jinja2 is here too (`utils/chat_template_utils.py`): `trim_blocks` and `lstrip_blocks`,
//! `{% break %}` and `{% continue %}`, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and
//! `{% generation %}` blocks. Python's string and dict methods come from minijinja-contrib.

mod python;
mod spans;

pub use spans::{Rendered, Span, SpanKind};

use crate::{Error, Result};
use fancy_regex::Regex;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, State};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

type Json = serde_json::Value;

/// A message for a template.
pub fn message(role: &str, content: &str) -> Json {
    serde_json::json!({ "role": role, "content": content })
}

/// ChatML with nothing but the messages, for base models that have no template of their own.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
     + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const NAME: &str = "chat";
const TOOLS_NAME: &str = "tool_use";
const GENERATION: &str = "__generation__";
const MARKS: &str = "__generation_marks__";

/// A compiled chat template and the variables it sees.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Environment<'static>,
    variables: BTreeMap<String, Json>,
    now: Arc<Mutex<Option<chrono::NaiveDateTime>>>,
    has_generation: bool,
    uses_date: bool,
    has_tool_template: bool,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("variables", &self.variables).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles `source`; `bos` and `eos` are what the template sees as `bos_token` and `eos_token`.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self> {
        let now = Arc::new(Mutex::new(None));
        let mut env = environment(now.clone());
        let has_generation = add(&mut env, NAME, source)?;
        let mut template = Self {
            env,
            variables: BTreeMap::new(),
            now,
            has_generation,
            uses_date: source.contains("strftime_now"),
            has_tool_template: false,
        };
        for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
            if let Some(token) = token {
                template.set_variable(name, token);
            }
        }
        Ok(template)
    }

    /// A variable that every rendering sees.
    pub fn set_variable(&mut self, name: &str, value: impl Into<Json>) {
        self.variables.insert(name.to_owned(), value.into());
    }

    /// Another template for conversations with tools.
    pub fn set_tool_template(&mut self, source: &str) -> Result<()> {
        self.has_generation |= add(&mut self.env, TOOLS_NAME, source)?;
        self.uses_date |= source.contains("strftime_now");
        self.has_tool_template = true;
        Ok(())
    }

    /// True if the template prints today's date. A run that shall be resumed needs [`Self::fix_date`]: the
    /// tokens of its rows would change with the day.
    pub fn uses_date(&self) -> bool {
        self.uses_date
    }

    /// True if the template marks the assistant's output itself, with `{% generation %}` blocks.
    pub fn has_generation_blocks(&self) -> bool {
        self.has_generation
    }

    /// Makes `strftime_now` print this date (`2026-01-31`) instead of today's.
    pub fn fix_date(&mut self, date: &str) -> Result<()> {
        let date = chrono::NaiveDate::parse_from_str(date, "%Y-%m-%d")
            .map_err(|e| Error::Options(format!("date {date:?}: {e}; a date is written 2026-01-31")))?;
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = date.and_hms_opt(0, 0, 0);
        Ok(())
    }

    /// Makes `strftime_now` print this moment from now on: the rows of one run, and the renderings of one row that
    /// are compared, must not see time pass.
    pub fn stop_the_clock(&mut self) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        now.get_or_insert_with(|| chrono::Local::now().naive_local());
    }

    /// Today's date in the form that [`Self::fix_date`] takes.
    pub fn today() -> String {
        chrono::Local::now().format("%Y-%m-%d").to_string()
    }

    /// The text of a conversation. `tools` is a list of tool descriptions; with `add_generation_prompt` the text
    /// ends where the assistant's next turn begins.
    pub fn render(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.render_marked(&normalized(messages), tools, add_generation_prompt, None)
    }

    /// Renders; `marks` are put around what `{% generation %}` blocks print.
    fn render_marked(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        add_generation_prompt: bool,
        marks: Option<(&str, &str)>,
    ) -> Result<String> {
        let mut context: BTreeMap<&str, Value> = self
            .variables
            .iter()
            .map(|(name, value)| (name.as_str(), Value::from_serialize(value)))
            .collect();
        context.insert("messages", Value::from_serialize(messages));
        context.insert("tools", tools.map(Value::from_serialize).unwrap_or(Value::from(())));
        context.insert("documents", Value::from(()));
        context.insert("add_generation_prompt", Value::from(add_generation_prompt));
        if let Some((open, close)) = marks {
            context.insert(MARKS, Value::from(vec![open.to_owned(), close.to_owned()]));
        }
        let name = if tools.is_some() && self.has_tool_template { TOOLS_NAME } else { NAME };
        let template = self.env.get_template(name).map_err(|e| explain(&e))?;
        template.render(Value::from_serialize(context)).map_err(|e| explain(&e))
    }
}

/// Messages as transformers hands them to templates: keys without a value are dropped, and reasoning stands under
/// the names that templates read.
fn normalized(messages: &[Json]) -> Vec<Json> {
    let normalize = |message: &Json| {
        let Json::Object(message) = message else { return message.clone() };
        let mut out = serde_json::Map::new();
        let reasoning = ["reasoning_content", "thinking", "reasoning"]
            .iter()
            .find_map(|key| message.get(*key).filter(|v| !v.is_null()));
        if let Some(reasoning) = reasoning {
            out.insert("thinking".into(), reasoning.clone());
        }
        out.extend(message.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())));
        if let Some(reasoning) = reasoning {
            out.insert("reasoning_content".into(), reasoning.clone());
        }
        Json::Object(out)
    };
    messages.iter().map(normalize).collect()
}

/// Jinja2 as transformers sets it up.
fn environment(now: Arc<Mutex<Option<chrono::NaiveDateTime>>>) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(|out, _, value| {
        out.write_str(&python::str_of(value)).map_err(|_| minijinja::Error::from(ErrorKind::WriteFailure))
    });
    env.add_filter("tojson", |value: Value, options: Kwargs| python::tojson(&value, options));
    env.add_filter("string", |value: Value| python::str_of(&value));
    env.add_function("raise_exception", |message: Value| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, python::str_of(&message)))
    });
    env.add_function("strftime_now", move |format: &str| -> Result<String, minijinja::Error> {
        let fixed = *now.lock().unwrap_or_else(PoisonError::into_inner);
        let now = fixed.unwrap_or_else(|| chrono::Local::now().naive_local());
        let mut text = String::new();
        // `to_string` would panic where the format is wrong
        write!(text, "{}", now.format(format)).map_err(|_| {
            minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}"))
        })?;
        Ok(text)
    });
    env.add_function(GENERATION, generation);
    env
}

/// Compiles a template into `env`; true if it has `{% generation %}` blocks. minijinja has no custom tags, but
/// transformers' own tag is a call block too.
fn add(env: &mut Environment<'static>, name: &'static str, source: &str) -> Result<bool> {
    let replace = |source: &str, tag: &str, by: &str| -> String {
        match Regex::new(&format!(r"\{{%([-+]?)\s*{tag}\s*([-+]?)%\}}")) {
            Ok(regex) => regex.replace_all(source, format!("{{%$1 {by} $2%}}")).into_owned(),
            Err(_) => source.to_owned(),
        }
    };
    let begun = replace(source, "generation", &format!("call {GENERATION}()"));
    let has_generation = begun != source;
    let done = replace(&begun, "endgeneration", "endcall");
    env.add_template_owned(name, done).map_err(|e| explain(&e))?;
    Ok(has_generation)
}

/// Body of a `{% generation %}` block, with marks around it where the caller of the template wants them.
fn generation(state: &State, options: Kwargs) -> Result<Value, minijinja::Error> {
    let caller: Value = options.get("caller")?;
    let body = caller.call(state, &[])?;
    let marks = state.lookup(MARKS).filter(|marks| !marks.is_undefined());
    let Some(marks) = marks else { return Ok(body) };
    let mark = |i: usize| marks.get_item_by_index(i);
    Ok(Value::from_safe_string(format!("{}{body}{}", mark(0)?, mark(1)?)))
}

/// minijinja's error with the line, innermost cause first.
fn explain(error: &minijinja::Error) -> Error {
    let mut inner = error;
    while let Some(source) =
        std::error::Error::source(inner).and_then(|e| e.downcast_ref::<minijinja::Error>())
    {
        inner = source;
    }
    let what = match (inner.kind(), inner.detail()) {
        // what the template itself raised
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    Error::Template { line: inner.line().or_else(|| error.line()), what }
}
