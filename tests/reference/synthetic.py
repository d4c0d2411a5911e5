#!/usr/bin/env python3
"""Write llama.cpp's logits for the small random models of tests/support/synth.rs.

    AIRSTREAM_SYNTH_DIR=FOLDER cargo test --release --test synth -- --ignored
    synthetic.py FOLDER --out tests/fixtures/reference/synthetic [--threads 2]

For FOLDER/NAME.gguf, the logits after each of 40 tokens, token i being (i * 7919 + 13) % vocabulary, go
to OUT/NAME.f32: raw little-endian f32, positions x vocabulary. The weights are expanded to F32 first
(expand.py), so that the logits are those of the model and not of an activation's rounding; f16 KV,
flash attention off. With --default the files are evaluated as they are, and only the KL
divergence from the expanded run is printed. What to install: see llama.py; PyPI gguf besides.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import llama
import numpy as np

POSITIONS = 40


def evaluate(path, threads):
    """The logits of all positions, positions x vocabulary."""
    model = llama.Model(path, n_ctx=256, threads=threads)
    ids = [(i * 7919 + 13) % model.vocab_size for i in range(POSITIONS)]
    model.decode(ids)
    rows = np.stack([model.logits(i) for i in range(POSITIONS)])
    model.close()
    return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder")
    ap.add_argument("--out", required=True)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--default", action="store_true")
    a = ap.parse_args()

    out = pathlib.Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(pathlib.Path(a.folder).glob("*.gguf")):
        with tempfile.TemporaryDirectory() as scratch:
            expanded = pathlib.Path(scratch) / path.name
            expand = pathlib.Path(__file__).resolve().with_name("expand.py")
            subprocess.run([sys.executable, expand, path, expanded], check=True)
            exact = evaluate(expanded, a.threads)
        if not np.isfinite(exact).all():
            raise SystemExit(f"{path}: logits are not finite")
        line = f"{path.stem}: logits {exact.min():.2f} to {exact.max():.2f}, deviation {exact.std():.2f}"
        if a.default:
            p = [llama.log_softmax(row) for row in exact]
            q = [llama.log_softmax(row) for row in evaluate(path, a.threads)]
            kl = [float((np.exp(x) * (x - y)).sum()) for x, y in zip(p, q)]
            same = np.mean([x.argmax() == y.argmax() for x, y in zip(p, q)])
            line += f"; as it is: mean KL {np.mean(kl):.3g}, max {np.max(kl):.3g}, same top-1 {same:.0%}"
        else:
            (out / f"{path.stem}.f32").write_bytes(exact.astype("<f4").tobytes())
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
