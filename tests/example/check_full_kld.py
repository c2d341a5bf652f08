# SPDX-License-Identifier: Apache-2.0
"""Compares a `kv1-lm kld --json` report on the whole of WikiText-2 with the reference's figures.

Usage: check_full_kld.py REPORT GOLDEN
"""
import json
import sys

report = json.load(open(sys.argv[1]))
golden = next(g for g in json.load(open(sys.argv[2]))["kld"] if g["bits"] == report["kv_bits"])
failures = []


def expect(name, found, wanted, tolerance):
    difference = abs(found - wanted) / abs(wanted)
    print(f"{name}: {found:.7g}, reference {wanted:.7g}, off by {100 * difference:.4f} %")
    if difference > tolerance:
        failures.append(name)


for name in "positions", "chunks":
    expect(name, report[name], golden[name], 0.0)
expect("KLD", report["kld_nats_per_token"], golden["kld_nats_per_token"], 0.005)
expect("perplexity, reference", report["ppl_reference"], golden["ppl_16bit_cache"], 0.001)
expect("perplexity, quantized", report["ppl_quantized"], golden["ppl_quant_cache"], 0.001)
expect("cache ratio", report["avg_cache_shrink_vs_fp16"], golden["shrink_vs_fp16"], 1e-12)

# A code at a rounding boundary may flip and move a chunk on its own: by less than a hundredth on average.
chunks = list(zip(report["chunk_mean_kld"], golden["chunk_mean_kld"], strict=True))
relative = [abs(found - wanted) / wanted for found, wanted in chunks]
print(f"chunk means: off by {100 * sum(relative) / len(relative):.4f} % on average, {100 * max(relative):.4f} % at most")
if sum(relative) / len(relative) > 0.005 or max(relative) > 0.05:
    failures.append("chunk means")
if failures:
    sys.exit("too far off: " + ", ".join(failures))
