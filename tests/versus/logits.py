#!/usr/bin/env python3
"""Compare airstream's logits with llama.cpp's, over the whole vocabulary.

    airstream perplexity MODEL --tokens IDS --logits OURS.bin
    logits.py OURS.bin MODEL --tokens IDS [--against EXPANDED] [--threads 2]

OURS.bin: raw little-endian f32, positions x vocabulary. IDS: token ids, one a line; no
beginning-of-text token is added. With --against, the reference is that file instead of MODEL: give
the output of tests/reference/expand.py there to compare with the model's exact distribution.
Prints KL(llama.cpp || airstream) and top-1 agreement, and llama.cpp's own KL between one batch and
one token at a time: no engine that rounds activations to 8 bits can be asked to be closer than that.
What to install: see tests/reference/llama.py.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "reference"))
import llama  # noqa: E402


def divergence(p, q):
    """KL(p || q) in nats of two rows of log-probabilities."""
    return float((np.exp(p) * (p - q)).sum())


class Tally:
    """KL, top-1 and perplexity over the positions of a text."""

    def __init__(self):
        self.kl, self.same, self.nll, self.reference_nll = [], [], [], []

    def add(self, reference, other, following):
        self.kl.append(divergence(reference, other))
        self.same.append(reference.argmax() == other.argmax())
        if following is not None:
            self.nll.append(-other[following])
            self.reference_nll.append(-reference[following])

    def row(self, name):
        ours, reference = np.exp(np.mean(self.nll)), np.exp(np.mean(self.reference_nll))
        return (
            f"| {name} | {np.mean(self.kl):.3g} | {np.max(self.kl):.3g} | {np.mean(self.same):.2%} "
            f"| {ours:.4f} | {reference:.4f} | {ours / reference - 1:+.3%} |"
        )


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("ours")
    ap.add_argument("model")
    ap.add_argument("--tokens", required=True)
    ap.add_argument("--against")
    ap.add_argument("--threads", type=int, default=2)
    a = ap.parse_args()

    ids = [int(line) for line in pathlib.Path(a.tokens).read_text().split()]
    context = max(512, -(-len(ids) // 256) * 256)
    model = llama.Model(a.against or a.model, n_ctx=context, threads=a.threads)
    size = pathlib.Path(a.ours).stat().st_size
    if size != len(ids) * model.vocab_size * 4:
        raise SystemExit(f"{a.ours} has {size} bytes, not {len(ids)} positions x {model.vocab_size} x 4")
    ours = np.memmap(a.ours, dtype="<f4", shape=(len(ids), model.vocab_size))

    model.decode(ids)
    reference = [llama.log_softmax(model.logits(i)) for i in range(len(ids))]
    model.clear()
    with_us, with_itself = Tally(), Tally()
    for i, token in enumerate(ids):
        following = ids[i + 1] if i + 1 < len(ids) else None
        with_us.add(reference[i], llama.log_softmax(np.array(ours[i])), following)
        model.decode([token], start=i)
        with_itself.add(reference[i], llama.log_softmax(model.logits(0)), following)
    model.close()

    print("| against llama.cpp, one batch | mean KL | max KL | same top-1 | perplexity | llama.cpp's | difference |")
    print("|---|---|---|---|---|---|---|")
    print(with_us.row("airstream"))
    print(with_itself.row("llama.cpp, one by one"))


if __name__ == "__main__":
    main()
