"""Greedy text of a GGUF file, engobe's beside llama.cpp's."""

from common import engobe, llama_cpp


def compare_greedy(report, path, prompts, tokens, *flags):
    """Reports every prompt. Both programs round activations to 8 bits; engobe's flags may turn that off for it."""
    complete, same, itself = llama_cpp(path), 0, 0
    plain = llama_cpp(path, flash_attention=False)
    for prompt in prompts:
        mine = engobe("generate", "--model", path, "--prompt", prompt, "--max-new-tokens", tokens, *flags)
        theirs, margins, _ = complete(prompt, tokens)
        itself += plain(prompt, tokens)[0] == theirs
        ids = mine["token_ids"]
        parted = next((i for i, (a, b) in enumerate(zip(ids, theirs)) if a != b), None)
        same += parted is None
        # Both round activations to 8 bits, and a sum in another order is rounded to another code now and then: over
        # thirty layers that grows to a third of a nat, beside exact arithmetic too.
        good = parted is None or margins[parted] < 1.0
        where = "" if parted is None else f"parts at token {parted}, where llama.cpp's choice leads by {margins[parted]:.2f} nats"
        report.true(f"greedy {prompt[:24]!r}", good, where)
    print(f"{same} of {len(prompts)} prompts continue with the same {tokens} tokens; llama.cpp without flash attention: {itself}")
    # the counts are those of coins thrown a few times: what is not broken has more than half of the other's
    report.true("as near to llama.cpp as llama.cpp is to itself", 2 * same >= itself)
