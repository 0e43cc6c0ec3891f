"""How each program is run and what is read from it. A measurement is what `proc.run` says, and `values`."""

import json
import shutil
import time
from pathlib import Path

from .peers import SCRIPTS, say
from .stats import median

LORA = ["--r", 16, "--lora-alpha", 32, "--target-modules", "all-linear"]


def step_values(steps, warmup, started_to_first_step):
    """What a training run comes to. Steps after the warm-up count; all of them stay in the raw results.

    Rates over even steps come from the median step; `label_tokens_per_second` is labels by time over all steps after
    the warm-up, for steps that differ in size; `all_tokens_per_second` is the same of tokens.
    """
    steady = steps[warmup:]
    seconds = median(s["seconds"] for s in steady)
    spent = sum(s["seconds"] for s in steady)
    return {
        "step_seconds": seconds,
        "tokens_per_second": steady[0]["tokens"] / seconds,
        "all_tokens_per_second": sum(s["tokens"] for s in steady) / spent,
        "label_tokens_per_second": sum(s["label_tokens"] for s in steady) / spent,
        "startup_seconds": started_to_first_step,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
    }


def engobe_train(ctx, name, model, data, steps, warmup, flags=(), keep=False, threads=None):
    """`engobe train`, as a user types it."""
    out = ctx.scratch(name)
    length = ["--max-steps", steps] if steps else ["--epochs", 1]
    command = [ctx.engobe, "train", "--model", model, "--data", data, "--out", out, *length, *LORA]
    command += ["--threads", threads or ctx.threads, *flags, "--json", "--quiet"]
    text, cost = ctx.measured(command)
    said = json.loads(text.strip().splitlines()[-1])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if not keep:
        shutil.rmtree(out)
    kept = [{k: line[k] for k in ("seconds", "loss", "tokens", "label_tokens")} for line in lines]
    return {**cost, "steps": kept, "values": step_values(kept, warmup, said["startup_seconds"])}


def peft_train(ctx, model, data, batch, steps, warmup, dtype="float32", attention="sdpa", flags=()):
    """The same work by PyTorch and PEFT."""
    command = [ctx.python, SCRIPTS / "peft_train.py", "--model", model, "--data", data, "--batch-size", batch]
    command += ["--steps", steps, "--threads", ctx.threads, "--dtype", dtype, "--attention", attention, *flags]
    text, cost = ctx.measured(command)
    said = json.loads(text.strip().splitlines()[-1])
    values = step_values(said["steps"], warmup, said["first_step_at"] - cost["started"])
    values["first_step_done_seconds"] = said["first_step_done"] - cost["started"]
    return {**cost, "steps": said["steps"], "values": values, "attention": attention}


def fastest_attention(ctx, key, model, data, batch, dtype, flags=()):
    """Which of transformers' attentions is faster for this work; tried once, both kept in the results."""
    if key not in ctx.choices:
        found = {}
        for attention in ("sdpa", "eager"):
            one = peft_train(ctx, model, data, batch, steps=4, warmup=1, dtype=dtype, attention=attention, flags=flags)
            found[attention] = one["values"]["step_seconds"]
            ctx.trials.append({"for": key, **one})
        ctx.choices[key] = min(found, key=found.get)
        say(f"PEFT, {key}: " + ", ".join(f"{a} {s:.3f} s a step" for a, s in found.items()))
    return ctx.choices[key]


def machine_rate(ctx, tokens, labels):
    """What the machine and the gemm crate do right now."""
    command = [ctx.rate, "--json", "--threads", ctx.threads, "--tokens", tokens, "--labels", labels]
    text, cost = ctx.measured(command)
    return {**cost, "values": json.loads(text.strip().splitlines()[-1])}


def engobe_generate(ctx, model, prompt_ids, new_tokens):
    """`engobe generate`: prompt processing and decoding."""
    command = [ctx.engobe, "generate", "--model", model, "--prompt-ids", ",".join(map(str, prompt_ids))]
    command += ["--max-new-tokens", new_tokens, "--threads", ctx.threads, "--json", "--quiet"]
    text, cost = ctx.measured(command)
    said = json.loads(text.strip().splitlines()[-1])
    rates = {"prompt_tokens_per_second": said["prompt_tokens"] / said["prompt_seconds"]}
    if said["decode_tokens_per_second"]:
        rates["decode_tokens_per_second"] = said["decode_tokens_per_second"]
    return {**cost, "values": {**rates, "new_tokens": len(said["token_ids"])}}


def llama_generate(ctx, model, prompt_ids, new_tokens):
    """llama.cpp on the same file and tokens."""
    command = [ctx.python, SCRIPTS / "llama_generate.py", "--model", model, "--prompt-ids"]
    command += [",".join(map(str, prompt_ids)), "--max-new-tokens", new_tokens, "--threads", ctx.threads]
    text, cost = ctx.measured(command)
    said = json.loads(text.strip().splitlines()[-1])
    values, timings = {}, said["timings"]
    if timings:
        values = {
            "prompt_tokens_per_second": timings["prompt_per_second"],
            "decode_tokens_per_second": timings["predicted_per_second"],
            "new_tokens": timings["predicted_n"],
        }
    if said["first_token_at"]:
        values["first_token_seconds"] = said["first_token_at"] - cost["started"]
    return {**cost, "values": values, "system": said["system"]}


def appears(path: Path, process, started):
    """Seconds from the start to the first line of `path`."""
    while process.poll() is None and not (path.exists() and path.stat().st_size > 0):
        time.sleep(0.002)
    return time.monotonic() - started
