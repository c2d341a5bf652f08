# SPDX-License-Identifier: Apache-2.0
#
# Caches of others, to compare with: what attention sees of keys and values that they keep, as functions on
# [tokens][heads][channels]. Attention to them is in fp32. A name is one of these, and @SINKS:WINDOW after it, the first
# tokens and each query's newest in fp32:
#
#   q8_0, q4_0   llama.cpp's blocks of 32 channels with one fp16 scale
#   q4_0+had     q4_0 of vectors that a Hadamard transform rotated, as llama.cpp does
#   turboN       TurboQuant (arXiv 2504.19874) in N bits: a random rotation, a norm, levels of a normal distribution
#   kiviN        KIVI (arXiv 2402.02750) in N bits: keys by channel in groups of 32 tokens, values by token in groups of
#                32 channels. The newest 32 values, and keys of a group that is not whole yet, are not quantized. It has
#                no WINDOW of its own.
import numpy


def half(x):
    return x.astype(numpy.float16).astype(numpy.float32)


def inverse(x):
    return numpy.divide(1, x, out=numpy.zeros_like(x), where=x != 0)


def q8_0(x):
    blocks = x.reshape(-1, 32)
    scale = numpy.abs(blocks).max(axis=1, keepdims=True) / numpy.float32(127)
    codes = blocks * inverse(scale)
    codes = numpy.trunc(codes + numpy.copysign(numpy.float32(0.5), codes))  # halves away from zero
    return (codes * half(scale)).reshape(x.shape)


def q4_0(x):
    blocks = x.reshape(-1, 32)
    largest = numpy.take_along_axis(blocks, numpy.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = largest / numpy.float32(-8)
    codes = numpy.minimum(numpy.floor(blocks * inverse(scale) + numpy.float32(8.5)), 15)
    return ((codes - 8) * half(scale)).reshape(x.shape)


def hadamard(n):
    h = numpy.ones((1, 1))
    while len(h) < n:
        h = numpy.block([[h, h], [h, -h]])
    return (h / numpy.sqrt(n)).astype(numpy.float32)


def normal_levels(bits):
    """Lloyd-Max levels of a standard normal distribution."""
    x = numpy.sort(numpy.random.default_rng(0).standard_normal(400_000))
    levels = numpy.quantile(x, (numpy.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(200):
        nearest = numpy.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        levels = numpy.bincount(nearest, x, len(levels)) / numpy.bincount(nearest, minlength=len(levels))
    return levels.astype(numpy.float32)


def turbo(bits, channels):
    levels = normal_levels(bits)
    random = numpy.random.default_rng(1).standard_normal((channels, channels))
    rotation = numpy.linalg.qr(random)[0].astype(numpy.float32)

    def quantize(x):
        y = x @ rotation
        size = half(numpy.sqrt(numpy.mean(y * y, axis=-1, keepdims=True)))
        return levels[numpy.searchsorted((levels[1:] + levels[:-1]) / 2, y * inverse(size))] * size @ rotation.T

    return quantize


def min_max(x, bits, axis):
    least, most = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    scale, least = half((most - least) / (2**bits - 1)), half(least)
    return numpy.clip(numpy.rint((x - least) * inverse(scale)), 0, 2**bits - 1) * scale + least


def kivi(bits, k, v):
    whole, heads, dim = len(k) // 32 * 32, *k.shape[1:]
    keys = k.copy()
    keys[:whole] = min_max(k[:whole].reshape(-1, 32, heads, dim), bits, 1).reshape(whole, heads, dim)
    return keys, min_max(v.reshape(len(v), heads, -1, 32), bits, 3).reshape(v.shape)


def attention(q, k, v, keys, values, plain_keys, plain_values, rows=256):
    """Causal attention in fp32 to quantized keys and values, and to plain ones where plain_...(query, token) says so."""
    out = numpy.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for first in range(0, len(q), rows):
        last = min(first + rows, len(q))
        query, token = numpy.arange(first, last)[:, None], numpy.arange(last)[None]
        key_is_plain, value_is_plain = plain_keys(query, token), plain_values(query, token)
        for head in range(q.shape[1]):
            h, x = head // group, q[first:last, head]
            scores = numpy.where(key_is_plain, x @ k[:last, h].T, x @ keys[:last, h].T)
            scores = numpy.where(token > query, -numpy.inf, scores / numpy.float32(q.shape[2] ** 0.5))
            weights = numpy.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            plain = weights * value_is_plain
            out[first:last, head] = plain @ v[:last, h] + (weights - plain) @ values[:last, h]
    return out


def attend(name, channels):
    """attend(layer, q, k, v) of a cache of this name."""
    base, _, tokens = name.partition("@")
    sinks, window = (int(n) for n in tokens.split(":")) if tokens else (0, 0)
    rotation = hadamard(channels)
    simple = {"q8_0": q8_0, "q4_0": q4_0, "q4_0+had": lambda x: q4_0(x @ rotation) @ rotation}
    if base.startswith("turbo"):
        simple[base] = turbo(int(base.removeprefix("turbo")), channels)

    def recent(query, token):
        return (token < sinks) | (query - token < window)

    def of_kivi(layer, q, k, v):
        keys, values = kivi(int(base.removeprefix("kivi")), k, v)
        return attention(q, k, v, keys, values, lambda i, j: (j < sinks) | (j >= (i + 1) // 32 * 32),
                         lambda i, j: (j < sinks) | (i - j < 32))

    def of_others(layer, q, k, v):
        return attention(q, k, v, simple[base](k), simple[base](v), recent, recent)

    if base.startswith("kivi"):
        return of_kivi
    if base not in simple:
        raise SystemExit(f"{name} is no cache of peers.py")
    return of_others
