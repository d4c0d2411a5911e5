#!/usr/bin/env python3
"""Time llama.cpp and airstream in turns on the same models, and print a table with the ratios.

    bench.py [--airstream target/release/airstream] [--threads 2] [-p 512] [-n 128] [-r 5]
             [--rounds 2] [--memory SIZE] [--only llama.cpp|airstream] [--activations 12,8] NAME=MODEL...

Each round times llama.cpp, then airstream with activations rounded to each number of bits (A B C A B
C ...), each in a process of its own, so that all see the same weather on the machine; medians over all
repetitions of all rounds. llama.cpp rounds activations to 8 bits, airstream to 12 by default, so the
column of 8 bits compares at equal precision. llama.cpp is called
through its C API (llama_decode): -p tokens as one batch of one ubatch, then -n tokens one at a time,
after a warm-up, at its defaults (mmap, repacking, flash attention "auto"), without mlock. Run it with
nothing else on the machine. What to install: see tests/reference/llama.py.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent


def peer(model_path, threads, p, n, r):
    """Repetitions of prefill and decode with llama.cpp: {"pp": [tok/s], "tg": [tok/s]}."""
    sys.path.insert(0, str(HERE.parent / "reference"))
    import llama

    model = llama.Model(model_path, n_ctx=max(p, 256) + n, n_batch=max(p, 1), threads=threads, exact=False)
    # The words do not matter to the clock; the ids only have to be valid.
    prompt = [(i * 7919 + 13) % model.vocab_size for i in range(p)]
    speeds = {"pp": [], "tg": []}
    for repetition in range(r + 1):
        model.clear()
        begun = time.perf_counter()
        if p:
            model.decode(prompt, want="last")
        middle = time.perf_counter()
        if p:
            model.clear()
        after_warm_up = time.perf_counter()
        for i in range(n):
            model.decode([(i * 104729 + 7) % model.vocab_size], start=i, want="last")
        ended = time.perf_counter()
        # The first repetition is the warm-up: pages come in, threads start.
        if repetition:
            if p:
                speeds["pp"].append(p / (middle - begun))
            if n:
                speeds["tg"].append(n / (ended - after_warm_up))
    model.close()
    return speeds


def run_peer(a, model):
    command = [sys.executable, __file__, "--peer", json.dumps([model, a.threads, a.p, a.n, a.r])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def run_airstream(a, model, bits):
    command = [a.airstream, "bench", model, "-p", str(a.p), "-n", str(a.n), "-r", str(a.r)]
    command += ["--threads", str(a.threads), "--activations", bits, "--json"]
    if a.memory:
        command += ["--memory", a.memory]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    # airstream repeats and takes the median itself.
    return {kind: [report[kind]["median_tok_s"]] if report[kind] else [] for kind in ("pp", "tg")}


def machine():
    """The processor, its cores and the load the table was taken under."""
    info = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    load = os.getloadavg()[0]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs, load {load:.1f} at the start"


def main():
    if sys.argv[1:2] == ["--peer"]:
        print(json.dumps(peer(*json.loads(sys.argv[2]))))
        return
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("models", nargs="+", metavar="NAME=MODEL")
    ap.add_argument("--airstream", default=str(HERE.parent.parent / "target/release/airstream"))
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("-p", type=int, default=512)
    ap.add_argument("-n", type=int, default=128)
    ap.add_argument("-r", type=int, default=5)
    ap.add_argument("--rounds", type=int, default=2)
    ap.add_argument("--memory")
    ap.add_argument("--only", choices=["llama.cpp", "airstream"])
    ap.add_argument("--activations", default="12,8")
    a = ap.parse_args()

    runs = {"llama.cpp": run_peer}
    for bits in a.activations.split(","):
        runs[f"{bits} bits"] = functools.partial(run_airstream, bits=bits)
    if a.only == "llama.cpp":
        runs = {"llama.cpp": run_peer}
    elif a.only:
        del runs["llama.cpp"]
    print(f"{machine()}; {a.threads} threads\n")
    columns = [f"{who} tok/s (spread) |" + (" ratio |" if who != "llama.cpp" else "") for who in runs]
    print("| model | test |", *columns)
    print("|---" * (2 + sum(column.count("|") for column in columns)) + "|")
    for item in a.models:
        name, _, path = item.rpartition("=")
        speeds = {who: {"pp": [], "tg": []} for who in runs}
        for _ in range(a.rounds):
            for who, measure in runs.items():
                for kind, values in measure(a, path).items():
                    speeds[who][kind] += values
        for kind, count in (("pp", a.p), ("tg", a.n)):
            if count:
                cells = []
                for who in runs:
                    values = speeds[who][kind]
                    median = statistics.median(values)
                    cells.append(f"{median:.1f} ({min(values):.1f} to {max(values):.1f})")
                    if who != "llama.cpp":
                        theirs = speeds.get("llama.cpp", {}).get(kind)
                        cells.append(f"{median / statistics.median(theirs):.2f}" if theirs else "-")
                print(f"| {name or pathlib.Path(path).name} | {kind}{count} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
