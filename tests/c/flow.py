# SPDX-License-Identifier: Apache-2.0
#
# A language that calls C: Python's ctypes makes a cache, decodes a few steps on it with threads of Python's own,
# compares attention with its definition over what was stored, and saves and loads the sequence.
#
# Usage: flow.py <shared library> <folder to write in>
import ctypes
import math
import os
import random
import sys
import threading
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_ssize_t, c_uint32, c_void_p

FP32, AFFINE2, COMPACT3, LEAST_SQUARES, EXACT, KEYS, VALUES = 0, 5, 9, 1, 1, 0, 1
OK, INVALID_ARGUMENT, NON_FINITE, DIFFERENT_MODEL = 0, 1, 4, 19


class Error(ctypes.Structure):
    _fields_ = [("code", c_int32), ("rule", c_char_p)] + [(n, c_int64) for n in ("layer", "kv_head", "token", "channel")]


class Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("type", c_int32)] + [(n, c_size_t) for n in ("tokens", "heads", "channels")] + \
               [("token_stride", c_ssize_t), ("head_stride", c_ssize_t)]


class Sequence(ctypes.Structure):
    _fields_ = [("slot", c_uint32), ("generation", c_uint32)]


class Encoding(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("levels", c_int32), ("hadamard", c_size_t), ("means", c_void_p),
                ("error_weights", c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [(n, c_size_t) for n in ("struct_size", "kv_heads", "key_dim", "value_dim")] + \
               [("key_format", c_int32), ("value_format", c_int32), ("key_encoding", POINTER(Encoding)),
                ("value_encoding", POINTER(Encoding)), ("key_group", c_size_t), ("value_group", c_size_t),
                ("sliding_window", c_size_t), ("window_retention", c_size_t), ("key_axis", c_int32), ("values_in_keys", c_int32)]


class CacheOptions(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("layers", POINTER(Layer))] + \
               [(n, c_size_t) for n in ("distinct_layers", "layer_count", "capacity_tokens", "page_tokens", "fp16_sinks",
                                        "fp16_window", "window_capacity_tokens", "fp16_capacity_tokens")] + \
               [("huge_pages", c_int32), ("prefix_events", c_size_t), ("memory", c_void_p)]


class Mask(ctypes.Structure):
    _fields_ = [("kind", c_int32), ("first_position", c_size_t), ("keys", c_size_t), ("visible", c_void_p)]


class Attention(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("scale", c_float), ("soft_cap", c_float), ("precision", c_int32),
                ("window", c_size_t), ("mask", Mask), ("masks", c_void_p), ("range", c_void_p),
                ("alibi_slopes", c_void_p), ("sink_logits", c_void_p), ("log_sum_exp", c_void_p)]


class ModelOptions(ctypes.Structure):  # kv1_load_options
    _fields_ = [("struct_size", c_size_t), ("model", c_char_p)]


class SaveOptions(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("prefixes", c_int32), ("model", c_char_p)]


Task = ctypes.CFUNCTYPE(None, c_void_p, c_size_t)
Run = ctypes.CFUNCTYPE(None, c_void_p, c_size_t, Task, c_void_p)


class Executor(ctypes.Structure):
    _fields_ = [("run", Run), ("context", c_void_p)]


def sized(kind, **fields):
    return kind(struct_size=ctypes.sizeof(kind), **fields)


def declare(kv1):
    pointer = c_void_p
    for name, arguments in {
            "kv1_cache_create": [POINTER(CacheOptions), POINTER(pointer), POINTER(Error)],
            "kv1_sequence_create": [pointer, POINTER(Sequence), POINTER(Error)],
            "kv1_append": [pointer, Sequence, c_size_t, Tensor, Tensor, POINTER(Executor), POINTER(Error)],
            "kv1_attend": [pointer, Sequence, c_size_t, Tensor, Tensor, POINTER(Attention), POINTER(Executor),
                           POINTER(Error)],
            "kv1_commit": [pointer, Sequence, POINTER(Error)],
            "kv1_sequence_length": [pointer, Sequence, POINTER(c_size_t), POINTER(Error)],
            "kv1_read": [pointer, Sequence, c_size_t, c_int32, c_size_t, c_size_t, c_size_t, POINTER(c_float),
                         POINTER(Error)],
            "kv1_save_file": [pointer, POINTER(Sequence), c_size_t, c_char_p, POINTER(SaveOptions), POINTER(Error)],
            "kv1_load_file": [pointer, c_char_p, POINTER(Sequence), c_size_t, POINTER(c_size_t),
                              POINTER(ModelOptions), POINTER(Error)]}.items():
        getattr(kv1, name).argtypes = arguments
        getattr(kv1, name).restype = c_int32
    kv1.kv1_cache_destroy.argtypes = [pointer]
    kv1.kv1_cache_destroy.restype = None
    kv1.kv1_describe.argtypes = [POINTER(Error), c_char_p, c_size_t]
    kv1.kv1_describe.restype = c_size_t


def numbers(n):
    return (c_float * n)(*[random.uniform(-1, 1) for _ in range(n)])


def tensor(data, tokens, heads, channels):
    return Tensor(ctypes.cast(data, c_void_p), FP32, tokens, heads, channels, heads * channels, channels)


def run_on_threads(_, count, task, state):
    threads = [threading.Thread(target=task, args=(state, i)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def main(library, folder):
    kv1 = ctypes.CDLL(library)
    declare(kv1)
    random.seed(1)
    layers, kv_heads, heads, dim, steps = 2, 2, 4, 32, 20
    error = Error()

    def check(code, expected=OK):
        if code != expected:
            text = ctypes.create_string_buffer(200)
            kv1.kv1_describe(byref(error), text, len(text))
            sys.exit("code %d, not %d: %s" % (code, expected, text.value.decode()))

    fitted = sized(Encoding, levels=LEAST_SQUARES, hadamard=dim)
    layer = sized(Layer, kv_heads=kv_heads, key_dim=dim, value_dim=dim, key_format=COMPACT3, value_format=AFFINE2)
    layer.key_encoding = layer.value_encoding = ctypes.pointer(fitted)
    options = sized(CacheOptions, layers=ctypes.pointer(layer), distinct_layers=1, layer_count=layers,
                    capacity_tokens=256, page_tokens=16)
    caches = [c_void_p(), c_void_p()]
    for cache in caches:
        check(kv1.kv1_cache_create(byref(options), byref(cache), byref(error)))
    cache, other = caches
    sequence = Sequence()
    check(kv1.kv1_sequence_create(cache, byref(sequence), byref(error)))

    # decoding: a token at a time, on Python's threads
    executor = Executor(Run(run_on_threads), None)
    lse, out = (c_float * heads)(), (c_float * (heads * dim))()
    attention = sized(Attention, precision=EXACT, log_sum_exp=ctypes.cast(lse, c_void_p))
    for _ in range(steps):
        for i in range(layers):
            k, v, q = numbers(kv_heads * dim), numbers(kv_heads * dim), numbers(heads * dim)
            check(kv1.kv1_append(cache, sequence, i, tensor(k, 1, kv_heads, dim), tensor(v, 1, kv_heads, dim),
                                 byref(executor), byref(error)))
            check(kv1.kv1_attend(cache, sequence, i, tensor(q, 1, heads, dim), tensor(out, 1, heads, dim),
                                 byref(attention), byref(executor), byref(error)))
        check(kv1.kv1_commit(cache, sequence, byref(error)))
    length = c_size_t()
    check(kv1.kv1_sequence_length(cache, sequence, byref(length), byref(error)))
    assert length.value == steps

    # the last layer's last step, from its definition
    def stored(of, s, side, head):
        rows = (c_float * (steps * dim))()
        check(kv1.kv1_read(of, s, layers - 1, side, head, 0, steps, rows, byref(error)))
        return [rows[t * dim:(t + 1) * dim] for t in range(steps)]

    for h in range(heads):
        keys, values = stored(cache, sequence, KEYS, h // 2), stored(cache, sequence, VALUES, h // 2)
        query = q[h * dim:(h + 1) * dim]
        weights = [math.exp(sum(a * b for a, b in zip(query, key)) / math.sqrt(dim)) for key in keys]
        assert abs(math.log(sum(weights)) - lse[h]) < 1e-4
        for c in range(dim):
            expected = sum(w * value[c] for w, value in zip(weights, values)) / sum(weights)
            assert abs(expected - out[h * dim + c]) < 1e-4

    # refusals say what and where
    k[dim + 3] = float("nan")
    check(kv1.kv1_append(cache, sequence, 1, tensor(k, 1, kv_heads, dim), tensor(v, 1, kv_heads, dim), None,
                         byref(error)), NON_FINITE)
    assert (error.layer, error.kv_head, error.token, error.channel) == (1, 1, 0, 3)
    check(kv1.kv1_commit(None, sequence, None), INVALID_ARGUMENT)

    # and into another cache by way of a file
    path = os.path.join(folder, "kv1_python_test.kv1").encode()
    model, loaded, count = b"m" * 32, Sequence(), c_size_t()
    check(kv1.kv1_save_file(cache, byref(sequence), 1, path, byref(sized(SaveOptions, model=model)), byref(error)))
    check(kv1.kv1_load_file(other, path, byref(loaded), 1, byref(count), None, byref(error)), DIFFERENT_MODEL)
    check(kv1.kv1_load_file(other, path, byref(loaded), 1, byref(count), byref(sized(ModelOptions, model=model)),
                            byref(error)))
    assert count.value == 1 and stored(other, loaded, KEYS, 1) == stored(cache, sequence, KEYS, 1)
    os.remove(path)
    for cache in caches:
        kv1.kv1_cache_destroy(cache)
    print("ok")


main(*sys.argv[1:])
