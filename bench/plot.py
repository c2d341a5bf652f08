#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Plots what long_context printed: memory and attention time per token against context length; or what kv1-lm sweep
wrote with --csv: what a policy costs against what it takes; or kv1-train's logs: their curves; or what long-context of
examples/llama_cpp/graph printed: memory and time of a whole model against context length.

usage: plot.py RESULT.json OUTPUT_FOLDER        writes context_memory.svg and context_time.svg
       plot.py RESULT.csv OUTPUT_FOLDER         writes policies.svg; training.svg of a log; or long_context.svg
       plot.py LOG.csv LOG.csv .. OUTPUT_FOLDER writes training.svg of several logs, named as their files
"""
import csv
import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

LABELS = {"affine2": "kv1, 2 bits", "affine8": "int8", "fp16": "fp16"}
COLOURS = {"affine2": "#0b6e4f", "affine8": "#c17c18", "fp16": "#6c757d"}


def draw(rows, field, factor, label, path):
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, text in LABELS.items():
        points = [(r["tokens"] / 1024, r[field] * factor) for r in rows if r["format"] == name and r[field] is not None]
        if points:
            axes.plot(*zip(*sorted(points)), marker="o", label=text, color=COLOURS[name])
    axes.set_xlabel("cached tokens (thousands of 1,024)")
    axes.set_ylabel(label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def short_name(policy):
    """Bits of keys and values, p where per channel; an asterisk where single layers differ; fp16 sinks and window."""
    sides, _, window = policy.partition("@")
    sides, _, layers = sides.partition("/")
    bits = [side.partition("+")[0] + ("p" if side.endswith("+channel") else "") for side in sides.split(",")]
    name = "/".join(bits) + ("*" if layers else "")
    return name + (f" + fp16 {window.replace(':', ', ')}" if window else "")


def draw_policies(rows, path):
    models = list(dict.fromkeys(r["model"] for r in rows))
    figure, all_axes = plt.subplots(1, len(models), figsize=(4.8 * len(models), 4.2), layout="constrained", squeeze=False)
    for axes, model in zip(all_axes[0], models):
        # wider than 4 bits: another scale
        rows = [r for r in rows if float(r["bytes_per_vector"]) <= 24]
        points = sorted((float(r["bytes_per_vector"]), float(r["kld"]), r["policy"]) for r in rows if r["model"] == model)
        best, front = float("inf"), []
        for point in points:  # of equal bytes the better one comes first
            if point[1] < best:
                best = point[1]
                front.append(point)
        axes.plot([p[0] for p in front], [p[1] for p in front], color="#0b6e4f", zorder=1)
        axes.scatter([p[0] for p in points], [p[1] for p in points], color="#6c757d", s=14, zorder=2)
        axes.scatter([p[0] for p in front], [p[1] for p in front], color="#0b6e4f", s=26, zorder=3)
        for n, (size, kld, policy) in enumerate(front):
            below = n % 2 == 0 and n + 1 < len(front)  # in turns, so that neighbours keep clear of each other
            axes.annotate(short_name(policy), (size, kld), xytext=(-5, -5) if below else (5, 5),
                          textcoords="offset points", fontsize=7, ha="right" if below else "left",
                          va="top" if below else "bottom")
        for size, kld, policy in points:
            if "+" not in policy and (size, kld, policy) not in front:
                axes.annotate(short_name(policy) + " min/max", (size, kld), xytext=(5, 3), textcoords="offset points",
                              fontsize=7, color="#6c757d")
        axes.set_title(model)
        axes.set_yscale("log")
        axes.margins(x=0.26, y=0.12)
        axes.set_xlabel("bytes per vector of 32 channels (fp16: 64)")
        axes.set_ylabel("KL divergence, nats per token")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, metadata={"Date": None})


def draw_training(rows, path):
    """Cross entropy of the pass through the cache, and its divergence from the plain pass."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    kl_axes = axes.twinx()
    for at, field, label, colour in ((axes, "loss", "cross entropy with the cache (left)", "#0b6e4f"),
                                     (kl_axes, "divergence", "KL(plain || cache) (right)", "#c17c18")):
        points = [(float(r["tokens"]) / 1e6, float(r[field])) for r in rows if r[field]]
        if points:
            at.plot(*zip(*points), label=label, color=colour, linewidth=1)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("nats per token")
    kl_axes.set_ylabel("nats per token")
    kl_axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="lower left", bbox_to_anchor=(0.13, 0.17))
    figure.savefig(path, metadata={"Date": None})


def smoothed(points, span):
    """Means of `span` neighbours; single batches differ more than runs do."""
    return [
        (points[i][0], sum(y for _, y in points[i - span + 1 : i + 1]) / span) for i in range(span - 1, len(points))
    ]


def draw_runs(runs, path):
    """Left: cross entropy in training, of the pass through the cache. Right: on held-out text, where it was measured
    often enough for a curve, or else the divergence in training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")

    def points(rows, field):
        return [(float(r["tokens"]) / 1e6, float(r[field])) for r in rows if r[field]]

    held_out = all(len(points(rows, "validation_kv")) > 2 for rows in runs.values())
    for (name, rows), colour in zip(runs.items(), ("#0b6e4f", "#c17c18", "#6c757d")):
        loss = points(rows, "loss")
        left.plot(*zip(*smoothed(loss, max(1, len(loss) // 30))), label=name, color=colour, linewidth=1.2)
        with_cache = any(r["divergence"] for r in rows)
        if held_out:
            label = f"{name}, its cache" if with_cache else name
            right.plot(*zip(*points(rows, "validation_kv")), label=label, color=colour, linewidth=1.2)
            if with_cache:
                plain = points(rows, "validation_16bit")
                right.plot(*zip(*plain), label=f"{name}, plain", color=colour, linewidth=1.2, linestyle=":")
        elif with_cache:
            right.plot(*zip(*points(rows, "divergence")), label=name, color=colour, linewidth=1.2)
    left.set_title("cross entropy in training, nats per token", fontsize="medium")
    right.set_title("cross entropy on held-out text" if held_out else "KL(plain || cache) in training", fontsize="medium")
    for axes in (left, right):
        axes.set_xlabel("tokens (millions)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, metadata={"Date": None})


def draw_long_context(rows, path):
    """Left: GiB of model and cache, and what the machine has. Right: seconds of a decoded token, where it was run."""
    figure, (memory, time) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    colours = ("#0b6e4f", "#57a773", "#c17c18", "#8d5a97", "#6c757d")
    model = float(next(r["GiB of process"] for r in rows if r["depth"] == "0"))
    for name, colour in zip(dict.fromkeys(r["cache"] for r in rows if r["depth"] != "0"), colours):
        own = [r for r in rows if r["cache"] == name and r["depth"] != "0"]
        for axes, field, more in ((memory, "GiB of cache", model), (time, "seconds per token", 0)):
            points = [(float(r["depth"]) / 1024, float(r[field]) + more) for r in own if r[field]]
            label = name.replace("ggml:", "ggml ") if "ggml" in name else f"kv1 {name}"
            axes.plot(*zip(*points), marker="o", markersize=4, label=label, color=colour)
    memory.axhline(24, color="#b00020", linewidth=1, linestyle="--")
    memory.annotate("24 GiB", (8, 24), xytext=(0, 3), textcoords="offset points", color="#b00020", fontsize=8)
    memory.set_ylabel("model and cache, GiB")
    memory.set_ylim(0, 42)
    time.set_ylabel("seconds per decoded token")
    time.set_yscale("log")
    for axes in (memory, time):
        axes.set_xlabel("cached tokens (thousands of 1,024)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3, which="both")
    memory.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main():
    if len(sys.argv) < 3 or (len(sys.argv) > 3 and not all(a.endswith(".csv") for a in sys.argv[1:-1])):
        sys.exit(__doc__)
    if sys.argv[1].endswith(".csv"):
        rows = read_rows(sys.argv[1])
        folder = pathlib.Path(sys.argv[-1])
        folder.mkdir(parents=True, exist_ok=True)
        matplotlib.rcParams.update({"svg.hashsalt": "kv1", "svg.fonttype": "none"})
        if len(sys.argv) > 3:
            draw_runs({pathlib.Path(log).stem: read_rows(log) for log in sys.argv[1:-1]}, folder / "training.svg")
        elif rows and "learning_rate" in rows[0]:
            draw_training(rows, folder / "training.svg")
        elif rows and "GiB of cache" in rows[0]:
            draw_long_context(rows, folder / "long_context.svg")
        else:
            draw_policies(rows, folder / "policies.svg")
        return
    result = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "kv1"  # the same bytes for the same numbers
    draw(result["context"], "bytes", 2**-30, "KV cache, GiB", folder / "context_memory.svg")
    draw(result["context"], "seconds_per_token", 1e3, "attention per token, ms", folder / "context_time.svg")


if __name__ == "__main__":
    main()
