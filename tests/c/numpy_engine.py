# SPDX-License-Identifier: Apache-2.0
#
# examples/real_model on a model of random weights: what its forward pass gives on kv1's caches, calibrated, saved and
# loaded, beside what it gives on plain keys and values. Ends with 77 where there is no numpy.
#
# Usage: numpy_engine.py <shared library> <folder of the example> <folder to write in>
import os
import sys

try:
    import numpy
except ImportError:
    print("numpy is missing")
    sys.exit(77)


def random_model(llama, bias):
    """A model without a file. bias: what the keys of all tokens share before they turn."""
    random = numpy.random.default_rng(3)

    def matrix(rows, columns):
        return (random.standard_normal((rows, columns)) / columns ** 0.5).astype(numpy.float32)

    m = llama.Model.__new__(llama.Model)
    m.layers, m.heads, m.kv_heads, m.dim, m.epsilon = 2, 4, 2, 32, 1e-5
    m.frequencies = 10000.0 ** (-numpy.arange(0, m.dim, 2) / m.dim)
    width = m.heads * m.dim
    m.weights = {"token_embd.weight": matrix(50, width), "output_norm.weight": numpy.ones(width, numpy.float32)}
    for layer in range(m.layers):
        name = f"blk.{layer}."
        for norm in "attn_norm", "ffn_norm":
            m.weights[name + norm + ".weight"] = numpy.ones(width, numpy.float32)
        for part, rows, columns in (("attn_q", width, width), ("attn_k", m.kv_heads * m.dim, width),
                                    ("attn_v", m.kv_heads * m.dim, width), ("attn_output", width, width),
                                    ("ffn_gate", 200, width), ("ffn_up", 200, width), ("ffn_down", width, 200)):
            m.weights[name + part + ".weight"] = matrix(rows, columns)
    m.weights["token_embd.weight"] += numpy.float32(bias) * matrix(1, width)
    return m


def error(hidden, truth):
    return float(numpy.linalg.norm(hidden - truth) / numpy.linalg.norm(truth))


def main(library, example, folder):
    sys.path.insert(0, example)
    import cache
    import llama

    kv1 = cache.Library(library)
    path = os.path.join(folder, "kv1_numpy_engine_test.calibration")
    model = random_model(llama, 20.0)
    tokens = numpy.random.default_rng(4).integers(50, size=300)
    truth = model.forward(tokens, llama.plain_attention)

    calibrator = cache.Calibrator(kv1, model, "c4+ls+basis+had+mean+ew,c4+ls+basis+had+ew@4:32")

    def attend(layer, q, k, v):
        calibrator.add(layer, q, k, v)
        return llama.plain_attention(layer, q, k, v)

    model.forward(tokens, attend)
    calibrator.save(path)

    def on(policy, exact=True):
        return error(model.forward(tokens, cache.Cache(kv1, model, path, policy, len(tokens), exact).attend), truth)

    # plain formats round to fp32 and fp16 alone: RoPE's sines, softmax and sums in another order
    assert on("32") < 1e-5, on("32")
    assert on("16") < 2e-3, on("16")
    # more bits and what was calibrated are worth something, and the fast path costs less than they do
    errors = [on("c4+ls+basis+had+mean+ew,c4+ls+basis+had+ew@4:32"), on("c3+ls+had+mean+ew,c2+ls+had+ew@4:32"),
              on("c3+ls+had,c2+ls+had@4:32"), on("2,2")]
    print("c4 calibrated, c3,c2 calibrated, safe, 2,2:", *(f"{e:.4f}" for e in errors))
    assert errors == sorted(errors), errors
    assert abs(on("safe", exact=False) - errors[2]) < 0.1 * errors[2]


main(*sys.argv[1:])
