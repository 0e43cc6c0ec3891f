"""Golden file for crates/kernels: 20 steps of bitsandbytes' AdamW8bit on the CPU.

    pip install -r golden/requirements.txt
    python golden/adamw8bit.py crates/kernels/tests/golden/adamw8bit.bin

The parameter's start and the gradients are made from integers, here and in the test (`mix` is
engobe_kernels::dropout::mix). File, little-endian: b"EGAD8B01", u32 elements, the 256 f32 of the signed and of the
unsigned map, then for steps 1, 2, 5 and 20: the parameter f32, codes of the first and second moment u8, their factors f32.

bitsandbytes' CUDA kernels search the map for the nearest entry. Its CPU library takes the entry of the nearest of
65536 equal steps between -1 and 1 instead, which makes every second moment below 1.5e-5 of its block's largest one
equal to that. Here its optimizer runs as it is, but with the search of the CUDA kernels. Run on a GPU (H200, bitsandbytes
0.50.2), those gave all codes of this file, and parameters within 2e-3 after 20 steps; its CPU library is 1.9 away from them.
"""

import struct
import sys

import bitsandbytes as bnb
import bitsandbytes.functional as F
import numpy as np
import torch
from bitsandbytes.backends.cpu import ops

from shared import mix

# 17 blocks, the last one short; above the 4096 elements below which moments stay f32
ELEMENTS = 4096 + 177
SHOWN = (1, 2, 5, 20)


def numbers(seed):
    """Between -1 and 1, a twentieth of them a thousand times smaller; exact in f32."""
    values = []
    for i in range(ELEMENTS):
        value = ((mix(seed, i) & 0xFFFF) - 32768) * 2.0**-15
        values.append(value * 2.0**-10 if i % 20 == 7 else value)
    return torch.tensor(values, dtype=torch.float32)


def quantize(values, code, absmax, codes, blocksize):
    """The entry nearest to each number over its block's largest one."""
    middles = (code[1:] + code[:-1]) / 2
    for i, start in enumerate(range(0, values.numel(), blocksize)):
        block = values[start : start + blocksize]
        absmax[i] = block.abs().max()
        scaled = (block * (1 / absmax[i].clamp(min=1e-38))).clamp(-1, 1)
        codes[start : start + blocksize] = torch.searchsorted(middles, scaled).to(torch.uint8)


def main(path):
    ops._quant_blockwise_fp32_direct = quantize
    p = torch.nn.Parameter(numbers(0))
    optimizer = bnb.optim.AdamW8bit([p], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    out = bytearray(b"EGAD8B01" + struct.pack("<I", ELEMENTS))
    for signed in (True, False):
        out += F.create_dynamic_map(signed=signed).numpy().astype("<f4").tobytes()
    for step in range(1, 21):
        p.grad = numbers(step)
        optimizer.step()
        state = optimizer.state[p]
        assert state["state1"].dtype == torch.uint8
        if step in SHOWN:
            out += p.detach().numpy().astype("<f4").tobytes()
            for key in ("state1", "state2", "absmax1", "absmax2"):
                value = state[key].numpy()
                out += value.astype("<f4").tobytes() if value.dtype == np.float32 else value.tobytes()
    with open(path, "wb") as file:
        file.write(out)


main(sys.argv[1])
