#!/usr/bin/env python3
"""Writes tests/fixtures/quant_rows.json: quant blocks and the values they stand for.

The values come from `gguf.quants.dequantize` (PyPI `gguf`, the Python package of the GGUF format;
last run with 0.19.0 and numpy 2.4.6). For each type two blocks of random bytes, whose f16 fields are
set to plain numbers; F32, F16 and BF16 have 32 values. Bytes and values are hex; the values are f32,
little-endian, so that the comparison is bit for bit.

    python3 -m pip install gguf==0.19.0
    python3 tests/reference/quant_rows.py
"""

import json
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize

# Byte offsets of the f16 fields in a block.
HALVES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
}  # fmt: skip


def main() -> None:
    rng = np.random.default_rng(20250101)
    out = {}
    for qtype in [T.F32, T.F16, T.BF16, *HALVES]:
        values, size = GGML_QUANT_SIZES[qtype]
        if qtype in HALVES:
            blocks = rng.integers(0, 256, (2, size), dtype=np.uint8)
            for at in HALVES[qtype]:
                d = rng.normal(0, 0.1, (2, 1)).astype("<f2")
                blocks[:, at : at + 2] = d.view(np.uint8)
        else:
            x = rng.normal(0, 1, (1, 32)).astype("<f4")
            blocks = {
                T.F32: x.view(np.uint8),
                T.F16: x.astype("<f2").view(np.uint8),
                # The upper half of an f32.
                T.BF16: np.ascontiguousarray(x.view("<u2")[:, 1::2]).view(np.uint8),
            }[qtype]
        if qtype == T.F32:
            y = blocks.view("<f4")
        elif qtype == T.F16:
            y = blocks.view("<f2").astype("<f4")
        else:
            y = dequantize(blocks, qtype)
        y = np.ascontiguousarray(y, dtype="<f4")
        out[qtype.name] = {"bytes": blocks.tobytes().hex(), "values": y.tobytes().hex()}
    path = Path(__file__).parent.parent / "fixtures" / "quant_rows.json"
    path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
