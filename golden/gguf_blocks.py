"""Golden blocks for crates/kernels: random GGUF blocks with the f32 that the gguf package decodes them to,
and random f32 with the blocks that it encodes them to.

    pip install gguf==0.19.0 numpy==2.4.6
    python golden/gguf_blocks.py crates/kernels/tests/golden/gguf_blocks.bin

A second argument asks for so many more random blocks of every type: a larger check, whose file is not kept.

File, little-endian: b"EGBLOCK1", then records until the end:
    u8 direction (0 decode, 1 encode), u8 length of name, name, u32 byte count, u32 element count, bytes, f32s.
"""

import struct
import sys

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

DECODE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
ENCODE = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
# Where a block keeps its f16 scales: all other bytes are random.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}
# positive, negative, zeros of both signs, the smallest and largest subnormals, the largest finite
EDGE_SCALES = [0x2E66, 0xAE66, 0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF]


MORE = int(sys.argv[2]) if len(sys.argv) > 2 else 0


def random_blocks(name, rng):
    """u8 [blocks, bytes]: one block per edge scale, then one (or more) with random finite scales."""
    size = GGML_QUANT_SIZES[T[name]][1]
    blocks = rng.integers(0, 256, (len(EDGE_SCALES) + 1 + MORE, size), dtype=np.uint8)
    for i, block in enumerate(blocks):
        for j, at in enumerate(SCALES[name]):
            if i < len(EDGE_SCALES):
                # the minimum takes the next edge, so that pairs differ
                bits = EDGE_SCALES[(i + j) % len(EDGE_SCALES)]
            else:
                bits = int(np.float16(rng.normal()).view(np.uint16))
            block[at], block[at + 1] = bits & 255, bits >> 8
    return blocks


def decode_case(name, rng):
    if name in SCALES:
        data = random_blocks(name, rng)
        return data.tobytes(), dequantize(data, T[name]).astype(np.float32).ravel()
    if name == "F32":
        values = rng.normal(size=67 + MORE).astype(np.float32)
        return values.tobytes(), values
    bits = rng.integers(0, 1 << 16, 301 + MORE, dtype=np.uint16)
    if name == "F16":
        bits = bits[(bits & 0x7C00) != 0x7C00]  # finite
        return bits.tobytes(), dequantize(bits.view(np.uint8).reshape(1, -1), T.F16).ravel()
    bits = bits[(bits & 0x7F80) != 0x7F80]
    return bits.tobytes(), dequantize(bits.view(np.uint8).reshape(1, -1), T.BF16).ravel()


def encode_case(name, rng):
    blocks = rng.normal(size=(12 + MORE, 32)).astype(np.float32) * np.float32(0.05)
    blocks[1] = 0.0
    blocks[2] = 0.25  # constant: scale 0 with a minimum
    blocks[3] = np.abs(blocks[3])
    blocks[4] = -np.abs(blocks[4])
    blocks[5] *= 1e-5  # scale is a subnormal f16
    blocks[6] *= 1e-9  # scale rounds to 0 in f16
    blocks[7, 3], blocks[7, 20] = -0.7, 0.7  # a tie for the largest magnitude
    blocks[8] = np.arange(32) - 16
    return quantize(blocks, T[name]).tobytes(), blocks.ravel()


def main(path):
    rng = np.random.default_rng(20240607)
    with open(path, "wb") as f:
        f.write(b"EGBLOCK1")
        for direction, names, case in [(0, DECODE, decode_case), (1, ENCODE, encode_case)]:
            for name in names:
                raw, values = case(name, rng)
                assert np.isfinite(values).all(), name
                f.write(struct.pack("<BB", direction, len(name)) + name.encode())
                f.write(struct.pack("<II", len(raw), len(values)) + raw + values.astype("<f4").tobytes())


if __name__ == "__main__":
    main(sys.argv[1])
