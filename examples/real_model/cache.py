# SPDX-License-Identifier: Apache-2.0
#
# kv1.h from Python's ctypes: a calibrator, a calibration and a cache for one sequence of a model whose layers are
# alike. Arrays are numpy's, fp32, [tokens][heads][channels].
import concurrent.futures
import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_ssize_t, c_uint32, c_void_p

import numpy

INTERLEAVED, EXACT = 1, 1


class Error(ctypes.Structure):
    _fields_ = [("code", c_int32), ("rule", c_char_p)] + \
               [(n, c_int64) for n in ("layer", "kv_head", "token", "channel")]


class Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("type", c_int32)] + [(n, c_size_t) for n in ("tokens", "heads", "channels")] + \
               [("token_stride", c_ssize_t), ("head_stride", c_ssize_t)]


class Sequence(ctypes.Structure):
    _fields_ = [("slot", c_uint32), ("generation", c_uint32)]


class Rotary(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("frequencies", c_void_p), ("pair_count", c_size_t), ("pairs", c_int32),
                ("first_channel", c_size_t)]


class Layer(ctypes.Structure):
    _fields_ = [(n, c_size_t) for n in ("struct_size", "kv_heads", "key_dim", "value_dim")] + \
               [("key_format", c_int32), ("value_format", c_int32), ("key_encoding", c_void_p),
                ("value_encoding", c_void_p), ("key_group", c_size_t), ("value_group", c_size_t),
                ("sliding_window", c_size_t), ("window_retention", c_size_t), ("key_axis", c_int32),
                ("values_in_keys", c_int32), ("rotary", POINTER(Rotary))]


class CacheOptions(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("layers", POINTER(Layer))] + \
               [(n, c_size_t) for n in ("distinct_layers", "layer_count", "capacity_tokens", "page_tokens", "fp16_sinks",
                                        "fp16_window", "window_capacity_tokens", "fp16_capacity_tokens")] + \
               [("huge_pages", c_int32), ("prefix_events", c_size_t), ("memory", c_void_p), ("first_position", c_size_t)]


class CalibratorOptions(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("policy", c_char_p), ("model", c_void_p), ("query_stride", c_size_t),
                ("scale", c_float)]


class LayerOption(ctypes.Structure):
    _fields_ = [("layer", c_size_t), ("policy", c_char_p), ("cost", c_double)]


class Mask(ctypes.Structure):
    _fields_ = [("kind", c_int32), ("first_position", c_size_t), ("keys", c_size_t), ("visible", c_void_p)]


class Attention(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("scale", c_float), ("soft_cap", c_float), ("precision", c_int32),
                ("window", c_size_t), ("mask", Mask), ("masks", c_void_p), ("range", c_void_p),
                ("alibi_slopes", c_void_p), ("sink_logits", c_void_p), ("log_sum_exp", c_void_p)]


Task = ctypes.CFUNCTYPE(None, c_void_p, c_size_t)
Run = ctypes.CFUNCTYPE(None, c_void_p, c_size_t, Task, c_void_p)


class Executor(ctypes.Structure):
    _fields_ = [("run", Run), ("context", c_void_p)]


def sized(kind, **fields):
    return kind(struct_size=ctypes.sizeof(kind), **fields)


def tensor(x):
    assert x.dtype == numpy.float32 and x.flags["C_CONTIGUOUS"]
    return Tensor(x.ctypes.data, 0, *x.shape, x.shape[1] * x.shape[2], x.shape[2])


class Library:
    """The shared library, with the threads of this process."""

    def __init__(self, path):
        self.functions = ctypes.CDLL(os.path.abspath(path))
        pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

        def run(_, count, task, state):
            list(pool.map(lambda i: task(state, i), range(count)))

        self.run = Run(run)
        self.executor = Executor(self.run, None)
        out, error, executor = POINTER(c_void_p), POINTER(Error), POINTER(Executor)
        for name, arguments in {
                "kv1_calibrator_create": [POINTER(CacheOptions), POINTER(CalibratorOptions), out, error],
                "kv1_calibrator_set_output_projection": [c_void_p, c_size_t, Tensor, executor, error],
                "kv1_calibrator_add": [c_void_p, c_size_t, Tensor, Tensor, Tensor, c_size_t, executor, error],
                "kv1_calibrator_finish": [c_void_p, executor, out, error],
                "kv1_calibration_save_file": [c_void_p, c_char_p, error],
                "kv1_calibration_load_file": [c_char_p, c_void_p, out, error],
                "kv1_calibration_set_policy": [c_void_p, c_char_p, error],
                "kv1_choose_layers": [POINTER(CacheOptions), POINTER(LayerOption), c_size_t, c_double, c_char_p, c_size_t,
                                      POINTER(c_size_t), error],
                "kv1_cache_create_calibrated": [c_void_p, POINTER(CacheOptions), out, error],
                "kv1_cache_create_with_policy": [c_char_p, POINTER(CacheOptions), out, error],
                "kv1_sequence_create": [c_void_p, POINTER(Sequence), error],
                "kv1_append": [c_void_p, Sequence, c_size_t, Tensor, Tensor, executor, error],
                "kv1_attend": [c_void_p, Sequence, c_size_t, Tensor, Tensor, POINTER(Attention), executor, error]}.items():
            getattr(self.functions, name).argtypes = arguments
            getattr(self.functions, name).restype = c_int32
        self.functions.kv1_describe.argtypes = [error, c_char_p, c_size_t]
        for name in "kv1_calibrator_destroy", "kv1_calibration_destroy", "kv1_cache_destroy":
            getattr(self.functions, name).argtypes = [c_void_p]
            getattr(self.functions, name).restype = None

    def call(self, name, *arguments):
        error = Error()
        if getattr(self.functions, name)(*arguments, byref(error)) != 0:
            text = ctypes.create_string_buffer(300)
            self.functions.kv1_describe(byref(error), text, len(text))
            raise SystemExit(f"{name}: {text.value.decode()}")

    def choose_layers(self, shape, options, budget):
        """The policy of least cost within `budget` bytes a token; options are tuples of layer, policy and cost."""
        array = (LayerOption * len(options))(*((layer, policy.encode(), cost) for layer, policy, cost in options))
        text, length = ctypes.create_string_buffer(1 << 16), c_size_t()
        self.call("kv1_choose_layers", byref(shape.options), array, len(options), budget, text, len(text), byref(length))
        assert length.value < len(text)
        return text.value.decode()


class Shape:
    """The layers of a model, as kv1 is told of them."""

    def __init__(self, model, tokens):
        self.frequencies = numpy.ascontiguousarray(model.frequencies, numpy.float32)
        self.rotary = sized(Rotary, frequencies=self.frequencies.ctypes.data, pair_count=len(self.frequencies),
                            pairs=INTERLEAVED)
        self.layer = sized(Layer, kv_heads=model.kv_heads, key_dim=model.dim, value_dim=model.dim,
                           rotary=ctypes.pointer(self.rotary))
        self.options = sized(CacheOptions, layers=ctypes.pointer(self.layer), distinct_layers=1,
                             layer_count=model.layers, capacity_tokens=tokens)


class Calibrator:
    def __init__(self, library, model, policy, query_stride=1):
        self.library, self.shape, self.handle = library, Shape(model, 0), c_void_p()
        options = sized(CalibratorOptions, policy=policy.encode(), query_stride=query_stride)
        library.call("kv1_calibrator_create", byref(self.shape.options), byref(options), byref(self.handle))
        for layer in range(model.layers):
            w = model.weights[f"blk.{layer}.attn_output.weight"].reshape(-1, model.heads, model.dim)
            library.call("kv1_calibrator_set_output_projection", self.handle, layer, tensor(w), library.executor)

    def add(self, layer, q, k, v):
        self.library.call("kv1_calibrator_add", self.handle, layer, tensor(q), tensor(k), tensor(v), 0,
                          self.library.executor)

    def save(self, path):
        found = c_void_p()
        self.library.call("kv1_calibrator_finish", self.handle, self.library.executor, byref(found))
        self.library.call("kv1_calibration_save_file", found, path.encode())
        self.library.functions.kv1_calibration_destroy(found)

    def __del__(self):
        self.library.functions.kv1_calibrator_destroy(self.handle)


class Cache:
    """A cache of a policy, whose calibrated parts are in a file (None: it takes none), and one sequence in it."""

    def __init__(self, library, model, calibration, policy, tokens, exact=False):
        self.library, self.handle, self.sequence, found = library, c_void_p(), Sequence(), c_void_p()
        self.options = sized(Attention, precision=EXACT if exact else 0)
        shape = Shape(model, tokens)
        if calibration is None:
            library.call("kv1_cache_create_with_policy", policy.encode(), byref(shape.options), byref(self.handle))
        else:
            library.call("kv1_calibration_load_file", calibration.encode(), None, byref(found))
            library.call("kv1_calibration_set_policy", found, policy.encode())
            library.call("kv1_cache_create_calibrated", found, byref(shape.options), byref(self.handle))
            library.functions.kv1_calibration_destroy(found)
        library.call("kv1_sequence_create", self.handle, byref(self.sequence))

    def attend(self, layer, q, k, v):
        """Appends the keys and values of new tokens, and attends with their queries."""
        out = numpy.empty_like(q)
        self.library.call("kv1_append", self.handle, self.sequence, layer, tensor(k), tensor(v), self.library.executor)
        self.library.call("kv1_attend", self.handle, self.sequence, layer, tensor(q), tensor(out), byref(self.options),
                          self.library.executor)
        return out

    def __del__(self):
        self.library.functions.kv1_cache_destroy(self.handle)
