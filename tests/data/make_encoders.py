#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes encoders.safetensors: compact, codebook and least-squares quantization and pages of them, from their
definitions (include/kv1/quantizers, layout.hpp) in numpy, independently of the library.

usage: make_encoders.py OUTPUT       needs numpy and safetensors
"""
import sys

import numpy as np
from safetensors.numpy import save_file

f32 = np.float32
SMALLEST = f32(1e-6)


def half_bits(x):
    return np.asarray(x, np.float16).view(np.uint16)


def from_bits(b):
    return np.asarray(b, np.uint16).view(np.float16).astype(f32)


LEVELS = {
    ("codebook", 2): np.array([0, 5, 9, 14], f32),
    ("codebook", 4): np.array([0, 4, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 32, 36], f32),
}


def levels_of(fmt, bits):
    return LEVELS.get((fmt, bits), np.arange(2**bits, dtype=f32))


def nearest_code(x, scale, base, fmt, bits):
    """By boundaries half-way between levels, which are evenly spaced but for the outer ones of four bits."""
    if (fmt, bits) == ("codebook", 4):
        u = (x - f32(base + f32(scale * f32(3)))) * (f32(1) / f32(scale * f32(2)))
        line = u * (f32(4) / f32(7))
        u = np.minimum(np.maximum(u, line + f32(11) / f32(14)), line + f32(79) / f32(14))
        return np.rint(np.clip(u, f32(0), f32(15))).astype(np.int32)
    if fmt == "codebook":
        scale, base = f32(scale * f32(4.5)), f32(base + f32(scale * f32(0.25)))
    return np.rint(np.clip((x - base) * (f32(1) / scale), f32(0), f32(2**bits - 1))).astype(np.int32)


def store(fmt, bits, scale, base):
    """Metadata bits, and scale and base as they are read back."""
    levels = levels_of(fmt, bits)[-1]
    if fmt == "affine":
        s = half_bits(max(f32(scale), SMALLEST))
        return lambda b: ((s, half_bits(b)), from_bits(s), from_bits(half_bits(b)))
    s = np.uint16(max((int(half_bits(scale)) + 0x20) & 0x7FC0, 0x40))

    def with_base(b):
        read = from_bits(s)
        w = int(np.rint(np.clip(f32(b) / (read * f32(levels)) * f32(128) + f32(64), f32(-63), f32(63))))
        pair = np.uint16(int(s) | (0x8000 | -w if w < 0 else w))
        return (pair, np.uint16(0)), read, read * f32(levels * (w - 64)) / f32(128)

    return with_base


def nearest(x, scale, base, fmt, bits):
    codes = nearest_code(x, scale, base, fmt, bits)
    error = f32(0)
    for v, c in zip(x, levels_of(fmt, bits)[codes]):
        e = v - (c * scale + base)
        error = f32(error + f32(e * e))
    return codes.astype(np.uint8), error


def quantize(x, fmt, bits, fit):
    levels = levels_of(fmt, bits)[-1]
    x = x.astype(f32)
    n = f32(len(x))
    lo, hi = x.min(), x.max()
    low, high = (lo, hi) if fmt == "affine" else (min(lo, f32(0)), max(hi, f32(0)))
    meta, scale, base = store(fmt, bits, (high - low) / f32(levels), None)(low)
    codes, error = nearest(x, scale, base, fmt, bits)
    if not fit:
        return codes, meta
    middle = f32(0.5) * lo + f32(0.5) * hi
    v = x - middle
    s = max(f32((hi - lo) * (f32(0.9 if (fmt, bits) == ("codebook", 4) else 0.8) / f32(levels))), SMALLEST)
    b = f32(s * f32(-0.5 * levels))
    for _ in range(3):
        c = levels_of(fmt, bits)[nearest_code(v, s, b, fmt, bits)]
        sx = sc = scc = sxc = f32(0)
        for vi, ci in zip(v, c):
            sx, sc, scc, sxc = f32(sx + vi), f32(sc + ci), f32(scc + ci * ci), f32(sxc + f32(vi * ci))
        variance = f32(n * scc) - f32(sc * sc)
        covariance = f32(n * sxc) - f32(sx * sc)
        if variance > 0:
            s = max(f32(covariance / variance), SMALLEST)
        b = f32((sx - f32(s * sc)) / n)
    with_base = store(fmt, bits, s, None)
    read = with_base(f32(0))[1]
    meta2, scale, base = with_base(f32(f32((sx - f32(read * sc)) / n) + middle))
    codes2, error2 = nearest(x, scale, base, fmt, bits)
    return (codes2, meta2) if error2 < error else (codes, meta)


def put_key_of_3_bits(lanes, first, shared, c, token, code):
    """Channel c's code into lines of K: of 16 channels from `first` on, of which two share a line from `shared` on."""
    own, both, byte, odd = first + c // 16, shared + c // 32, 8 * (c % 16 // 4), c // 16 % 2
    low, high = code & 3, code >> 2
    if c % 4 == 0:
        parts = [(own, code)]
    elif c % 4 == 1:
        parts = [(own, code << 3)]
    elif c % 4 == 2:
        parts = [(own, low << 6), (both, high << (6 + odd))]
    else:
        parts = [(both, code << (3 * odd))]
    for line, bits in parts:
        lanes[line, token] |= np.uint32(bits << byte)


def page(keys, values):
    """A page of 32 tokens, keys compact3, values compact2, 32 channels."""
    tokens, channels = keys.shape
    lanes_k, lanes_v = np.zeros((tokens // 16, 3, 16), np.uint32), np.zeros((channels // 16, tokens // 16, 16), np.uint32)
    k_meta, v_meta = np.zeros(tokens, np.uint16), np.zeros(tokens, np.uint16)
    for t in range(tokens):
        codes, (k_meta[t], _) = quantize(keys[t], "compact", 3, True)
        for c in range(channels):
            put_key_of_3_bits(lanes_k[t // 16], 0, 2, c, t % 16, int(codes[c]))
        codes, (v_meta[t], _) = quantize(values[t], "compact", 2, True)
        for c in range(channels):
            n = t % 16
            lanes_v[c // 16, t // 16, c % 16] |= np.uint32(int(codes[c]) << (8 * (n % 4) + 2 * (n // 4)))
    return np.frombuffer(lanes_k.tobytes() + lanes_v.tobytes() + k_meta.tobytes() + v_meta.tobytes(), np.uint8)


def grouped_page(keys, values):
    """A page of 16 tokens of 64 channels in groups of 32: keys compact3 fitted, values affine2 fitted."""
    tokens, channels = keys.shape
    groups = channels // 32
    lanes_k, lanes_v = np.zeros((6, 16), np.uint32), np.zeros((channels // 16, 16), np.uint32)
    k_pair = np.zeros((groups, tokens), np.uint16)
    v_scale, v_minimum = np.zeros((groups, tokens), np.uint16), np.zeros((groups, tokens), np.uint16)
    for t in range(tokens):
        for g in range(groups):
            own = slice(g * 32, g * 32 + 32)
            codes, (k_pair[g, t], _) = quantize(keys[t, own], "compact", 3, True)
            for i, code in enumerate(codes):
                c = g * 32 + i
                put_key_of_3_bits(lanes_k, 0, 4, c, t, int(code))
            codes, (v_scale[g, t], v_minimum[g, t]) = quantize(values[t, own], "affine", 2, True)
            for i, code in enumerate(codes):
                c = g * 32 + i
                lanes_v[c // 16, c % 16] |= np.uint32(int(code) << (8 * (t % 4) + 2 * (t // 4)))
    return np.frombuffer(b"".join(x.tobytes() for x in (lanes_k, lanes_v, k_pair, v_scale, v_minimum)), np.uint8)


def codebook_page(keys, values):
    """A page of 16 tokens of 32 channels in codebook2, fitted."""
    tokens, channels = keys.shape
    lanes_k, lanes_v = np.zeros((2, 16), np.uint32), np.zeros((2, 16), np.uint32)
    k_pair, v_pair = np.zeros(tokens, np.uint16), np.zeros(tokens, np.uint16)
    for t in range(tokens):
        codes, (k_pair[t], _) = quantize(keys[t], "codebook", 2, True)
        for c, code in enumerate(codes):
            lanes_k[c // 16, t] |= np.uint32(int(code) << (2 * (c % 16)))
        codes, (v_pair[t], _) = quantize(values[t], "codebook", 2, True)
        for c, code in enumerate(codes):
            lanes_v[c // 16, c % 16] |= np.uint32(int(code) << (8 * (t % 4) + 2 * (t // 4)))
    return np.frombuffer(b"".join(x.tobytes() for x in (lanes_k, lanes_v, k_pair, v_pair)), np.uint8)


def codebook4_page(keys, values):
    """A page of 16 tokens of 32 channels in codebook4, fitted."""
    tokens, channels = keys.shape
    lanes_k, lanes_v = np.zeros((4, 16), np.uint32), np.zeros((2, 2, 16), np.uint32)
    k_pair, v_pair = np.zeros(tokens, np.uint16), np.zeros(tokens, np.uint16)
    for t in range(tokens):
        codes, (k_pair[t], _) = quantize(keys[t], "codebook", 4, True)
        for c, code in enumerate(codes):
            lanes_k[c // 8, t] |= np.uint32(int(code) << (4 * (c % 8)))
        codes, (v_pair[t], _) = quantize(values[t], "codebook", 4, True)
        for c, code in enumerate(codes):
            lanes_v[c // 16, t // 8, c % 16] |= np.uint32(int(code) << (8 * (t % 4) + 4 * (t % 8 // 4)))
    return np.frombuffer(b"".join(x.tobytes() for x in (lanes_k, lanes_v, k_pair, v_pair)), np.uint8)


def channel_page(keys, values):
    """A full page of 32 tokens of 32 channels: keys affine2 fitted per channel, from fp16, values compact2 fitted."""
    tokens, channels = keys.shape
    keys = keys.astype(np.float16).astype(f32)
    lanes_k = np.zeros((tokens // 16, 2, 16), np.uint32)
    lanes_v = np.zeros((channels // 16, tokens // 16, 16), np.uint32)
    k_scale, k_minimum, v_pair = (np.zeros(n, np.uint16) for n in (channels, channels, tokens))
    for c in range(channels):
        codes, (k_scale[c], k_minimum[c]) = quantize(keys[:, c], "affine", 2, True)
        for t, code in enumerate(codes):
            lanes_k[t // 16, c // 16, t % 16] |= np.uint32(int(code) << (2 * (c % 16)))
    for t in range(tokens):
        codes, (v_pair[t], _) = quantize(values[t], "compact", 2, True)
        for c, code in enumerate(codes):
            n = t % 16
            lanes_v[c // 16, t // 16, c % 16] |= np.uint32(int(code) << (8 * (n % 4) + 2 * (n // 4)))
    return np.frombuffer(b"".join(x.tobytes() for x in (lanes_k, lanes_v, k_scale, k_minimum, v_pair)), np.uint8)


def main():
    rng = np.random.default_rng(5)
    out = {}
    for d in (1, 7, 32, 64, 128):
        x = rng.standard_normal((12, d)).astype(f32)
        x[3] *= 1000
        x[4] = 2.5
        x[5] = 0
        x[6] += 3
        x[7, 0] = 50
        x[8] *= f32(1e-5)
        out[f"d{d}.x"] = x
        for fmt, widths in (("affine", (2, 3, 4)), ("compact", (2, 3, 4)), ("codebook", (2, 4))):
            for bits in widths:
                for fit in (False, True):
                    if fmt == "affine" and not fit:
                        continue  # quantizers.safetensors has the reference's
                    results = [quantize(row, fmt, bits, fit) for row in x]
                    name = f"d{d}.{fmt}{bits}{'.fit' if fit else ''}"
                    out[name + ".codes"] = np.stack([r[0] for r in results])
                    out[name + ".scale"] = np.array([r[1][0] for r in results], np.uint16)
                    out[name + ".minimum"] = np.array([r[1][1] for r in results], np.uint16)
    keys, values = rng.standard_normal((2, 32, 32)).astype(f32)
    out["page.keys"], out["page.values"] = keys, values
    out["page.bytes"] = page(keys, values).copy()
    keys, values = rng.standard_normal((2, 16, 64)).astype(f32)
    keys[:, 5] *= 20
    out["grouped.keys"], out["grouped.values"] = keys, values
    out["grouped.bytes"] = grouped_page(keys, values).copy()
    keys, values = rng.standard_normal((2, 16, 32)).astype(f32)
    out["codebook.keys"], out["codebook.values"] = keys, values
    out["codebook.bytes"] = codebook_page(keys, values).copy()
    out["codebook4.keys"], out["codebook4.values"] = keys, values
    out["codebook4.bytes"] = codebook4_page(keys, values).copy()
    keys, values = rng.standard_normal((2, 32, 32)).astype(f32)
    keys[:, 7] = keys[:, 7] * 3 + 20
    out["channels.keys"], out["channels.values"] = keys, values
    out["channels.bytes"] = channel_page(keys, values).copy()
    save_file(out, sys.argv[1])


if __name__ == "__main__":
    main()
