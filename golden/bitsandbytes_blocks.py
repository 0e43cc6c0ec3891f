"""Golden codes for crates/kernels: tensors quantized by bitsandbytes to NF4, FP4 and int8, with and without double
quantization.

    pip install -r golden/requirements.txt
    python golden/bitsandbytes_blocks.py crates/kernels/tests/golden/bitsandbytes_blocks.bin

The tensors are not stored: `tensor` makes them from integers, and the test makes the same ones. File, little-endian:
b"EGBNBQ01", the 256 f32 of the dynamic map, then records until the end:
    u8 kind (0 nf4, 1 fp4, 2 int8), u8 dtype (0 f32, 1 bf16, 2 f16), u8 form, u32 rows, cols, block, seed;
    codes; f32 factors;
    4-bit: a hash of the dequantized f32 tensor (FNV-1a of its bytes); then with double quantization, the codes being
    the same: u8 codes of the factors, f32 nested factors, f32 offset, and the hash again.
"""

import struct
import sys

import bitsandbytes.functional as F
import numpy as np
import torch
from bitsandbytes.nn import Int8Params

from shared import mix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN, OUTLIERS, TINY, ZEROS = range(4)


def tensor(form, seed, n):
    """Sums of four 16-bit integers: nearly normal, and exact in f32."""
    values = []
    for i in range(n):
        z = mix(seed, i)
        total = sum((z >> shift) & 0xFFFF for shift in (0, 16, 32, 48)) - 131070
        value = total * 2.0**-18
        if form == OUTLIERS and i % 97 == 5:
            value *= 64.0
        if form == TINY:
            value *= 2.0**-40
        if form == ZEROS and (i // 64) % 2 == 0:
            value = 0.0
        values.append(value)
    return torch.tensor(values, dtype=torch.float32)


def fnv(data):
    h = 0xCBF29CE484222325
    for b in data:
        h = ((h ^ b) * 0x100000001B3) & ((1 << 64) - 1)
    return h


# rows, columns, block: blocks that end with rows, blocks that straddle them, last blocks that are short, odd sizes
SHAPES = [(4, 64, 64), (6, 100, 64), (3, 33, 64), (5, 96, 32), (3, 40, 32), (2, 640, 128), (3, 700, 256), (2, 1100, 512),
          (1, 2500, 1024), (2, 4096, 2048), (1, 4100, 4096), (300, 64, 64)]


def dequantized(codes, absmax, state, block, shape, own):
    """By the definition: bitsandbytes' AVX-512 kernel errs where blocks straddle rows. Elsewhere `own` must agree."""
    nibbles = codes.reshape(-1).numpy()
    nibbles = np.stack([nibbles >> 4, nibbles & 15], 1).reshape(-1)[: shape[0] * shape[1]]
    plain = state.code.numpy()[nibbles] * np.repeat(absmax.numpy(), block)[: nibbles.size]
    if shape[1] % block == 0:
        assert np.array_equal(own.numpy().reshape(-1), plain)
    return struct.pack("<Q", fnv(plain.astype("<f4").tobytes()))


def four_bit(kind, x, block):
    codes, state = F.quantize_4bit(x, blocksize=block, quant_type=kind)
    wide = F.QuantState(state.absmax, x.shape, state.code, block, kind, torch.float32)
    out = codes.numpy().tobytes() + state.absmax.numpy().astype("<f4").tobytes()
    out += dequantized(codes, state.absmax, state, block, x.shape, F.dequantize_4bit(codes, wide))
    again, state = F.quantize_4bit(x, blocksize=block, quant_type=kind, compress_statistics=True)
    assert torch.equal(codes, again)
    absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    wide = F.QuantState(absmax, x.shape, state.code, block, kind, torch.float32)
    out += state.absmax.numpy().tobytes() + state.state2.absmax.numpy().astype("<f4").tobytes()
    return out + struct.pack("<f", state.offset) + dequantized(codes, absmax, state, block, x.shape, F.dequantize_4bit(codes, wide))


def main(path):
    with open(path, "wb") as f:
        f.write(b"EGBNBQ01" + F.create_dynamic_map().numpy().astype("<f4").tobytes())
        seed = 0
        for i, (rows, cols, block) in enumerate(SHAPES):
            for kind, name in enumerate(["nf4", "fp4"]):
                for form in (PLAIN, OUTLIERS, TINY, ZEROS):
                    for dtype in range(3):
                        if form == TINY and dtype == 2:
                            continue  # below what f16 holds
                        if rows * cols > 1000 and (kind + form + dtype + i) % 4:
                            continue  # keeps the file small
                        seed += 1
                        x = tensor(form, seed, rows * cols).to(DTYPES[dtype]).reshape(rows, cols)
                        f.write(struct.pack("<BBBIIII", kind, dtype, form, rows, cols, block, seed) + four_bit(name, x, block))
        for rows, cols in [(5, 64), (3, 33), (7, 100), (1, 1000), (40, 96)]:
            for form in (PLAIN, OUTLIERS, ZEROS):
                for dtype in range(3):
                    seed += 1
                    x = tensor(form, seed, rows * cols).to(DTYPES[dtype]).reshape(rows, cols)
                    w = Int8Params(x, requires_grad=False).to("cpu")
                    f.write(struct.pack("<BBBIIII", 2, dtype, form, rows, cols, 0, seed))
                    f.write(w.data.numpy().tobytes() + w.SCB.numpy().astype("<f4").tobytes())


if __name__ == "__main__":
    main(sys.argv[1])
