#!/usr/bin/env python3
"""Write a GGUF again with every weight expanded to F32.

    expand.py MODEL OUT

llama.cpp quantizes activations to 8 bits before it multiplies them with quantized weights; with F32
weights it does not, so on OUT it computes the model's distribution exactly (but for f32 rounding).
Needs PyPI gguf and numpy. OUT is 4 bytes a weight.
"""

import argparse

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("out")
    a = ap.parse_args()

    source = GGUFReader(a.model)
    arch = source.fields["general.architecture"].contents()
    out = GGUFWriter(a.out, arch)
    for key, field in source.fields.items():
        # The writer sets these itself.
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        out.add_key_value(key, field.contents(), kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in source.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        # The reader gives shapes as the file stores them, innermost first; numpy wants the reverse.
        out.add_tensor(tensor.name, values.reshape([int(n) for n in reversed(tensor.shape)]))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    main()
