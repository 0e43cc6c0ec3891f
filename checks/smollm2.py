"""SmolLM2's GGUF: greedy text beside llama.cpp's, chat prompts beside transformers', start-up time.

    python checks/smollm2.py
"""

import json
import subprocess
import tempfile
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
    """Greedy continuation by llama.cpp."""
    import xllamacpp as xlc

    params = xlc.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    params.cpuparams.n_threads = 2
    params.sampling.temp, params.sampling.top_k, params.sampling.seed = 0.0, 1, 1
    server = xlc.Server(params)

    def complete(prompt):
        """Token ids, and how many nats each lies above the second best."""
        body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0.0, "n_probs": 2, "cache_prompt": False}
        done = server.handle_completions(body)
        steps = done.get("completion_probabilities") or done["choices"][0]["logprobs"]["content"]
        best = [s["top_logprobs"] for s in steps]
        return [s["id"] for s in steps], [b[0]["logprob"] - b[1]["logprob"] for b in best]

    return complete


def main():
    report = Report()
    path = Path(engobe("fetch", "smollm2-135m")["path"])
    complete, same = llama_cpp(path), 0
    for prompt in PROMPTS:
        mine = engobe("generate", "--model", path, "--prompt", prompt, "--max-new-tokens", TOKENS)
        theirs, margins = complete(prompt)
        ids = mine["token_ids"]
        parted = next((i for i, (a, b) in enumerate(zip(ids, theirs)) if a != b), None)
        same += parted is None
        # llama.cpp rounds activations to 8 bits; half a nat of difference was seen beside exact arithmetic
        good = parted is None or margins[parted] < 1.0
        where = "" if parted is None else f"parts at token {parted}, where llama.cpp's choice leads by {margins[parted]:.2f} nats"
        report.true(f"greedy {prompt[:24]!r}", good, where)
    print(f"{same} of {len(PROMPTS)} prompts continue with the same {TOKENS} tokens")
    reader = GGUFReader(path)
    field = reader.fields["tokenizer.chat_template"]
    template = bytes(field.parts[field.data[0]]).decode()
    for i, chat in enumerate(CHATS):
        theirs, _ = render_jinja_template([chat], chat_template=template, add_generation_prompt=True)
        rows = Path(tempfile.gettempdir()) / "engobe-chat.jsonl"
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
