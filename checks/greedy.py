"""Greedy text of a GGUF file, engobe's beside llama.cpp's."""

from common import engobe


def llama_cpp(path, tokens, flash_attention=True):
    """Greedy continuation by llama.cpp, with either of its two ways to compute attention."""
    import xllamacpp as xlc

    params = xlc.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    params.cpuparams.n_threads = 2
    params.sampling.temp, params.sampling.top_k, params.sampling.seed = 0.0, 1, 1
    if not flash_attention:
        params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xlc.Server(params)

    def complete(prompt):
        """Token ids, and how many nats each lies above the second best."""
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "n_probs": 2, "cache_prompt": False}
        done = server.handle_completions(body)
        steps = done.get("completion_probabilities") or done["choices"][0]["logprobs"]["content"]
        best = [s["top_logprobs"] for s in steps]
        return [s["id"] for s in steps], [b[0]["logprob"] - b[1]["logprob"] for b in best]

    return complete


def compare_greedy(report, path, prompts, tokens, *flags):
    """Reports every prompt. Both programs round activations to 8 bits; engobe's flags may turn that off for it."""
    complete, same, itself = llama_cpp(path, tokens), 0, 0
    plain = llama_cpp(path, tokens, flash_attention=False)
    for prompt in prompts:
        mine = engobe("generate", "--model", path, "--prompt", prompt, "--max-new-tokens", tokens, *flags)
        theirs, margins = complete(prompt)
        itself += plain(prompt)[0] == theirs
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
