"""What the scripts that make tiny models of encoders and encoder-decoders share."""

import random
import warnings

import torch
from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.disable_progress_bar()
logging.set_verbosity_error()


def randomise(model, seed, scale=0.15):
    """Weights whose outputs are far from flat: norms around 1, all else (biases too) around 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = "norm" in name.lower() and name.endswith("weight")
            p.copy_(torch.randn_like(p) * (0.5 if is_norm else scale) + (1.0 if is_norm else 0.0))


def store(model, directory, dtype):
    """Saves the model in `dtype` and reads it again in f32: what is expected is computed from what is stored."""
    model.to(dtype).save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    return type(model).from_pretrained(directory, dtype=torch.float32).eval()


def token_rows(seed, lengths, vocab, first=3):
    """Rows of random ids, none below `first`, where the special ones are."""
    rng = random.Random(seed)
    return [[rng.randrange(first, vocab) for _ in range(n)] for n in lengths]


def padded(rows, pad):
    """Ids and attention mask, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    return ids, mask
