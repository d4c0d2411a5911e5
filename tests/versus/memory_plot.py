#!/usr/bin/env python3
"""Plot decode speed over memory for airstream and llama.cpp on one model: an SVG, and a Markdown table on stdout.

    memory_plot.py MODEL.gguf --svg OUT.svg [--airstream target/release/airstream] [--threads 2] [-n 8] [-r 3]
                   [--percent 25,40,60,80,100] [--limit-memory SCRIPT] [--headroom 64] [--peer-headroom 64]
                   [--no-peer] [--points FILE]

At each share of the file, airstream and llama.cpp take turns (A B A B ..., -r rounds), each in a process of
its own. airstream gets --memory; its roofline is what `bench` predicts from the disk's speed measured between
slices of decoding. llama.cpp reads through mmap without repacking, its best setting where the model does not
fit (repacking would copy the weights into memory that is not there). With --limit-memory both run under
`SCRIPT MIB COMMAND...`, which must bound the memory of COMMAND, page cache included (a cgroup): the budget
plus --headroom for airstream (what the process maps apart from its budget: its own code and libraries), plus
--peer-headroom for llama.cpp. The peer's part starts cold and times -n tokens after two to warm up, in slices
of at most --seconds. With --points what is measured is added to FILE (JSON lines), and all of FILE is shown: so
a long measurement can be made in pieces (--percent "" only shows). Without --limit-memory llama.cpp keeps the model in the page cache: compare with care.
What to install: see tests/reference/llama.py; run this with the Python that has it (or give --python).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
COLORS = {"airstream": "#0b6", "llama.cpp": "#c33", "roofline": "#888"}


def peer(model_path, threads, n, seconds):
    """Decode speed of llama.cpp in tok/s, one token at a time, mmap on, no repacking."""
    sys.path.insert(0, str(HERE.parent / "reference"))
    import llama

    model = llama.Model(model_path, n_ctx=256, n_batch=32, threads=threads, exact=False, mapped=True)
    for position in range(2):
        model.decode([17], start=position, want="last")
    begun, done = time.perf_counter(), 0
    while done < n and (done == 0 or time.perf_counter() - begun < seconds):
        model.decode([(done * 104729 + 7) % model.vocab_size], start=2 + done, want="last")
        done += 1
    return done / (time.perf_counter() - begun)


def run(command, limit, mib):
    """The command's JSON, or None and why there is none."""
    if limit:
        command = [limit, str(mib)] + command
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        killed = done.returncode in (-9, 137)
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return None, "killed" if killed else (lines[-2] if len(lines) > 1 else lines[-1] if lines else "failed")
    return json.loads(done.stdout), None


def measure(a, percent, size):
    """Speeds of both at one budget."""
    budget = size * percent // 100
    found = {"percent": percent, "budget": budget, "airstream": [], "roofline": [], "share": [], "llama.cpp": []}
    why = {}
    for _ in range(a.r):
        command = [a.airstream, "bench", a.model, "-p", "0", "-n", str(a.n), "-r", "1"]
        command += ["--threads", str(a.threads), "--memory", str(budget), "--ctx", str(a.ctx), "--json"]
        report, why["airstream"] = run(command, a.limit_memory, (budget >> 20) + a.headroom)
        if report:
            found["airstream"].append(report["tg"]["median_tok_s"])
            found["roofline"].append(1 / report["roofline"]["seconds"])
            found["share"].append(report["roofline_share"])
            found["read"] = report["tg"]["disk_bytes_per_token"]
            found["planned"] = report["roofline"]["streamed_bytes"]
        if not a.no_peer:
            command = [a.python, str(HERE / "memory_plot.py"), "--peer"]
            command += [json.dumps([a.model, a.threads, a.n, a.seconds])]
            speed, why["llama.cpp"] = run(command, a.limit_memory, (budget >> 20) + a.peer_headroom)
            if speed:
                found["llama.cpp"].append(speed)
    for who, reason in why.items():
        if reason:
            print(f"{who} at {percent}%: {reason}", file=sys.stderr)
    return found


def median(values):
    return statistics.median(values) if values else None


def ticks(top):
    """About five round numbers from 0 to `top`."""
    step = 10.0 ** len(str(int(top))) / 100
    while top / step > 6:
        step *= 2 if f"{step:e}"[0] == "1" else 2.5 if f"{step:e}"[0] == "2" else 2
    return [i * step for i in range(int(top / step) + 2)]


def svg(points, title):
    """The plot, as text."""
    width, height, left, right, top, bottom = 720, 420, 70, 20, 50, 60
    speeds = [median(p[who]) or 0 for p in points for who in COLORS]
    marks = ticks(max(speeds + [0.01]))
    low, high = points[0]["percent"], points[-1]["percent"]

    def x(percent):
        return left + (percent - low) / max(high - low, 1) * (width - left - right)

    def y(speed):
        return height - bottom - speed / marks[-1] * (height - top - bottom)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="22" font-size="15">{title}</text>',
    ]
    for mark in marks:
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y(mark):.1f}" y2="{y(mark):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for p in points:
        at = f'x="{x(p["percent"]):.1f}" text-anchor="middle"'
        out.append(f'<text {at} y="{height - bottom + 20}">{p["percent"]}%</text>')
        out.append(f'<text {at} y="{height - bottom + 36}" fill="#888" font-size="11">{p["budget"] / 2**20:.0f} MiB</text>')
    out.append(f'<text x="{left}" y="{top - 10}" fill="#555">tok/s</text>')
    out.append(f'<text x="{(left + width) / 2:.0f}" y="{height - 8}" text-anchor="middle" fill="#555">memory, in percent of the model file</text>')
    for row, (who, color) in enumerate(COLORS.items()):
        seen = [(x(p["percent"]), p[who]) for p in points if p[who]]
        if not seen:
            continue
        line = " ".join(f"{px:.1f},{y(median(values)):.1f}" for px, values in seen)
        dashes = ' stroke-dasharray="6 4"' if who == "roofline" else ""
        out.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>')
        for px, values in seen if who != "roofline" else []:
            out.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y(min(values)):.1f}" y2="{y(max(values)):.1f}" stroke="{color}"/>')
            out.append(f'<circle cx="{px:.1f}" cy="{y(median(values)):.1f}" r="4" fill="{color}"/>')
        out.append(f'<line x1="{left + 16}" x2="{left + 46}" y1="{top + 14 + 18 * row}" y2="{top + 14 + 18 * row}" stroke="{color}" stroke-width="2"{dashes}/>')
        out.append(f'<text x="{left + 54}" y="{top + 18 + 18 * row}">{who}</text>')
    return "\n".join(out + ["</svg>", ""])


def cell(values, digits=2):
    if not values:
        return "-"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main():
    if sys.argv[1:2] == ["--peer"]:
        print(json.dumps(peer(*json.loads(sys.argv[2]))))
        return
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--svg", required=True)
    ap.add_argument("--airstream", default=str(HERE.parent.parent / "target/release/airstream"))
    ap.add_argument("--python", default=sys.executable)
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("-n", type=int, default=8)
    ap.add_argument("-r", type=int, default=3)
    ap.add_argument("--ctx", type=int, default=256)
    ap.add_argument("--seconds", type=float, default=60)
    ap.add_argument("--percent", default="25,40,60,80,100")
    ap.add_argument("--limit-memory", metavar="SCRIPT")
    ap.add_argument("--headroom", type=int, default=64, metavar="MIB")
    ap.add_argument("--peer-headroom", type=int, default=64, metavar="MIB")
    ap.add_argument("--no-peer", action="store_true")
    ap.add_argument("--points", metavar="FILE", type=pathlib.Path)
    a = ap.parse_args()

    size = os.path.getsize(a.model)
    print(f"{pathlib.Path(a.model).name}, {size / 2**20:.0f} MiB; {a.threads} threads; {a.r} rounds of {a.n} tokens; "
          f"{'limited' if a.limit_memory else 'page cache not limited'}; load {os.getloadavg()[0]:.1f} at the start\n")
    print("| memory | airstream tok/s | roofline tok/s | share | disk per token (planned) | llama.cpp tok/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    points = []
    if a.points and a.points.exists():
        points = [json.loads(line) for line in a.points.read_text().splitlines()]
    for percent in (int(p) for p in a.percent.split(",") if p):
        p = measure(a, percent, size)
        points.append(p)
        if a.points:
            with a.points.open("a") as out:
                print(json.dumps(p), file=out)
    points.sort(key=lambda p: p["percent"])
    for p in points:
        percent = p["percent"]
        ours, theirs = median(p["airstream"]), median(p["llama.cpp"])
        ratio = f"{ours / theirs:.2f}" if ours and theirs else "-"
        disk = f"{p['read'] / 2**20:.1f} ({p['planned'] / 2**20:.1f}) MiB" if "read" in p else "-"
        share = f"{median(p['share']):.2f}" if p["share"] else "-"
        print(f"| {percent}% = {p['budget'] / 2**20:.0f} MiB | {cell(p['airstream'])} | {cell(p['roofline'])} | {share} "
              f"| {disk} | {cell(p['llama.cpp'])} | {ratio} |", flush=True)
    title = f"{pathlib.Path(a.model).name}: decode speed over memory"
    pathlib.Path(a.svg).write_text(svg(points, title))


if __name__ == "__main__":
    main()
