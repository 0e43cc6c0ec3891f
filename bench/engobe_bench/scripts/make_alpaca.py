"""Alpaca rows as tokens, with SmolLM2's tokenizer and chat template; labels on the answer and its end token.

    python make_alpaca.py ALPACA.json MODEL.gguf ROWS MAX_TOKENS OUT.jsonl

The rows are the first ROWS of a shuffle with a fixed seed; both sides of the bench read the same file.
"""

import json
import random
import sys
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()


def main(alpaca, gguf, count, max_tokens, out):
    file = Path(gguf)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    rows = json.loads(Path(alpaca).read_text())
    random.Random(0).shuffle(rows)
    lines = []
    for row in rows[: int(count)]:
        user = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        chat = tokenizer.apply_chat_template([{"role": "user", "content": user}], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode(chat, add_special_tokens=False)
        answer = tokenizer.encode(row["output"] + "<|im_end|>\n", add_special_tokens=False)
        # the line break after the end token is the template's, not the answer's
        ids, labels = prompt + answer, [-100] * len(prompt) + answer[:-1] + [-100]
        ids, labels = ids[: int(max_tokens)], labels[: int(max_tokens)]
        # a prompt that fills the row leaves nothing to learn
        if any(label != -100 for label in labels):
            lines.append(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    Path(out).write_text("".join(lines))


main(*sys.argv[1:])
