"""What engobe hands back to llama.cpp: GGUF LoRA, merged GGUF files of several types, and GGUF files made of
Hugging Face directories, each generating what engobe generates.

    python checks/llamacpp.py [--demo DIR] [--only PART]

DIR is what `engobe demo --out DIR` left; without it, each part runs the demo first (a minute or two). Parts:
configurations, families, lora, merged, requantized, directory.

Greedy tokens are compared one by one. Where the two part, llama.cpp's choice is taken and the comparison goes on
from there, so that every choice is compared; at each parting the margin by which llama.cpp's token leads is shown and
must be small. Small means what the arithmetic allows: llama.cpp rounds activations to 8 bits beside quantized weights
(half a nat of difference was seen beside exact arithmetic), to f16 beside f16 weights, and not at all beside f32.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import common
import torch
import transformers
from common import THREADS, Report, engobe, make_model, randomize
from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

TOKENS = 48
PLAIN = [
    "The capital of France is Paris, and the capital of Italy is",
    "Once upon a time, in a village by the sea, there lived an old potter who",
    "def fibonacci(n):\n    \"\"\"The n-th Fibonacci number.\"\"\"\n",
    "Water boils at a lower temperature on a mountain because",
]


def llama_cpp(path, lora=None):
    """llama.cpp with attention in f32, so that only weights and activations are rounded."""
    return common.llama_cpp(path, lora, flash_attention=False, exact_cache=True)


def partings(complete, args, ids, tokens):
    """By how much llama.cpp's token leads wherever engobe, called with `args`, chooses another one after `ids`."""
    theirs, margins, _ = complete(ids, tokens)
    found, at = [], 0
    while at < len(theirs):
        context = ",".join(map(str, ids + theirs[:at]))
        mine = engobe("generate", *args, "--prompt-ids", context, "--max-new-tokens", len(theirs) - at, "--threads", THREADS)["token_ids"]
        if len(theirs) < tokens and len(mine) == len(theirs) - at - 1:
            # both ended; llama.cpp's answer has the token that ends it
            mine.append(theirs[-1])
        parted = next((i for i, t in enumerate(theirs[at:]) if i >= len(mine) or mine[i] != t), None)
        if parted is None:
            break
        found.append(margins[at + parted])
        at += parted + 1
    return found, len(theirs)


def compare(report, name, complete, args, prompts, limit, tokens=TOKENS):
    """engobe, called with `args`, beside llama.cpp on every prompt of every kind."""
    for kind, some in prompts.items():
        found = [partings(complete, args, ids, tokens) for ids in some]
        margins = sorted((m for margins, _ in found for m in margins), reverse=True)
        equal, compared = sum(not margins for margins, _ in found), sum(n for _, n in found)
        detail = f"{equal} of {len(some)} texts equal, {compared} tokens"
        if margins:
            detail += f", {len(margins)} partings at margins [{', '.join(f'{m:.3f}' for m in margins[:4])}] (limit {limit})"
        report.true(f"{name}, {kind}", compared > 5 * len(some) and max(margins, default=0.0) <= limit, detail)


def demo_prompts(demo, hf):
    """As token ids: the demo's held-out prompts as chats, and plain texts that its adapter knows nothing of."""
    tokenizer = Tokenizer.from_file(str(hf / "tokenizer.json"))
    template = (hf / "chat_template.jinja").read_text()
    rows = [json.loads(l) for l in (demo / "test.jsonl").read_text().splitlines()]
    chats = [[{"role": "user", "content": r["prompt"]}] for r in rows[:16]]
    texts, _ = render_jinja_template(chats, chat_template=template, add_generation_prompt=True)
    ids = lambda texts: [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    return {"held-out prompts": ids(texts), "plain texts": ids(PLAIN)}


class Base:
    """SmolLM2, the demo's adapter over it, and prompts."""

    def __init__(self, work, demo):
        self.path = engobe("fetch", "smollm2-135m")["path"]
        if demo is None:
            demo = work / "demo"
            engobe("demo", "--out", demo)
        self.over = ["--model", self.path, "--adapter", demo / "adapter"]
        self.hf = work / "hf"
        engobe("merge", *self.over, "--out", self.hf)
        self.prompts = demo_prompts(demo, self.hf)


def lora(report, work, demo):
    """The demo's adapter beside the same base."""
    base = Base(work, demo)
    for kind in ("f32", "f16"):
        path = work / f"lora-{kind}.gguf"
        done = engobe("convert", "--to", "gguf-lora", *base.over, "--type", kind, "--out", path)
        report.true(f"GGUF LoRA {kind}: mapped", len(done["mapped"]) == 420 and len(GGUFReader(path).tensors) == 420)
        compare(report, f"GGUF LoRA {kind} in llama.cpp", llama_cpp(base.path, path), base.over, base.prompts, 1.0)


def merged(report, work, demo):
    """The adapter baked in, in types that lose little: beside base + adapter itself."""
    base = Base(work, demo)
    for kind, limit in (("f32", 0.02), ("f16", 0.1), ("bf16", 0.3), ("q8_0", 1.0)):
        path = work / f"merged-{kind}.gguf"
        found = engobe("merge", *base.over, "--type", kind, "--out", path)
        print(f"     {kind}: mean KL {found['mean_kl']:.3g} nats, the adapter itself {found['adapter_kl']:.3g}")
        exact = ["--exact-activations"] if kind != "q8_0" else []
        compare(report, f"merged {kind} in llama.cpp", llama_cpp(path), [*base.over, *exact], base.prompts, limit)


def requantized(report, work, demo):
    """The adapter baked in, in types that lose something: beside the same file in engobe, and what is refused."""
    base = Base(work, demo)
    original = GGUFReader(base.path)
    for kind in ("q8_0", "q4_k", "q4_0", "keep"):
        path = work / f"requantized-{kind}.gguf"
        if kind != "q8_0":
            refused = engobe("merge", *base.over, "--type", kind, "--out", path, ok=False)
            report.true(f"merged {kind} is refused", refused.returncode == 1 and "--max-kl" in refused.stderr and not path.exists())
        found = engobe("merge", *base.over, "--type", kind, "--out", path, "--accept-drift")
        print(f"     {kind}: mean KL {found['mean_kl']:.3g} nats, the adapter itself {found['adapter_kl']:.3g}")
        compare(report, f"requantized {kind} in llama.cpp", llama_cpp(path), ["--model", path], base.prompts, 1.0)
        made = GGUFReader(path)
        differ = [k for k in original.fields if k not in made.fields or made.fields[k].contents() != original.fields[k].contents()]
        differ = [k for k in differ if not k.startswith("GGUF.") and k != "general.file_type"]
        report.true(f"metadata of {kind}", not differ, str(differ))


def directory(report, work, demo):
    """A Hugging Face directory (tokenizer.json, template) back into GGUF."""
    base = Base(work, demo)
    path = work / "from-hf.gguf"
    engobe("convert", "--to", "gguf", "--model", base.hf, "--type", "f32", "--out", path)
    made, original = GGUFReader(path), GGUFReader(base.path)
    keys = ["tokens", "merges", "pre", "model", "bos_token_id", "eos_token_id", "unknown_token_id"]
    for key in [f"tokenizer.ggml.{k}" for k in keys] + ["tokenizer.chat_template"]:
        if key in original.fields:
            report.true(f"from a directory: {key}", made.fields[key].contents() == original.fields[key].contents())
    compare(report, "from a directory, in llama.cpp", llama_cpp(path), ["--model", base.hf, "--exact-activations"], base.prompts, 0.02)


TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256)
CONFIGS = {
    "plain": dict(num_key_value_heads=4, tie_word_embeddings=False),
    "gqa_tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "head_dim_bias": dict(num_key_value_heads=2, head_dim=24, attention_bias=True, mlp_bias=True),
    "theta": dict(num_key_value_heads=1, rope_theta=5e5, rms_norm_eps=1e-5),
    "linear": dict(num_key_value_heads=2, rope_scaling=dict(rope_type="linear", factor=4.0)),
    "llama3": dict(num_key_value_heads=2, rope_theta=5e5, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)),
    "yarn": dict(num_key_value_heads=2, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
}


# name -> configuration's class, what differs from its defaults, how far log-probabilities may be apart. ggml computes
# GELU from a table of 16-bit floats, and GPT-NeoX's by tanh.
ROUNDED = 5e-3
GPT2 = dict(vocab_size=512, n_embd=64, n_layer=3, n_head=4, n_positions=256)
GEMMA = dict(TINY, num_hidden_layers=6, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
FAMILIES = {
    "mistral": ("MistralConfig", dict(TINY, num_key_value_heads=2, sliding_window=None), 1e-4),
    "qwen2": ("Qwen2Config", dict(TINY, num_key_value_heads=2, tie_word_embeddings=True), 1e-4),
    "qwen3": ("Qwen3Config", dict(TINY, num_key_value_heads=2, head_dim=24), 1e-4),
    "gemma2": ("Gemma2Config", GEMMA, ROUNDED),
    "gemma3": ("Gemma3TextConfig", GEMMA, ROUNDED),
    "phi3": ("Phi3Config", dict(TINY, num_key_value_heads=2, pad_token_id=0), 1e-4),
    "gpt2": ("GPT2Config", GPT2, ROUNDED),
    "gpt_neox": ("GPTNeoXConfig", dict(TINY, intermediate_size=128), 2e-2),
    "gemma": ("GemmaConfig", dict(TINY, num_key_value_heads=1, head_dim=16), ROUNDED),
    "olmo2": ("Olmo2Config", dict(TINY, num_key_value_heads=2, pad_token_id=0), 1e-4),
    "granite": ("GraniteConfig", dict(TINY, num_key_value_heads=2, embedding_multiplier=6.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=3.0), 1e-4),
    "smollm3": ("SmolLM3Config", dict(TINY, num_hidden_layers=5, num_key_value_heads=2, pad_token_id=0), 1e-4),
    "starcoder2": ("Starcoder2Config", dict(TINY, num_key_value_heads=2, bos_token_id=1, eos_token_id=2), ROUNDED),
    "phi": ("PhiConfig", TINY, ROUNDED),
    "stablelm": ("StableLmConfig", dict(TINY, num_key_value_heads=2), 1e-4),
    "stablelm_parallel": ("StableLmConfig", dict(TINY, num_key_value_heads=4, use_parallel_residual=True, use_qkv_bias=True, partial_rotary_factor=0.5), 1e-4),
}


def beside_transformers(report, name, work, at, model, seed, limit):
    """llama.cpp finds in the GGUF made of the directory what transformers finds in the directory."""
    hf = Path(__file__).resolve().parent.parent / "crates/data/tests/golden/hf"
    tokenizer = Tokenizer.from_file(str(hf / "tokenizer.json"))
    # llama.cpp's server reports no token that ends inside a character, and stops at those that end a turn
    whole = [i for i in range(3, tokenizer.get_vocab_size()) if "\ufffd" not in tokenizer.decode([i], skip_special_tokens=False)]
    banned = sorted(set(range(TINY["vocab_size"])) - set(whole))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf / file, at / file)
    path = work / f"tiny-{name}.gguf"
    engobe("convert", "--to", "gguf", "--model", at, "--type", "f32", "--out", path)
    complete = llama_cpp(path)
    torch.manual_seed(seed)
    worst, chosen, count = 0.0, 0, 0
    for _ in range(4):
        ids = torch.randint(3, 480, (40,)).tolist()
        theirs, _, logprobs = complete(ids, 40, banned)
        with torch.no_grad():
            logits = model(torch.tensor([ids + theirs])).logits[0].float()[len(ids) - 1 : -1]
        mine = torch.log_softmax(logits, -1)
        worst = max(worst, max(abs(mine[k, t].item() - l) for k, (t, l) in enumerate(zip(theirs, logprobs))))
        logits[:, banned] = -torch.inf
        # a choice within what rounding may do is no choice
        chosen += sum(logits[k].max().item() - logits[k, t].item() < 2 * limit for k, t in enumerate(theirs))
        count += len(theirs)
    report(f"{name}: log-probabilities of llama.cpp beside transformers'", worst, limit)
    report.true(f"{name}: greedy tokens", chosen == count and count > 100, f"{chosen} of {count}")


def configurations(report, work, demo):
    """Random LLaMA models of every configuration."""
    for i, (name, changes) in enumerate(CONFIGS.items()):
        at = work / f"tiny-{name}"
        model = make_model(at, 70 + i, **{**TINY, **changes})
        beside_transformers(report, name, work, at, model, i, 1e-4)


def families(report, work, demo):
    """A random model of every other family that llama.cpp has."""
    for i, (name, (kind, changes, limit)) in enumerate(FAMILIES.items()):
        # (in a model that is called after Phi-3, llama.cpp looks for tokens of its vocabulary)
        at = work / f"family-{i}"
        torch.manual_seed(i)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**changes)).eval()
        randomize(model, around=0.0 if "gemma" in name else 1.0)
        model.save_pretrained(at)
        beside_transformers(report, name, work, at, model, i, limit)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        for part in (configurations, families, lora, merged, requantized, directory):
            if args.only in part.__name__:
                shutil.rmtree(work / "hf", ignore_errors=True)
                part(report, work, args.demo)
    report.exit()
