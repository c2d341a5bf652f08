# SPDX-License-Identifier: Apache-2.0
#
# Writes a model of Qwen3-8B's shape with random weights in Q4_0 (4.6 GB), for measuring time and memory. It has no
# tokenizer. Needs numpy and gguf (PyPI).
#
#   python3 random_qwen3.py model.gguf [--layers 36]
import argparse

import gguf
import numpy

HIDDEN, FFN, HEADS, KV_HEADS, DIM, WORDS, CONTEXT = 4096, 12288, 32, 8, 128, 151936, 262144


def q4_0(rng, rows, columns):
    """Random blocks: an fp16 scale and 32 codes of 4 bits each. Weights have a deviation of 1 / sqrt(columns)."""
    blocks = rng.integers(0, 256, (rows, columns // 32, 18), dtype=numpy.uint8)
    scale = numpy.array([1 / (4.6 * columns**0.5)], numpy.float16).view(numpy.uint8)
    blocks[:, :, 0:2] = scale
    return blocks.reshape(rows, columns // 32 * 18)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("out")
    arguments.add_argument("--layers", type=int, default=36)
    options = arguments.parse_args()
    writer = gguf.GGUFWriter(options.out, "qwen3")
    writer.add_block_count(options.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(DIM)
    writer.add_value_length(DIM)
    writer.add_rope_freq_base(1000000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(WORDS)
    q4, f32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32
    tensors = [("token_embd", (WORDS, HIDDEN)), ("output", (WORDS, HIDDEN)), ("output_norm", (HIDDEN,))]
    for i in range(options.layers):
        tensors += [(f"blk.{i}.{name}", shape) for name, shape in (
            ("attn_norm", (HIDDEN,)), ("attn_q", (HEADS * DIM, HIDDEN)), ("attn_k", (KV_HEADS * DIM, HIDDEN)),
            ("attn_v", (KV_HEADS * DIM, HIDDEN)), ("attn_output", (HIDDEN, HEADS * DIM)), ("attn_q_norm", (DIM,)),
            ("attn_k_norm", (DIM,)), ("ffn_norm", (HIDDEN,)), ("ffn_gate", (FFN, HIDDEN)), ("ffn_up", (FFN, HIDDEN)),
            ("ffn_down", (HIDDEN, FFN)))]
    for name, shape in tensors:
        size = 4 * shape[0] if len(shape) == 1 else shape[0] * shape[1] // 32 * 18
        writer.add_tensor_info(name + ".weight", shape if len(shape) == 1 else (shape[0], shape[1] // 32 * 18),
                               numpy.dtype(numpy.float32 if len(shape) == 1 else numpy.uint8), size,
                               f32 if len(shape) == 1 else q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = numpy.random.default_rng(1)
    for _, shape in tensors:
        writer.write_tensor_data(numpy.ones(shape, numpy.float32) if len(shape) == 1 else q4_0(rng, *shape))
    writer.close()


if __name__ == "__main__":
    main()
