//! Chat templates render as transformers renders them, and the assistant's turns are found in the text.

use engobe_data::ChatTemplate;
use engobe_data::template::{Rendered, SpanKind};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

#[derive(Deserialize)]
struct Case {
    template: String,
    name: String,
    messages: Vec<Value>,
    tools: Option<Value>,
    prompt: bool,
    text: Option<String>,
    generation: Option<Vec<(usize, usize)>>,
}

fn source(name: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/chat_templates");
    std::fs::read_to_string(root.join(format!("{name}.jinja"))).unwrap()
}

fn template(name: &str) -> ChatTemplate {
    ChatTemplate::new(&source(name), Some("<s>"), Some("</s>")).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn cases() -> Vec<Case> {
    serde_json::from_str(include_str!("golden/chat_templates.json")).unwrap()
}

#[test]
fn texts_are_those_of_transformers() {
    let cases = cases();
    assert!(cases.len() > 200);
    let mut wrong = Vec::new();
    for case in cases {
        let got = template(&case.template).render(&case.messages, case.tools.as_ref(), case.prompt);
        let same = match (&got, &case.text) {
            (Ok(got), Some(text)) => got == text,
            (Err(_), None) => true,
            _ => false,
        };
        if !same {
            let Case { template, name, prompt, text, .. } = case;
            wrong.push(format!("{template} / {name} / {prompt}:\n  got  {got:?}\n  want {text:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn generation_blocks_are_where_transformers_sees_them() {
    let mut seen = 0;
    for case in cases().into_iter().filter(|c| !c.prompt) {
        let (Some(ranges), Some(text)) = (case.generation, case.text) else { continue };
        let rendered = template(&case.template).render_with_spans(&case.messages, None).unwrap();
        // transformers counts characters
        let chars = |at: usize| text[..at].chars().count();
        let got: Vec<_> = rendered.spans.iter().map(|s| (chars(s.range.start), chars(s.range.end))).collect();
        assert_eq!(got, ranges, "{}", case.name);
        assert_eq!(rendered.text, text);
        seen += 1;
    }
    assert!(seen >= 9);
}

fn spoken(rendered: &Rendered) -> Vec<(usize, &str, bool)> {
    rendered
        .spans
        .iter()
        .map(|s| (s.message, &rendered.text[s.range.clone()], s.kind != SpanKind::Content))
        .collect()
}

fn turns() -> Vec<Value> {
    use engobe_data::template::message as m;
    vec![m("user", "One?"), m("assistant", "1"), m("user", "Two?"), m("assistant", "2")]
}

#[track_caller]
fn check_turns(name: &str, messages: &[Value], want: &[(usize, &str, bool)]) {
    let rendered = template(name).render_with_spans(messages, None).unwrap();
    assert_eq!(spoken(&rendered), want, "{name}");
}

#[test]
fn turns_are_found_without_generation_blocks() {
    let turns = turns();
    for name in ["smollm2", "chatml", "qwen25", "generation"] {
        let end = if name == "generation" { "<|im_end|>" } else { "<|im_end|>\n" };
        let (one, two) = (format!("1{end}"), format!("2{end}"));
        check_turns(name, &turns, &[(1, &one, true), (3, &two, true)]);
    }
    check_turns("llama3", &turns, &[(1, "1<|eot_id|>", true), (3, "2<|eot_id|>", true)]);
    check_turns("gemma", &turns, &[(1, "1<end_of_turn>\n", true), (3, "2<end_of_turn>\n", true)]);
    check_turns("mistral", &turns, &[(1, " 1</s>", true), (3, " 2</s>", true)]);
    // the prompt ends with the header, the newline after it is the model's to say
    check_turns("zephyr", &turns, &[(1, "1</s>\n", true), (3, "2</s>\n", true)]);
    // only the last turn is followed by EOS, so the first is found by its content
    check_turns("phi3", &turns, &[(1, "1", false), (3, "2<|end|>\n</s>", true)]);
}

#[test]
fn turns_are_found_where_the_beginning_changes() {
    use engobe_data::template::message as m;
    // the system prompt stands at the last user turn: with the answer, at none
    let mut chat = vec![m("system", "S")];
    chat.extend(turns());
    check_turns("mistral", &chat, &[(2, "1</s>", true), (4, "2", false)]);
    // thoughts of the first turn are dropped, those of the last one stay and are learned
    let chat = [
        m("user", "a"),
        m("assistant", "<think>x</think>b"),
        m("user", "c"),
        m("assistant", "<think>y</think>d"),
    ];
    check_turns("thinking", &chat, &[(1, "b", false), (3, "<think>\ny\n</think>\n\nd<|im_end|>\n", true)]);
}

#[test]
fn turns_are_found_in_any_order() {
    let backwards = "{% for m in messages[::-1] %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}";
    let rendered =
        ChatTemplate::new(backwards, None, None).unwrap().render_with_spans(&turns(), None).unwrap();
    assert_eq!(spoken(&rendered), [(1, "1", false), (3, "2", false)]);
}

#[test]
fn a_turn_that_cannot_be_found_is_an_error_that_says_what_to_do() {
    let backwards = "{% for m in messages[::-1] %}{{ m.role }}: {{ m.content | length }}\n{% endfor %}";
    let template = ChatTemplate::new(backwards, None, None).unwrap();
    let error = template.render_with_spans(&turns(), None).unwrap_err().to_string();
    assert!(error.contains("message 2") && error.contains("{% generation %}"), "{error}");
}

#[test]
fn a_template_that_raises_says_its_message_and_line() {
    let template =
        ChatTemplate::new("a\n{% if true %}\n{{ raise_exception('No ' ~ 'system') }}{% endif %}", None, None)
            .unwrap();
    let error = template.render(&turns(), None, false).unwrap_err().to_string();
    assert_eq!(error, "chat template line 3: No system");
    let error = ChatTemplate::new("a\n{% if %}", None, None).unwrap_err().to_string();
    assert!(error.starts_with("chat template line 2: syntax error"), "{error}");
}

#[test]
fn dates_can_be_fixed() {
    let mut template = ChatTemplate::new("{{ strftime_now('%d %b %Y') }}", None, None).unwrap();
    assert!(template.uses_date());
    template.fix_date("2026-01-31").unwrap();
    assert_eq!(template.render(&turns(), None, false).unwrap(), "31 Jan 2026");
    assert!(template.fix_date("31.1.2026").is_err());
    let bad = ChatTemplate::new("{{ strftime_now('%!') }}", None, None).unwrap();
    assert!(bad.render(&turns(), None, false).is_err());
}
