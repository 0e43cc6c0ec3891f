"""Floating-point operations of one LoRA training step, as the mathematics needs them.

With N tokens, L of them labelled, rank r on every linear layer, a multiplication and an addition counting as two:

    base linears     2·N·in·out forward, 2·N·in·out for the input's gradient; frozen, so nothing for the weight's
    adapters         2·N·r·(in+out) each for the forward, the input's gradient, and the gradients of A and B
    head             2·L·d·V forward, 2·L·d·V for the hidden state's gradient: labelled positions only
    attention        4·heads·head_dim a (query, visible key) pair forward, 8 backward; within a row, in decoders causal

q, k and v of the first layer owe no gradient to their input: nothing trainable lies below it. What a program computes
a second time (probabilities in the backward, blocks under checkpointing) is not counted: doing it is its own cost.
Norms, rope, activations and the optimizer are below one per cent and not counted either.

An encoder-decoder's row is a source and a target of its length: both stacks go over N tokens; keys and values of the
attention between them take the encoder's states; the encoder sees all pairs, the attention between them as well.

For W1 (512 tokens, SmolLM2-135M) this is 317 GFLOP, 0.62 GFLOP a token.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as far as its operations depend on them."""

    layers: int
    d: int
    vocab: int
    heads: int
    head_dim: int
    # (in, out) of a layer's linears, those first that take the layer's input
    linears: tuple
    # how many those are
    first: int
    causal: bool = True
    # (in, out) of a decoder layer's linears, for as many layers; `linears` are then the encoder's
    decoder: tuple = ()


SMOLLM2 = Shape(30, 576, 49152, 9, 64, ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)), 3)
T5_SMALL = Shape(6, 512, 32128, 8, 64, (*[(512, 512)] * 4, (512, 2048), (2048, 512)), 3, (*[(512, 512)] * 8, (512, 2048), (2048, 512)))
GPT2 = Shape(12, 768, 50257, 12, 64, ((768, 2304), (768, 768), (768, 3072), (3072, 768)), 1)

# their head reads one token a row; what DeBERTa's scores do with positions is not counted
DEBERTA_SMALL = Shape(6, 768, 2, 12, 64, ((768, 768), (768, 768), (768, 768), (768, 768), (768, 3072), (3072, 768)), 3, causal=False)
MINILM = Shape(6, 384, 2, 12, 32, ((384, 384), (384, 384), (384, 384), (384, 384), (384, 1536), (1536, 384)), 3, causal=False)


def step_flops(rows, label_tokens, rank=16, shape=SMOLLM2):
    """Of a step over rows with these lengths, of which `label_tokens` positions are labelled."""
    tokens = sum(rows)
    both = (*shape.linears, *shape.decoder)
    base = sum(2 * i * o for i, o in both)
    lora = sum(2 * rank * (i + o) for i, o in both)
    # input gradients that nobody needs
    first = shape.linears[: shape.first] * (2 if shape.decoder else 1)
    pairs = sum(n * (n + 1) // 2 if shape.causal else n * n for n in rows)
    if shape.decoder:
        # the encoder's, and those between source and target
        pairs += sum(2 * n * n for n in rows)
    return {
        "base": tokens * (2 * shape.layers * base - sum(2 * i * o for i, o in first)),
        "adapters": tokens * (3 * shape.layers * lora - sum(2 * rank * i for i, o in first)),
        "head": label_tokens * 4 * shape.d * shape.vocab,
        "attention": shape.layers * 12 * shape.heads * shape.head_dim * pairs,
    }


def total(parts):
    return sum(parts.values())
