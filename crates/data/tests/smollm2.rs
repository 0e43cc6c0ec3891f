//! SmolLM2's own GGUF, where there is one: `ENGOBE_SMOLLM2_GGUF=path cargo test -p engobe-data`.

use engobe_data::TextTokenizer;
use engobe_data::template::message;
use serde::Deserialize;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Golden {
    texts: Vec<String>,
    ids: Vec<Vec<u32>>,
    a_with_special: Vec<u32>,
}

fn tokenizer() -> Option<TextTokenizer> {
    let Some(path) = std::env::var_os("ENGOBE_SMOLLM2_GGUF") else {
        eprintln!("skipped: ENGOBE_SMOLLM2_GGUF does not name SmolLM2-135M-Instruct.Q4_1.gguf");
        return None;
    };
    let file = engobe_formats::gguf::Gguf::open(&PathBuf::from(path)).unwrap();
    Some(TextTokenizer::from_gguf_file(&file).unwrap())
}

#[test]
fn ids_are_those_of_llama_cpp() {
    let Some(tokenizer) = tokenizer() else { return };
    let golden: Golden = serde_json::from_str(include_str!("golden/smollm2.json")).unwrap();
    assert!(golden.texts.len() > 30);
    for (text, ids) in golden.texts.iter().zip(&golden.ids) {
        assert_eq!(&tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        assert_eq!(&tokenizer.decode(ids, false).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("a", true).unwrap(), golden.a_with_special);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.vocab_size()), (Some(1), Some(2), 49152));
}

#[test]
fn the_template_is_the_one_of_the_golden_texts() {
    let Some(tokenizer) = tokenizer() else { return };
    let root =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/chat_templates/smollm2.jinja");
    assert_eq!(tokenizer.chat_template().unwrap(), std::fs::read_to_string(root).unwrap());
    let template = tokenizer.compile_chat_template().unwrap().unwrap();
    let text = template.render(&[message("user", "Hi")], None, true).unwrap();
    assert!(text.starts_with("<|im_start|>system\nYou are a helpful AI assistant named SmolLM"), "{text}");
}
