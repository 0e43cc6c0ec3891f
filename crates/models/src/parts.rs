//! Layers over the tensors of a checkpoint, by module path: what architectures' files are put together of.

use crate::settings::DecoderSizes;
use crate::{Result, Weights};
use engobe_kernels::activation::Activation;
use engobe_nn::decoder::{Attention, Block, Decoder, Mlp, Norms, Projection, Up};
use engobe_nn::rope::Rope;
use engobe_nn::{CausalLm, Embedding, Entry, LayerNorm, Linear, ModelInfo, Norm, RmsNorm};
use rayon::prelude::*;

impl Weights<'_> {
    /// The linear layer at `path`.
    pub(crate) fn linear_at(&self, path: &str, out: usize, width: usize, bias: bool) -> Result<Linear> {
        let weight = self.linear(&format!("{path}.weight"), out, width)?;
        let bias = bias.then(|| self.vector(&format!("{path}.bias"), out)).transpose()?;
        Ok(Linear::new(path, weight, bias))
    }

    /// The layer at `path` that transformers calls `Conv1D`: linear, its matrix kept as `[in, out]`, with a bias.
    pub(crate) fn conv1d_at(&self, path: &str, out: usize, width: usize) -> Result<Linear> {
        let weight = self.transposed(&format!("{path}.weight"), out, width)?;
        let bias = self.vector(&format!("{path}.bias"), out)?;
        Ok(Linear::new(path, weight, Some(bias)).transposed_in_files())
    }

    /// Queries, keys and values of layers of their own, in `self_attn`.
    pub(crate) fn separate_qkv(&self, path: &str, sizes: &DecoderSizes, bias: bool) -> Result<Projection> {
        let linear = |name: &str, out| self.linear_at(&format!("{path}.{name}"), out, sizes.hidden, bias);
        let (all, kv) = (sizes.width(), sizes.kv_width());
        Ok(Projection::Separate([linear("q_proj", all)?, linear("k_proj", kv)?, linear("v_proj", kv)?]))
    }

    /// A gated MLP of layers of their own, in `mlp`.
    pub(crate) fn gated_mlp(
        &self,
        path: &str,
        sizes: &DecoderSizes,
        activation: Activation,
        bias: bool,
    ) -> Result<Mlp> {
        let (d, f) = (sizes.hidden, sizes.mlp);
        let linear = |name: &str, out, width| self.linear_at(&format!("{path}.{name}"), out, width, bias);
        let (gate, up) = (linear("gate_proj", f, d)?, linear("up_proj", f, d)?);
        Ok(Mlp { up: Up::Gated { gate, up }, activation, down: linear("down_proj", d, f)? })
    }

    /// An MLP of two layers, `up` and `down` beneath `path`.
    pub(crate) fn plain_mlp(
        &self,
        path: &str,
        [up, down]: [&str; 2],
        sizes: &DecoderSizes,
        activation: Activation,
        bias: bool,
    ) -> Result<Mlp> {
        let (d, f) = (sizes.hidden, sizes.mlp);
        let linear = |name: &str, out, width| self.linear_at(&format!("{path}.{name}"), out, width, bias);
        Ok(Mlp { up: Up::Plain(linear(up, f, d)?), activation, down: linear(down, d, f)? })
    }

    /// The root-mean-square norm at `path`.
    pub(crate) fn rms_norm_at(&self, path: &str, d: usize, eps: f32) -> Result<RmsNorm> {
        Ok(RmsNorm::new(path, self.vector(&format!("{path}.weight"), d)?, eps))
    }

    /// The layer norm at `path`.
    pub(crate) fn layer_norm_at(&self, path: &str, d: usize, eps: f32) -> Result<Norm> {
        let [weight, bias] = ["weight", "bias"].map(|kind| self.vector(&format!("{path}.{kind}"), d));
        Ok(Norm::Layer(LayerNorm::new(path, weight?, Some(bias?), eps)))
    }

    /// The embedding at `path`.
    pub(crate) fn embedding_at(&self, path: &str, rows: usize, d: usize) -> Result<Embedding> {
        Ok(Embedding::new(path, self.matrix(&format!("{path}.weight"), rows, d)?))
    }
}

/// What stands around a decoder's blocks.
pub(crate) struct Frame {
    /// Hugging Face's `model_type`
    pub model_type: &'static str,
    /// path of the embedding
    pub embedding: &'static str,
    /// its width
    pub embedding_width: usize,
    /// path of the output head
    pub head: &'static str,
    /// it has a bias
    pub head_bias: bool,
    /// the norm before the head
    pub norm: Option<Norm>,
    /// rotary embeddings
    pub ropes: Vec<Rope>,
}

impl Frame {
    /// That of LLaMA and those after it.
    pub(crate) fn usual(
        model_type: &'static str,
        sizes: &DecoderSizes,
        norm: Norm,
        ropes: Vec<Rope>,
    ) -> Self {
        Self {
            model_type,
            embedding: "model.embed_tokens",
            embedding_width: sizes.hidden,
            head: "lm_head",
            head_bias: false,
            norm: Some(norm),
            ropes,
        }
    }

    /// The decoder, its blocks made by `block`, in parallel.
    pub(crate) fn decoder(
        self,
        weights: &Weights<'_>,
        sizes: &DecoderSizes,
        block: impl Fn(usize) -> Result<Block> + Sync + Send,
    ) -> Result<Decoder> {
        let (rows, width) = (sizes.vocab, self.embedding_width);
        let embedding = weights.matrix(&format!("{}.weight", self.embedding), rows, width)?;
        // a head that nobody reads is stood in for
        let head = match sizes.tied_head || weights.is_headless() {
            true => embedding.clone(),
            false => weights.matrix(&format!("{}.weight", self.head), rows, width)?,
        };
        let bias = self.head_bias && !weights.is_headless();
        let bias = bias.then(|| weights.vector(&format!("{}.bias", self.head), rows)).transpose()?;
        let blocks = (0..sizes.layers).into_par_iter().map(block).collect::<Result<Vec<_>>>()?;
        Ok(Decoder {
            info: ModelInfo {
                model_type: self.model_type.to_string(),
                vocab_size: sizes.vocab,
                hidden_size: sizes.hidden,
                num_layers: sizes.layers,
                kv_width: sizes.kv_width(),
                max_positions: sizes.max_positions,
                tied_head: sizes.tied_head,
                blocks: blocks.iter().any(|b| b.attention.output.weight().is_of_blocks()),
            },
            embed_tokens: Embedding::new(self.embedding, embedding),
            entry: Entry::new(self.embedding, width),
            embed_scale: None,
            entry_scale: None,
            project_in: None,
            positions: None,
            blocks,
            ropes: self.ropes,
            norm: self.norm,
            project_out: None,
            head_scale: None,
            lm_head: Linear::new(self.head, head, bias),
            soft_cap: None,
            device: weights.device().clone(),
        })
    }
}

/// A decoder of LLaMA's blocks, with that in which those after it differ.
pub(crate) struct LlamaBlocks<'a> {
    pub sizes: &'a DecoderSizes,
    /// of the norms
    pub eps: f32,
    /// biases on queries, keys and values
    pub qkv_bias: bool,
    /// a bias on attention's output
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// norms on the heads of queries and keys
    pub head_norms: bool,
    /// of each layer; those that are not there see all
    pub windows: &'a [Option<usize>],
    /// makes the norms
    pub norm: fn(&Weights<'_>, &str, usize, f32) -> Result<Norm>,
    /// attention and MLP side by side, behind one norm
    pub parallel: bool,
    /// what gates the MLP
    pub activation: Activation,
    /// of each layer; where there is none queries and keys are not turned (those not listed are)
    pub turned: &'a [bool],
    /// factor on attention's scores
    pub score_scale: f32,
    /// factor on what sub-layers compute
    pub sub_layer_scale: Option<f32>,
}

impl<'a> LlamaBlocks<'a> {
    /// LLaMA's own, without biases.
    pub fn new(sizes: &'a DecoderSizes, eps: f32) -> Self {
        Self {
            sizes,
            eps,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            head_norms: false,
            windows: &[],
            norm: |w, path, d, eps| Ok(Norm::Rms(w.rms_norm_at(path, d, eps)?)),
            parallel: false,
            activation: Activation::Silu,
            turned: &[],
            score_scale: sizes.scale(),
            sub_layer_scale: None,
        }
    }

    /// The model, with one rotary embedding for all layers.
    pub fn build(&self, w: &Weights<'_>, model_type: &'static str, rope: Rope) -> Result<Box<dyn CausalLm>> {
        Ok(Box::new(self.decoder(w, model_type, rope)?))
    }

    /// The decoder, for those that change it further.
    pub fn decoder(&self, w: &Weights<'_>, model_type: &'static str, rope: Rope) -> Result<Decoder> {
        let norm = (self.norm)(w, "model.norm", self.sizes.hidden, self.eps)?;
        let frame = Frame::usual(model_type, self.sizes, norm, vec![rope]);
        frame.decoder(w, self.sizes, |i| self.block(w, i))
    }

    fn block(&self, w: &Weights<'_>, layer: usize) -> Result<Block> {
        let s = self.sizes;
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        let norm = |name: &str| (self.norm)(w, &at(name), s.hidden, self.eps);
        let norms = match self.parallel {
            true => Norms::Shared(norm("input_layernorm")?),
            false => Norms::Pre([norm("input_layernorm")?, norm("post_attention_layernorm")?]),
        };
        let head_norm = |name: &str| w.rms_norm_at(&at(name), s.head_dim, self.eps);
        Ok(Block::new(
            Attention {
                projection: w.separate_qkv(&at("self_attn"), s, self.qkv_bias)?,
                head_norms: match self.head_norms {
                    true => Some([head_norm("self_attn.q_norm")?, head_norm("self_attn.k_norm")?]),
                    false => None,
                },
                output: w.linear_at(&at("self_attn.o_proj"), s.hidden, s.width(), self.output_bias)?,
                shape: s.attention(self.score_scale, self.windows.get(layer).copied().flatten()),
                rope: self.turned.get(layer).copied().unwrap_or(true).then_some(0),
            },
            w.gated_mlp(&at("mlp"), s, self.activation, self.mlp_bias)?,
            norms,
        )
        .scaled(self.sub_layer_scale))
    }
}
