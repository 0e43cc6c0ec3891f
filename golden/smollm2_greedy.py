"""Greedy tokens of llama.cpp on SmolLM2's GGUF, with how clear each choice was.

    pip install xllamacpp transformers gguf && python golden/smollm2_greedy.py PATH/SmolLM2-135M-Instruct.Q4_1.gguf

Writes golden/smollm2_greedy.json: per prompt its text and ids, llama.cpp's next tokens, and for each the distance in
nats to the second best. llama.cpp rounds activations to 8 bits and keys and values to 16; changing its micro-batch
alone moved log-probabilities by 0.16 nats, so only choices that are clearer than that can be held against another
program.
"""

import json
import sys
from pathlib import Path

from shared import HERE  # noqa: I001
from common import llama_cpp
from transformers import AutoTokenizer

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "List of planets: Mercury,",
    "The largest ocean on Earth is",
    "Photosynthesis is the process by which",
    "The quick brown fox",
    "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n",
    "A recipe for pancakes:",
]
TOKENS = 24


def main(path):
    complete = llama_cpp(path)
    file = Path(path)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        tokens, margins, _ = complete(ids, TOKENS)
        margins = [round(m, 3) for m in margins]
        rows.append({"prompt": prompt, "ids": ids, "tokens": tokens, "margins": margins})
    text = "[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n"
    (HERE / "smollm2_greedy.json").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
