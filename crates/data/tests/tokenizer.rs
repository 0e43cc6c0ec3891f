//! Token ids are those of llama.cpp and of Hugging Face's tokenizers.

use engobe_data::TextTokenizer;
use engobe_data::tokenizer::gguf::GgufTokenizer;
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize, Clone)]
struct Vocabulary {
    model: String,
    tokens: Vec<String>,
    token_types: Vec<i32>,
    merges: Option<Vec<String>>,
    scores: Option<Vec<f32>>,
    bos: u32,
    eos: u32,
    unk: Option<u32>,
}

#[derive(Deserialize)]
struct Run {
    model: String,
    pre: Option<String>,
    ids: Vec<Vec<u32>>,
    a_with_special: Vec<u32>,
}

#[derive(Deserialize)]
struct Golden {
    texts: Vec<String>,
    vocabularies: Vec<Vocabulary>,
    runs: Vec<Run>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/tokenizers.json")).unwrap()
}

fn metadata(vocabulary: &Vocabulary, pre: Option<&str>) -> GgufTokenizer {
    let v = vocabulary.clone();
    GgufTokenizer {
        model: v.model,
        pre: pre.map(str::to_owned),
        tokens: v.tokens,
        token_types: v.token_types,
        merges: v.merges.unwrap_or_default(),
        scores: v.scores,
        bos: Some(v.bos),
        eos: Some(v.eos),
        unk: v.unk,
        ..Default::default()
    }
}

fn hf_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/hf")
}

#[test]
fn gguf_ids_are_those_of_llama_cpp() {
    let golden = golden();
    assert_eq!(golden.runs.len(), 9);
    for run in &golden.runs {
        let vocabulary = golden.vocabularies.iter().find(|v| v.model == run.model).unwrap();
        let tokenizer =
            TextTokenizer::from_gguf(metadata(vocabulary, run.pre.as_deref()), "test.gguf").unwrap();
        for (text, want) in golden.texts.iter().zip(&run.ids) {
            assert_eq!(
                &tokenizer.encode(text, false).unwrap(),
                want,
                "{:?} {:?} {text:?}",
                run.model,
                run.pre
            );
            let back = tokenizer.decode(want, false).unwrap();
            // SentencePiece puts a space before each stretch of text; the decoder takes only the first one away
            let back = if run.model == "llama" { back.replace(' ', "") } else { back };
            let text = if run.model == "llama" { text.replace(' ', "") } else { text.clone() };
            assert_eq!(back, text, "{:?}", run.pre);
        }
        assert_eq!(tokenizer.encode("a", true).unwrap(), run.a_with_special, "{:?}", run.pre);
        assert_eq!(tokenizer.vocab_size(), vocabulary.tokens.len());
    }
}

#[test]
fn streamed_text_is_the_decoded_text_in_whole_characters() {
    let golden = golden();
    for run in &golden.runs {
        let vocabulary = golden.vocabularies.iter().find(|v| v.model == run.model).unwrap();
        let tokenizer =
            TextTokenizer::from_gguf(metadata(vocabulary, run.pre.as_deref()), "test.gguf").unwrap();
        for ids in &run.ids {
            let mut stream = tokenizer.decode_stream(false);
            let mut text = String::new();
            for &id in ids {
                if let Some(piece) = stream.push(id).unwrap() {
                    assert!(!piece.contains('\u{fffd}'), "{piece:?}");
                    text += &piece;
                }
            }
            assert_eq!(stream.finish().unwrap(), None);
            assert_eq!(text, tokenizer.decode(ids, false).unwrap());
        }
    }
    // the first two bytes of 🦙 and then the end
    let v = &golden.vocabularies[0];
    let tokenizer = TextTokenizer::from_gguf(metadata(v, Some("gpt-2")), "test.gguf").unwrap();
    let llama = tokenizer.encode("🦙", false).unwrap();
    let mut stream = tokenizer.decode_stream(false);
    assert_eq!(stream.push(llama[0]).unwrap(), None);
    assert_eq!(stream.finish().unwrap().as_deref(), Some("\u{fffd}"));
}

#[test]
fn token_bytes_put_together_are_the_text() {
    let golden = golden();
    for run in golden.runs.iter().filter(|run| run.model == "gpt2") {
        let tokenizer =
            TextTokenizer::from_gguf(metadata(&golden.vocabularies[0], run.pre.as_deref()), "t").unwrap();
        for (text, ids) in golden.texts.iter().zip(&run.ids) {
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap()).collect();
            assert_eq!(bytes, text.as_bytes());
        }
    }
}

#[derive(Deserialize)]
struct Plain {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

#[test]
fn a_hugging_face_directory_gives_the_ids_of_transformers() {
    #[derive(Deserialize)]
    struct Golden {
        plain: Vec<Plain>,
    }
    let golden: Golden =
        serde_json::from_str(&std::fs::read_to_string(hf_dir().join("golden.json")).unwrap()).unwrap();
    let tokenizer = TextTokenizer::from_hf_dir(&hf_dir()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()), (Some(0), Some(2), true));
    assert_eq!(tokenizer.end_ids(), [2, 0]);
    assert!(golden.plain.len() > 30);
    for Plain { text, ids, decoded } in golden.plain {
        // transformers obeys the truncation to 5 that the file asks for only when it is asked to truncate
        assert_eq!(tokenizer.encode(&text, true).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), decoded);
    }
    assert!(tokenizer.chat_template().unwrap().contains("generation"));
    // BOS that stands in the text already is not doubled
    assert_eq!(tokenizer.encode("<|endoftext|>a", true).unwrap(), tokenizer.encode("a", true).unwrap());
}

#[test]
fn offsets_cover_the_text_with_its_whitespace() {
    let tokenizer = TextTokenizer::from_hf_dir(&hf_dir()).unwrap();
    let text = " a  b <|im_end|>\n 🦙 ";
    let (ids, offsets) = tokenizer.encode_with_offsets(text).unwrap();
    assert_eq!(ids.len(), offsets.len());
    let mut at = 0;
    for offset in offsets {
        // the bytes of an emoji share its range
        assert!(offset.start == at || text[offset.clone()] == *"🦙", "{offset:?} after {at}");
        at = offset.end;
    }
    assert_eq!(at, text.len());
}

#[track_caller]
fn refused(change: impl FnOnce(&mut GgufTokenizer), names: &str) {
    let mut meta = metadata(&golden().vocabularies[0], Some("gpt-2"));
    change(&mut meta);
    let error = TextTokenizer::from_gguf(meta, "bad.gguf").unwrap_err().to_string();
    assert!(error.starts_with("tokenizer bad.gguf: ") && error.contains(names), "{error}");
}

#[test]
fn bad_metadata_is_refused_by_name() {
    refused(|m| m.tokens.clear(), "tokens is empty");
    refused(|m| m.token_types.truncate(3), "token_type has 3 entries");
    refused(|m| m.scores = Some(vec![0.0]), "scores has 1 entries");
    refused(|m| m.eos = Some(100_000), "eos_token_id is 100000");
    refused(|m| m.tokens[7] = m.tokens[8].clone(), "at id 7 and at id 8");
    refused(|m| m.model = "bert".into(), "\"bert\" is not supported");
    refused(|m| m.pre = Some("smolm".into()), "\"smolm\" is not known");
    refused(|m| m.merges[2] = "nospace".into(), "merges[2] is \"nospace\"");
    refused(|m| m.merges[2] = "q zzzz".into(), "merges[2] is \"q zzzz\"");
    refused(|m| m.model = "llama".into(), "scores is missing");
    let missing = TextTokenizer::from_hf_dir(Path::new("/nowhere/at/all")).unwrap_err().to_string();
    assert!(missing.starts_with("/nowhere/at/all/tokenizer.json: "), "{missing}");
}

/// What is written into a GGUF file is what was read from one.
#[test]
fn gguf_metadata_goes_there_and_back() {
    let golden = golden();
    let mut seen = 0;
    for run in &golden.runs {
        let vocabulary = golden.vocabularies.iter().find(|v| v.model == run.model).unwrap();
        let meta = metadata(vocabulary, run.pre.as_deref());
        let tokenizer = TextTokenizer::from_gguf(meta.clone(), "test.gguf").unwrap();
        let rows = meta.tokens.len() + 2;
        let back = tokenizer.to_gguf(rows).unwrap();
        assert_eq!(back.pre.as_deref(), run.pre.as_deref().or(Some("default")));
        assert_eq!((back.model, back.merges), (meta.model, meta.merges));
        assert_eq!((back.bos, back.eos, back.unk), (meta.bos, meta.eos, meta.unk));
        assert_eq!(back.tokens[..rows - 2], meta.tokens);
        assert_eq!(back.token_types[..rows - 2], meta.token_types);
        // rows of the embedding beyond the vocabulary
        assert_eq!(back.tokens[rows - 1], format!("[PAD{}]", rows - 1));
        assert_eq!(back.token_types[rows - 1], 5);
        let short = tokenizer.to_gguf(rows - 3).unwrap_err().to_string();
        assert!(short.contains("embedding only"), "{short}");
        seen += 1;
    }
    assert_eq!(seen, 9);
}

/// A directory as transformers writes it, changed, as GGUF metadata.
fn from_hf(change: impl FnOnce(&mut serde_json::Value)) -> Result<GgufTokenizer, String> {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(hf_dir().join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    let tokenizer = TextTokenizer::from_hf_dir(dir.path()).map_err(|e| e.to_string())?;
    tokenizer.to_gguf(512).map_err(|e| e.to_string())
}

#[test]
fn splittings_of_tokenizer_json_are_recognised() {
    let byte_level = |regex: bool| serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let digits = serde_json::json!({"type": "Digits", "individual_digits": true});
    let sequence =
        |steps: Vec<serde_json::Value>| serde_json::json!({"type": "Sequence", "pretokenizers": steps});
    let of = |pre: serde_json::Value, ignore_merges: bool| {
        from_hf(|json| {
            json["pre_tokenizer"] = pre;
            json["model"]["ignore_merges"] = ignore_merges.into();
        })
    };
    assert_eq!(from_hf(|_| ()).unwrap().pre.as_deref(), Some("llama-bpe"));
    assert_eq!(of(byte_level(true), false).unwrap().pre.as_deref(), Some("gpt-2"));
    let smollm = of(sequence(vec![digits.clone(), byte_level(true)]), false).unwrap();
    assert_eq!(smollm.pre.as_deref(), Some("smollm"));
    assert_eq!(
        (smollm.bos, smollm.eos, smollm.add_bos, smollm.add_eos),
        (Some(0), Some(2), Some(true), Some(false))
    );
    assert!(smollm.chat_template.unwrap().contains("im_start"));
    assert_eq!(smollm.tool_template.as_deref(), Some("tools!"));
    // the same expression with another treatment of whole pieces is another kind
    let llama3 = from_hf(|json| json["model"]["ignore_merges"] = false.into()).unwrap();
    assert_eq!(llama3.pre.as_deref(), Some("dbrx"));
    for (pre, part) in [
        (
            sequence(vec![digits, byte_level(false)]),
            "known are SentencePiece BPE and the splittings smollm, llama-bpe",
        ),
        (serde_json::json!({"type": "Whitespace"}), "Whitespace"),
        (
            serde_json::json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            "add_prefix_space",
        ),
    ] {
        let error = of(pre, false).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    let lower = from_hf(|json| json["normalizer"] = serde_json::json!({"type": "Lowercase"})).unwrap_err();
    assert!(lower.contains("Lowercase"), "{lower}");
}

/// A SentencePiece tokenizer whose merges no scores can put into order is found out, not written.
#[test]
fn what_gguf_cannot_express_is_refused() {
    let golden = golden();
    let vocabulary = golden.vocabularies.iter().find(|v| v.model == "llama").unwrap();
    let tokenizer = TextTokenizer::from_gguf(metadata(vocabulary, None), "test.gguf").unwrap();
    let dir = tempfile::tempdir().unwrap();
    tokenizer.save(dir.path()).unwrap();
    let read = || TextTokenizer::from_hf_dir(dir.path()).unwrap();
    let written = read().to_gguf(vocabulary.tokens.len()).unwrap();
    assert_eq!(written.model, "llama");
    let again = TextTokenizer::from_gguf(written, "again.gguf").unwrap();
    for text in &golden.texts {
        assert_eq!(again.encode(text, false).unwrap(), tokenizer.encode(text, false).unwrap(), "{text:?}");
    }
    // only half of the merges, as another trainer might leave them
    let path = dir.path().join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let merges = json["model"]["merges"].as_array_mut().unwrap();
    let half: Vec<_> = merges.iter().step_by(2).cloned().collect();
    *merges = half;
    std::fs::write(&path, json.to_string()).unwrap();
    let error = read().to_gguf(vocabulary.tokens.len()).unwrap_err().to_string();
    assert!(error.contains("GGUF cannot express it"), "{error}");
}
