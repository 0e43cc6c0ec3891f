"""SmolLM2's GGUF: greedy text beside llama.cpp's, chat prompts beside transformers', start-up time.

    python checks/smollm2.py
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from common import ENGOBE, Report, engobe
from greedy import compare_greedy
from gguf import GGUFReader
from transformers.utils.chat_template_utils import render_jinja_template

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "List of planets: Mercury,",
    "Der schnelle braune Fuchs springt über",
    "In 1969, humans first",
    "To make a cup of tea, first",
    "The largest ocean on Earth is",
    "import numpy as np\n",
    "Photosynthesis is the process by which",
    "1, 2, 3, 4,",
    "A recipe for pancakes:\n",
    "Question: What is gravity?\nAnswer:",
    "SELECT name FROM",
    "Albert Einstein was",
    "The square root of 16 is",
    "Mountains are formed when",
    "The history of Rome begins",
    "Bees make honey because",
    "What is the difference between a cat and a dog?",
    "Python is a programming language that",
    "The sun rises in the",
    "Dear Sir or Madam,\n",
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


def main():
    report = Report()
    path = Path(engobe("fetch", "smollm2-135m")["path"])
    compare_greedy(report, path, PROMPTS, TOKENS)
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
