//! Tensor names of GGUF files (`gguf-py`'s `tensor_mapping.py`) and Hugging Face's.

/// Pairs within a block: Hugging Face's, GGUF's.
const IN_BLOCK: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Pairs outside blocks.
const OUTSIDE: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// GGUF's name of a LLaMA tensor; `None` if it has none.
pub fn from_hf(name: &str) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    if let Some((_, gguf)) = OUTSIDE.iter().find(|(hf, _)| *hf == module) {
        return Some(format!("{gguf}.{kind}"));
    }
    let (index, rest) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, gguf) = IN_BLOCK.iter().find(|(hf, _)| *hf == rest)?;
    Some(format!("blk.{index}.{gguf}.{kind}"))
}

/// Hugging Face's name of a LLaMA tensor; `None` if it has none.
pub fn to_hf(name: &str) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    if let Some((hf, _)) = OUTSIDE.iter().find(|(_, gguf)| *gguf == module) {
        return Some(format!("{hf}.{kind}"));
    }
    let (index, rest) = module.strip_prefix("blk.")?.split_once('.')?;
    let (hf, _) = IN_BLOCK.iter().find(|(_, gguf)| *gguf == rest)?;
    Some(format!("model.layers.{index}.{hf}.{kind}"))
}

/// Number of heads by which llama.cpp's converter reorders the rows of a LLaMA tensor (Hugging Face's name), if it
/// does: those of q and k, weights and biases.
pub fn permuted_heads(name: &str, heads: usize, kv_heads: usize) -> Option<usize> {
    let is = |part: &str| name.contains(part);
    is(".self_attn.q_proj.").then_some(heads).or(is(".self_attn.k_proj.").then_some(kv_heads))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        for (hf, gguf) in [
            ("model.layers.12.self_attn.q_proj.weight", "blk.12.attn_q.weight"),
            ("model.layers.0.mlp.down_proj.bias", "blk.0.ffn_down.bias"),
            ("lm_head.weight", "output.weight"),
            ("model.norm.weight", "output_norm.weight"),
        ] {
            assert_eq!(from_hf(hf).as_deref(), Some(gguf));
            assert_eq!(to_hf(gguf).as_deref(), Some(hf));
        }
        assert_eq!(from_hf("model.layers.0.unknown.weight"), None);
        assert_eq!(to_hf("rope_freqs.weight"), None);
    }
}
