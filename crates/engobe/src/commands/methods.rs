//! `engobe methods`

use crate::Usage;
use crate::args::MethodsArgs;
use crate::terminal::{print, print_json};
use anyhow::{Result, bail};
use engobe_adapters::Method;
use engobe_adapters::method::{METHODS, find};
use serde_json::{Value, json};

/// Tells of the methods, or of the settings of one.
pub fn run(args: &MethodsArgs) -> Result<()> {
    let shown: Vec<&dyn Method> = match &args.method {
        None => METHODS.to_vec(),
        Some(name) => match find(name) {
            Some(method) => vec![method],
            None => {
                let known: Vec<&str> = METHODS.iter().map(|m| m.name()).collect();
                bail!(Usage(format!("{name}: no such method; there are {}", known.join(", "))));
            }
        },
    };
    if args.common.json {
        return print_json(&shown.iter().map(|m| to_json(*m)).collect());
    }
    let mut text = String::new();
    for method in &shown {
        text += &format!("{:<18}{}\n", method.name(), method.card().about);
    }
    if let (Some(_), Some(method)) = (&args.method, shown.first()) {
        text += &settings(*method);
    } else {
        text += "\n`engobe methods NAME` shows the settings of one; qlora is lora over a base quantized to NF4.\n";
    }
    print(&text)
}

fn settings(method: &dyn Method) -> String {
    let flag = |name: &str| format!("--{}", name.replace('_', "-"));
    let wide = method.settings().iter().map(|s| s.name.len() + 2).max().unwrap_or(0);
    let line = |s: &engobe_adapters::method::Setting| format!("  {:<wide$}  {}\n", flag(s.name), s.help);
    let rate = method.card().learning_rate.map_or_else(String::new, |rate| {
        format!("  {:<wide$}  the usual peak is {rate} here\n", "--learning-rate")
    });
    method.settings().iter().map(line).collect::<String>() + &rate
}

fn to_json(method: &dyn Method) -> Value {
    let settings: Vec<Value> =
        method.settings().iter().map(|s| json!({ "name": s.name, "help": s.help })).collect();
    json!({
        "name": method.name(),
        "about": method.card().about,
        "peft_type": method.peft_type(),
        "learning_rate": method.card().learning_rate,
        "settings": settings,
    })
}
