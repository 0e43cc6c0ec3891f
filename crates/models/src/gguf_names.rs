//! Tensor names of GGUF files (`gguf-py`'s `tensor_mapping.py`) and Hugging Face's.

/// The names of one architecture's modules: pairs of Hugging Face's and GGUF's.
#[derive(Debug)]
pub struct Names {
    /// what Hugging Face's names of blocks begin with, before the number
    pub block: &'static str,
    /// pairs within a block
    pub in_block: &'static [(&'static str, &'static str)],
    /// pairs outside blocks
    pub outside: &'static [(&'static str, &'static str)],
}

/// Pairs outside blocks of LLaMA and those after it.
pub const OUTSIDE: &[(&str, &str)] =
    &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// LLaMA, and Qwen 2 and 3 (whose heads have norms).
pub const LLAMA: Names = Names {
    block: "model.layers.",
    in_block: &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ],
    outside: OUTSIDE,
};

impl Names {
    /// GGUF's name of a tensor; `None` if it has none.
    pub fn from_hf(&self, name: &str) -> Option<String> {
        let (module, kind) = name.rsplit_once('.')?;
        if let Some((_, gguf)) = self.outside.iter().find(|(hf, _)| *hf == module) {
            return Some(format!("{gguf}.{kind}"));
        }
        let (index, rest) = module.strip_prefix(self.block)?.split_once('.')?;
        let (_, gguf) = self.in_block.iter().find(|(hf, _)| *hf == rest)?;
        Some(format!("blk.{index}.{gguf}.{kind}"))
    }

    /// Hugging Face's name of a tensor; `None` if it has none.
    pub fn to_hf(&self, name: &str) -> Option<String> {
        let (module, kind) = name.rsplit_once('.')?;
        if let Some((hf, _)) = self.outside.iter().find(|(_, gguf)| *gguf == module) {
            return Some(format!("{hf}.{kind}"));
        }
        let (index, rest) = module.strip_prefix("blk.")?.split_once('.')?;
        let (hf, _) = self.in_block.iter().find(|(_, gguf)| *gguf == rest)?;
        Some(format!("{}{index}.{hf}.{kind}", self.block))
    }
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
            assert_eq!(LLAMA.from_hf(hf).as_deref(), Some(gguf));
            assert_eq!(LLAMA.to_hf(gguf).as_deref(), Some(hf));
        }
        assert_eq!(LLAMA.from_hf("model.layers.0.unknown.weight"), None);
        assert_eq!(LLAMA.to_hf("rope_freqs.weight"), None);
    }

    /// Every architecture's table is one to one, or names would be lost on the way.
    #[test]
    fn tables_are_one_to_one() {
        for names in crate::registry::ARCHITECTURES.iter().filter_map(|a| a.gguf.as_ref()).map(|g| g.names) {
            for table in [names.in_block, names.outside] {
                for (i, (hf, gguf)) in table.iter().enumerate() {
                    let twice = table[..i].iter().any(|(h, g)| h == hf || g == gguf);
                    assert!(!twice, "{hf} {gguf}");
                }
            }
        }
    }
}
