#!/usr/bin/env python3
"""Write llama.cpp's distribution at every position of a text, compactly.

    logits.py MODEL --text FILE --out FILE [--positions 288] [--keep 512] [--threads 2]

Default CPU settings of llama.cpp, one batch, context 512, f16 KV, flash attention off; the text is
tokenized by llama.cpp with the beginning-of-text token where the model asks for one.
What to install: see llama.py. How the fixtures were made:

    for the exact distribution of the model (f32 activations):
        expand.py MODEL EXPANDED; logits.py EXPANDED --text text.txt --out NAME-exact.ref
    for llama.cpp as people run it (activations rounded to 8 bits before each matrix):
        logits.py MODEL --text text.txt --out NAME-default.ref

The two are not close: rounding activations moves the distribution by a mean KL divergence of 0.003
to 0.006 on these models, and chaotically, so that llama.cpp's own one-batch and one-by-one runs
differ by as much. Agreement is therefore tested against the exact one, and the default one says
how far an 8-bit engine is from it.

tests/support/reference.rs reads the file:

    8 bytes  magic "ASREF\\0\\0\\1"
    u32      positions
    u32      vocabulary size
    u32      keep
    then for every position, all little-endian:
        u32        token id at this position
        f32        log-probability of the next token (NaN at the last position)
        f32        log of the probability mass outside the kept ids
        u32 x keep ids, most probable first
        f32 x keep their log-probabilities
"""

import argparse
import pathlib
import struct
import sys

import llama
import numpy as np


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--text", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--positions", type=int, default=288)
    ap.add_argument("--keep", type=int, default=512)
    ap.add_argument("--threads", type=int, default=2)
    a = ap.parse_args()

    model = llama.Model(a.model, n_ctx=512, threads=a.threads)
    ids = model.tokenize(pathlib.Path(a.text).read_text(encoding="utf-8"))
    whole = len(ids)
    ids = ids[: a.positions]
    following = ids[1:]
    keep = min(a.keep, model.vocab_size - 1)
    model.decode(ids)

    nll, top1 = [], 0
    with open(a.out, "wb") as out:
        out.write(b"ASREF\0\0\1" + struct.pack("<III", len(ids), model.vocab_size, keep))
        for i, token in enumerate(ids):
            logp = llama.log_softmax(model.logits(i))
            order = np.argsort(-logp, kind="stable")
            kept, rest = order[:keep], order[keep:]
            tail = np.log(np.exp(logp[rest]).sum())
            next_logp = float("nan")
            if i < len(following):
                next_logp = logp[following[i]]
                nll.append(-next_logp)
                top1 += int(order[0] == following[i])
            out.write(struct.pack("<Iff", token, next_logp, tail))
            out.write(kept.astype("<u4").tobytes())
            out.write(logp[kept].astype("<f4").tobytes())
    print(
        f"{a.model}: {len(ids)} of {whole} tokens, vocabulary {model.vocab_size}, "
        f"perplexity {np.exp(np.mean(nll)):.4f} over {len(nll)}, "
        f"next token first at {top1 / len(nll):.1%} (llama-cpp-python {llama.VERSION})",
        file=sys.stderr,
    )
    model.close()


if __name__ == "__main__":
    main()
