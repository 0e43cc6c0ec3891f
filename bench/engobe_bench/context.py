"""What all workloads share: the programs, the settings of this run, and the models and rows that they work on."""

import json
import random
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .machine import ROOT
from .peers import SCRIPTS, say
from .proc import Failed, run

# lengths in tokens of prompts and answers of 64 Alpaca rows (SmolLM2's tokenizer and chat template), for machines
# that don't have the rows themselves
ALPACA_LENGTHS = Path(__file__).resolve().parent / "alpaca_lengths.json"
# lengths in tokens of 256 sentences of SST-2's training rows (BERT's tokenizer, [CLS] and [SEP] counted)
SST2_LENGTHS = Path(__file__).resolve().parent / "sst2_lengths.json"


@dataclass
class Context:
    engobe: Path
    rate: Path
    python: str
    threads: int
    repeats: int
    quick: bool
    work: Path
    lock: Path | None = None
    alpaca: Path | None = None
    # which attention PEFT was fastest with, and how that was found
    choices: dict = field(default_factory=dict)
    trials: list = field(default_factory=list)

    def script(self, name, *args):
        """Runs one of our scripts in the peers' Python."""
        done = subprocess.run([self.python, SCRIPTS / name, *map(str, args)], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"{name}: {done.stderr.strip()[-800:]}")

    def made(self, name, make):
        """The file or directory `name` in the work directory, made once."""
        path, partial = self.work / name, self.work / f"{name}.partial"
        if not path.exists():
            say(f"making {name}")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(path)
        return path

    def model(self, dtype, shape="smollm2"):
        """Random weights of the SmolLM2-135M, GPT-2 (124M), MiniLM or T5-small shape, stored as float32, bfloat16 or float16."""
        return self.made(f"{shape}-shape-{dtype}", lambda out: self.script("make_model.py", out, dtype, shape))

    def rows(self, count, tokens, labelled=1.0, vocab=49152):
        """Rows of random tokens of one length, labels on their last part."""

        def make(out):
            rng, lines = random.Random(tokens), []
            for _ in range(count):
                ids = [rng.randrange(vocab) for _ in range(tokens)]
                hidden = round(tokens * (1 - labelled))
                lines.append(json.dumps({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]}) + "\n")
            out.write_text("".join(lines))

        return self.made(f"rows-{count}x{tokens}-{round(100 * labelled)}{'' if vocab == 49152 else f'-{vocab}'}.jsonl", make)

    def alpaca_rows(self, count, max_tokens):
        """Alpaca rows as tokens; where they are not at hand, random tokens in rows of the same lengths."""
        source = self.alpaca or ROOT.parent / "shared" / "data" / "alpaca" / "alpaca_en_demo.json"
        if source.exists():
            make = lambda out: self.script("make_alpaca.py", source, self.gguf(), count, max_tokens, out)
            return self.made(f"alpaca-{count}x{max_tokens}.jsonl", make)
        if self.alpaca:
            raise Failed(f"--alpaca {self.alpaca}: no such file")

        def make(out):
            rng, lines = random.Random(0), []
            lengths = json.loads(ALPACA_LENGTHS.read_text())
            for i in range(count):
                prompt, answer = lengths[i % len(lengths)]
                ids = [rng.randrange(49152) for _ in range(prompt + answer)][:max_tokens]
                labels = [-100] * prompt + ids[prompt:]
                if len(ids) > prompt:
                    lines.append(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
            out.write_text("".join(lines))

        return self.made(f"alpaca-like-{count}x{max_tokens}.jsonl", make)

    def sst2_rows(self, count):
        """Texts of random words, of which each is a token of the MiniLM-shaped model, in rows as long as SST-2's."""

        def make(out):
            rng, lines = random.Random(0), ["sentence\tlabel\n"]
            for n in json.loads(SST2_LENGTHS.read_text())[:count]:
                words = " ".join(f"w{rng.randrange(30000)}" for _ in range(n - 2))
                lines.append(f"{words}\t{rng.randrange(2)}\n")
            out.write_text("".join(lines))

        return self.made(f"sst2-like-{count}.tsv", make)

    def gguf(self):
        """SmolLM2-135M-Instruct as a GGUF file."""
        done = subprocess.run([self.engobe, "fetch", "smollm2-135m", "--json", "--quiet"], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"engobe fetch smollm2-135m: {done.stderr.strip()}")
        return Path(json.loads(done.stdout.strip().splitlines()[-1])["path"])

    def measured(self, command, watch=None, env=None):
        """Runs a command that is measured; paths of this machine don't get into the results."""
        command = [str(part) for part in command]
        env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false", **(env or {})}
        out, cost = run(command, env=env, watch=watch)
        shown = " ".join(part if len(part) < 200 else part[:60] + "…" for part in command)
        return out, {"command": self.plain(shown), **cost}

    def plain(self, text):
        """Text without this machine's paths."""
        names = {str(self.engobe): "engobe", str(self.rate): "machine_rate", self.python: "python", f"{SCRIPTS}/": ""}
        for path, name in {**names, f"{self.work}/": "", str(Path.home()): "~"}.items():
            text = text.replace(path, name)
        return text

    def scratch(self, name):
        """A directory that does not exist yet."""
        path = self.work / "runs" / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
