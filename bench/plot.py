#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Plots what long_context printed: memory and attention time per token against context length.

usage: plot.py RESULT.json OUTPUT_FOLDER        writes context_memory.svg and context_time.svg
"""
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


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    result = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "kv1"  # the same bytes for the same numbers
    draw(result["context"], "bytes", 2**-30, "KV cache, GiB", folder / "context_memory.svg")
    draw(result["context"], "seconds_per_token", 1e3, "attention per token, ms", folder / "context_time.svg")


if __name__ == "__main__":
    main()
