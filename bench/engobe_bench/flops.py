"""Floating-point operations of one LoRA training step, as the mathematics needs them.

With N tokens, L of them labelled, rank r on every linear layer, a multiplication and an addition counting as two:

    base linears     2·N·in·out forward, 2·N·in·out for the input's gradient; frozen, so nothing for the weight's
    adapters         2·N·r·(in+out) each for the forward, the input's gradient, and the gradients of A and B
    head             2·L·d·V forward, 2·L·d·V for the hidden state's gradient: labelled positions only
    attention        4·heads·head_dim a (query, visible key) pair forward, 8 backward; causal, within a row

q, k and v of the first layer owe no gradient to their input: nothing trainable lies below it. What a program computes
a second time (probabilities in the backward, blocks under checkpointing) is not counted: doing it is its own cost.
Norms, rope, activations and the optimizer are below one per cent and not counted either.

For W1 (512 tokens, SmolLM2-135M) this is 317 GFLOP, 0.62 GFLOP a token.
"""

# SmolLM2-135M
LAYERS, D, KV, FFN, VOCAB, HEADS, HEAD_DIM = 30, 576, 192, 1536, 49152, 9, 64
# (in, out) of q, k, v, o, gate, up, down
LINEARS = [(D, D), (D, KV), (D, KV), (D, D), (D, FFN), (D, FFN), (FFN, D)]


def step_flops(rows, label_tokens, rank=16):
    """Of a step over rows with these lengths, of which `label_tokens` positions are labelled."""
    tokens = sum(rows)
    base = sum(2 * i * o for i, o in LINEARS)
    lora = sum(2 * rank * (i + o) for i, o in LINEARS)
    # input gradients that nobody needs
    first = sum(2 * i * o + 2 * rank * i for i, o in LINEARS[:3])
    pairs = sum(n * (n + 1) // 2 for n in rows)
    return {
        "base": tokens * (2 * LAYERS * base - sum(2 * i * o for i, o in LINEARS[:3])),
        "adapters": tokens * (3 * LAYERS * lora - (first - sum(2 * i * o for i, o in LINEARS[:3]))),
        "head": label_tokens * 4 * D * VOCAB,
        "attention": LAYERS * 12 * HEADS * HEAD_DIM * pairs,
    }


def total(parts):
    return sum(parts.values())
