#!/usr/bin/env python3
"""Write a GGUF of the shape of Llama-3-8B with random Q4_0 weights (4.2 GB), for speeds alone.

    write_8b.py OUT.gguf [--layers 32]

Needs no package. Its tokens are plain numbers (vocabulary model `no_vocab`).
"""

import argparse
import os
import struct

WIDTH, FEED_FORWARD, KV_WIDTH, VOCABULARY = 4096, 14336, 1024, 49152
ALIGNMENT = 32
F32, Q4_0 = 0, 2


def text(value):
    value = value.encode()
    return struct.pack("<Q", len(value)) + value


def metadata(layers):
    """Keys with the type's number and bytes of their values."""
    strings = {"general.architecture": "llama", "tokenizer.ggml.model": "no_vocab"}
    numbers = {
        "llama.vocab_size": VOCABULARY,
        "llama.context_length": 8192,
        "llama.embedding_length": WIDTH,
        "llama.block_count": layers,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.rope.dimension_count": 128,
    }
    floats = {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 500000.0}
    entries = [(key, 8, text(value)) for key, value in strings.items()]
    entries += [(key, 4, struct.pack("<I", value)) for key, value in numbers.items()]
    return entries + [(key, 6, struct.pack("<f", value)) for key, value in floats.items()]


def tensors(layers):
    """Names with columns and rows; a single row is a norm's weights."""
    yield "token_embd", WIDTH, VOCABULARY
    for layer in range(layers):
        for name, columns, rows in [
            ("attn_norm", WIDTH, 1),
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH, KV_WIDTH),
            ("attn_v", WIDTH, KV_WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_norm", WIDTH, 1),
            ("ffn_gate", WIDTH, FEED_FORWARD),
            ("ffn_up", WIDTH, FEED_FORWARD),
            ("ffn_down", FEED_FORWARD, WIDTH),
        ]:
            yield f"blk.{layer}.{name}", columns, rows
    yield "output_norm", WIDTH, 1
    yield "output", WIDTH, VOCABULARY


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("--layers", type=int, default=32)
    a = ap.parse_args()

    # Blocks of a scale of 2^-9 and 32 values of 4 bits; any piece of them is as random as another.
    blocks = bytearray(os.urandom(18 << 18))
    blocks[0::18] = bytes(1 << 18)
    blocks[1::18] = b"\x18" * (1 << 18)

    infos, data, offset = b"", [], 0
    for name, columns, rows in tensors(a.layers):
        size = 4 * columns if rows == 1 else rows * columns // 32 * 18
        shape = struct.pack("<IQ", 1, columns) if rows == 1 else struct.pack("<IQQ", 2, columns, rows)
        infos += text(f"{name}.weight") + shape + struct.pack("<IQ", F32 if rows == 1 else Q4_0, offset)
        data.append((rows == 1, size))
        offset += size + -size % ALIGNMENT
    entries = metadata(a.layers)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(data), len(entries))
    head += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in entries) + infos

    with open(a.out, "wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for is_norm, size in data:
            rest = size
            while rest > 0:
                piece = struct.pack("<f", 1.0) * (size // 4) if is_norm else memoryview(blocks)[:rest]
                rest -= file.write(piece)
            file.write(bytes(-size % ALIGNMENT))


if __name__ == "__main__":
    main()
