"""Golden blocks for crates/kernels: random f32 and the Q4_K, Q5_K and Q6_K blocks that ggml makes of them.

    pip install numpy==2.4.6 xllamacpp==2026.10.11549
    python golden/k_quant_blocks.py crates/kernels/tests/golden/k_quant_blocks.bin

The gguf package cannot encode these; ggml's own `ggml_quantize_chunk` in the wheel of xllamacpp does. File,
little-endian: b"EGKQUANT", then records until the end: u8 ggml type, u32 byte count, u32 element count, bytes, f32s.
"""

import ctypes
import struct
import sys
from pathlib import Path

import numpy as np
import xllamacpp

# ggml's type numbers and bytes of a block of 256
TYPES = {12: 144, 13: 176, 14: 210}


def values(rng):
    """Weights as they occur, and what is special about them."""
    x = (rng.standard_t(5, size=(24, 256)) * 0.02).astype(np.float32)
    x[0] = 0.0
    x[1] = 0.25  # constant
    x[2] = -0.25
    x[3] = np.abs(x[3])  # no minimum to subtract
    x[4] = -np.abs(x[4])
    x[5] *= 1e-6  # scales are subnormal f16
    x[6] *= 1e-12  # scales are 0 in f16
    x[7, :32] = 0.0  # one sub-block of nothing
    x[8, 5] = 3.0  # outliers
    x[9, 200] = -7.0
    x[10] = np.arange(256) - 128
    x[11] = np.where(rng.random(256) < 0.9, 0, x[11])
    x[12, 64:96] *= 1e-3  # sub-blocks of very different size
    x[13] = np.round(x[13] * 200) / 200  # many ties
    return x


def main(path):
    lib = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    quantize = lib.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rng = np.random.default_rng(20250301)
    with open(path, "wb") as f:
        f.write(b"EGKQUANT")
        for kind, size in TYPES.items():
            x = values(rng)
            out = np.zeros(len(x) * size, np.uint8)
            done = quantize(kind, x.ctypes.data, out.ctypes.data, 0, len(x), 256, None)
            assert done == len(out)
            f.write(struct.pack("<BII", kind, len(out), x.size) + out.tobytes() + x.astype("<f4").tobytes())


if __name__ == "__main__":
    main(sys.argv[1])
