"""SmolLM2's GGUF: greedy text beside llama.cpp's, chat prompts beside transformers', start-up time.

    python checks/smollm2.py
"""

import json
import subprocess
import time
from pathlib import Path

from common import ENGOBE, Report, engobe
from gguf import GGUFReader
from transformers.utils.chat_template_utils import render_jinja_template

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "List of planets: Mercury,",
    "Der schnelle braune Fuchs springt über",
]
CHATS = [
    [{"role": "user", "content": "What is 7 times 8?"}],
    [{"role": "system", "content": "Answer like a pirate."}, {"role": "user", "content": "Where is Rome?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Name three fruits \u2014 with   spaces\n\nand lines 🙂"},
    ],
]
TOKENS = 16


def llama_cpp(path):
    """Greedy continuation by llama.cpp, from token ids to token ids."""
    import xllamacpp as xlc

    params = xlc.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    params.cpuparams.n_threads = 2
    params.sampling.temp, params.sampling.top_k, params.sampling.seed = 0.0, 1, 1
    server = xlc.Server(params)

    def complete(ids):
        body = {"prompt": ids, "n_predict": TOKENS, "temperature": 0.0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
        body["samplers"] = ["top_k"]
        done = server.handle_completions(body)
        return done

    return complete


def main():
    report = Report()
    path = Path(engobe("fetch", "smollm2-135m")["path"])
    complete = llama_cpp(path)
    for prompt in PROMPTS:
        mine = engobe("generate", "--model", path, "--prompt", prompt, "--max-new-tokens", TOKENS)
        theirs = complete(prompt)
        choice = theirs["choices"][0] if "choices" in theirs else theirs
        text = choice.get("text", choice.get("content"))
        report.true(f"greedy {prompt[:24]!r}", text.startswith(mine["text"]) or mine["text"].startswith(text), f"{mine['text']!r} | {text!r}")
    reader = GGUFReader(path)
    field = reader.fields["tokenizer.chat_template"]
    template = bytes(field.parts[field.data[0]]).decode()
    for i, chat in enumerate(CHATS):
        theirs, _ = render_jinja_template([chat], chat_template=template, add_generation_prompt=True)
        rows = Path("/tmp/engobe-chat.jsonl")
        rows.write_text(json.dumps({"messages": [*chat, {"role": "assistant", "content": "Yes."}]}) + "\n")
        done = engobe("lint", "--model", path, "--data", rows, "--show", 1, "--allow", "eot-never-label", ok=False)
        shown = done.stdout.split("labels\n", 1)[1].rsplit("\n\n1 rows", 1)[0].rsplit("\n\n", 1)[0]
        mine = shown.replace("|>", "\0>").replace("<|", "<\0").replace("|", "").replace("\0", "|").replace("⟦", "").replace("⟧", "")
        expected = theirs[0] + "Yes.<|im_end|>"
        report.true(f"chat {i}", mine.strip() == expected.strip(), "" if mine.strip() == expected.strip() else f"\n{mine!r}\n{expected!r}")
    times = []
    for _ in range(5):
        start = time.monotonic()
        subprocess.run([ENGOBE, "generate", "--model", path, "--prompt", "Hello", "--max-new-tokens", "1"], check=True, capture_output=True)
        times.append(time.monotonic() - start)
    report("start-up to the first token, seconds (median of 5)", sorted(times)[2], 1.5)
    report.exit()


if __name__ == "__main__":
    main()
