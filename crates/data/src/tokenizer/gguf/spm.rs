//! SentencePiece BPE: scores instead of merges, bytes as a last resort.

use super::{GgufTokenizer, Vocabulary};
use tokenizers::Tokenizer;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Sequence as Normalizers};

pub(super) fn tokenizer(meta: &GgufTokenizer, vocab: Vocabulary) -> Result<Tokenizer, String> {
    let Some(scores) = &meta.scores else {
        return Err("tokenizer.ggml.scores is missing; a \"llama\" tokenizer merges by them".into());
    };
    if let Some(id) = scores.iter().position(|s| s.is_nan()) {
        return Err(format!("tokenizer.ggml.scores[{id}] is not a number"));
    }
    let merges = merges(meta, scores, &vocab);
    let mut model = BPE::builder().vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges);
    model = model.byte_fallback(true).fuse_unk(true);
    if let Some(unk) = meta.unk {
        model = model.unk_token(meta.tokens[unk as usize].clone());
    }
    let mut tokenizer = Tokenizer::new(model.build().map_err(|e| e.to_string())?);

    let space_first = meta.add_space_prefix.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if space_first {
        // before every stretch of text between added tokens, as llama.cpp and HF's `legacy` tokenizer do it
        normalizers.push(Prepend::new("\u{2581}".into()).into());
    }
    normalizers.push(Replace::new(" ", "\u{2581}").map_err(|e| e.to_string())?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers)));

    let mut decoders: Vec<DecoderWrapper> = vec![
        Replace::new("\u{2581}", " ").map_err(|e| e.to_string())?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if space_first {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// Every way to cut a token into two tokens is a merge, and tokens of a higher score are merged first.
/// SentencePiece (and llama.cpp) look for the neighbours whose sum has the highest score; a merge list sorted by
/// the score of the sum, then by the longer halves, makes the same choices (HF's `SentencePieceExtractor`).
fn merges(meta: &GgufTokenizer, scores: &[f32], vocab: &Vocabulary) -> Vec<(String, String)> {
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    for (token, &score) in meta.tokens.iter().zip(scores) {
        let mut local: Vec<(u32, u32, &str, &str)> = Vec::new();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (vocab.get(left), vocab.get(right)) {
                local.push((l, r, left, right));
            }
        }
        local.sort_unstable();
        merges.extend(local.into_iter().map(|(_, _, left, right)| (score, left, right)));
    }
    let chars = |s: &str| s.chars().count();
    merges.sort_by(|a, b| {
        b.0.total_cmp(&a.0).then(chars(b.1).cmp(&chars(a.1))).then(chars(b.2).cmp(&chars(a.2)))
    });
    merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect()
}
