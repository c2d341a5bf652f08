#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
#   tiny_models.py FOLDER [ARCHITECTURE]...
#
# Writes models of a few layers with random weights in fp32, as GGUF files, one for each architecture whose attention
# differs in something that a cache has to do with. They have no tokenizer: tokens are numbers.
import sys
from pathlib import Path

import gguf
import numpy as np

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, DIM, TOKENS = 128, 256, 3, 4, 2, 64, 256


class Model:
    def __init__(self, folder, name, architecture, layers=LAYERS):
        self.random = np.random.default_rng(1)
        self.writer = w = gguf.GGUFWriter(str(folder / f"{name}.gguf"), architecture)
        self.architecture = architecture
        self.layers = layers
        w.add_tokenizer_model("no_vocab")
        w.add_vocab_size(TOKENS)
        w.add_context_length(4096)
        w.add_embedding_length(WIDTH)
        w.add_block_count(layers)
        w.add_feed_forward_length(HIDDEN)
        w.add_head_count(HEADS)
        w.add_layer_norm_rms_eps(1e-5)
        w.add_file_type(gguf.LlamaFileType.ALL_F32)

    def number(self, key, value):
        key = f"{self.architecture}.{key}"
        if isinstance(value, float):
            self.writer.add_float32(key, value)
        elif isinstance(value, bool):
            self.writer.add_bool(key, value)
        elif isinstance(value, list):
            self.writer.add_array(key, value)
        else:
            self.writer.add_uint32(key, value)

    # [outputs][inputs], as numpy has it
    def matrix(self, name, *shape, gain=1.0):
        x = self.random.standard_normal(shape) * gain / np.sqrt(shape[-1])
        self.writer.add_tensor(f"{name}", x.astype(np.float32))

    def norm(self, name, n=WIDTH):
        self.writer.add_tensor(name, (1 + 0.1 * self.random.standard_normal(n)).astype(np.float32))

    def bias(self, name, n, size=0.5):
        self.writer.add_tensor(name, (size * self.random.standard_normal(n)).astype(np.float32))

    def frame(self):
        self.writer.add_tensor("token_embd.weight",
                               self.random.standard_normal((TOKENS, WIDTH)).astype(np.float32))
        self.norm("output_norm.weight")

    def attention(self, i, heads=HEADS, kv_heads=KV_HEADS, dim=DIM):
        b = f"blk.{i}."
        self.norm(b + "attn_norm.weight")
        self.matrix(b + "attn_q.weight", heads * dim, WIDTH, gain=2.0)
        self.matrix(b + "attn_k.weight", kv_heads * dim, WIDTH, gain=2.0)
        self.matrix(b + "attn_v.weight", kv_heads * dim, WIDTH)
        self.matrix(b + "attn_output.weight", WIDTH, heads * dim)

    def dense(self, i):
        b = f"blk.{i}."
        self.norm(b + "ffn_norm.weight")
        self.matrix(b + "ffn_gate.weight", HIDDEN, WIDTH)
        self.matrix(b + "ffn_up.weight", HIDDEN, WIDTH)
        self.matrix(b + "ffn_down.weight", WIDTH, HIDDEN)

    def plain_heads(self, dim=DIM, kv_heads=KV_HEADS):
        self.writer.add_head_count_kv(kv_heads)
        self.writer.add_key_length(dim)
        self.writer.add_value_length(dim)
        self.writer.add_rope_dimension_count(dim)
        self.writer.add_rope_freq_base(10000.0)

    def write(self):
        w = self.writer
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()


def llama(folder):
    m = Model(folder, "llama", "llama")
    m.plain_heads()
    m.frame()
    for i in range(m.layers):
        m.attention(i)
        m.dense(i)
    m.write()


# Keys with a large mean before RoPE.
def qwen2(folder):
    dim = WIDTH // HEADS
    m = Model(folder, "qwen2", "qwen2")
    m.plain_heads(dim)
    m.frame()
    for i in range(m.layers):
        m.attention(i, dim=dim)
        m.bias(f"blk.{i}.attn_q.bias", HEADS * dim)
        m.bias(f"blk.{i}.attn_k.bias", KV_HEADS * dim, 2.0)
        m.bias(f"blk.{i}.attn_v.bias", KV_HEADS * dim)
        m.dense(i)
    m.write()


def qwen3(folder):
    m = Model(folder, "qwen3", "qwen3")
    m.plain_heads()
    m.frame()
    for i in range(m.layers):
        m.attention(i)
        m.norm(f"blk.{i}.attn_q_norm.weight", DIM)
        m.norm(f"blk.{i}.attn_k_norm.weight", DIM)
        m.dense(i)
    m.write()


# Two caches, one with a sliding window; scores and logits are capped.
def gemma2(folder):
    m = Model(folder, "gemma2", "gemma2", layers=4)
    m.plain_heads()
    m.writer.add_sliding_window(32)
    m.number("attn_logit_softcapping", 20.0)
    m.number("final_logit_softcapping", 30.0)
    m.frame()
    for i in range(m.layers):
        m.attention(i)
        m.norm(f"blk.{i}.post_attention_norm.weight")
        m.dense(i)
        m.norm(f"blk.{i}.post_ffw_norm.weight")
    m.write()


def gemma3(folder):
    m = Model(folder, "gemma3", "gemma3", layers=7)
    m.plain_heads()
    m.writer.add_sliding_window(32)
    m.frame()
    for i in range(m.layers):
        m.attention(i)
        m.norm(f"blk.{i}.attn_q_norm.weight", DIM)
        m.norm(f"blk.{i}.attn_k_norm.weight", DIM)
        m.norm(f"blk.{i}.post_attention_norm.weight")
        m.dense(i)
        m.norm(f"blk.{i}.post_ffw_norm.weight")
    m.write()


# Values are the first channels of keys (multi-head latent attention).
def deepseek2(folder):
    m = Model(folder, "deepseek2", "deepseek2")
    rank, rope, nope, value = 128, 32, 64, 64
    w = m.writer
    w.add_head_count_kv(1)
    w.add_key_length(rank + rope)
    w.add_value_length(rank)
    w.add_key_length_mla(nope + rope)
    w.add_value_length_mla(value)
    w.add_q_lora_rank(64)
    w.add_kv_lora_rank(rank)
    w.add_rope_dimension_count(rope)
    w.add_rope_freq_base(10000.0)
    w.add_leading_dense_block_count(m.layers)
    w.add_expert_count(4)
    w.add_expert_used_count(2)
    w.add_expert_feed_forward_length(64)
    w.add_expert_shared_count(1)
    w.add_expert_weights_scale(1.0)
    m.frame()
    for i in range(m.layers):
        b = f"blk.{i}."
        m.norm(b + "attn_norm.weight")
        m.matrix(b + "attn_q_a.weight", 64, WIDTH)
        m.norm(b + "attn_q_a_norm.weight", 64)
        m.matrix(b + "attn_q_b.weight", HEADS * (nope + rope), 64, gain=2.0)
        m.matrix(b + "attn_kv_a_mqa.weight", rank + rope, WIDTH, gain=2.0)
        m.norm(b + "attn_kv_a_norm.weight", rank)
        m.matrix(b + "attn_k_b.weight", HEADS, rank, nope)
        m.matrix(b + "attn_v_b.weight", HEADS, value, rank)
        m.matrix(b + "attn_output.weight", WIDTH, HEADS * value)
        m.dense(i)
    m.write()


# Sink logits, alternating sliding windows, experts.
def gpt_oss(folder):
    m = Model(folder, "gpt-oss", "gpt-oss", layers=4)
    experts, hidden = 4, 64
    m.plain_heads()
    w = m.writer
    w.add_sliding_window(32)
    w.add_expert_count(experts)
    w.add_expert_used_count(2)
    w.add_expert_feed_forward_length(hidden)
    m.frame()
    m.matrix("output.weight", TOKENS, WIDTH)
    for i in range(m.layers):
        b = f"blk.{i}."
        m.attention(i)
        m.norm(b + "post_attention_norm.weight")
        for side, n in (("q", HEADS * DIM), ("k", KV_HEADS * DIM), ("v", KV_HEADS * DIM)):
            m.bias(b + f"attn_{side}.bias", n)
        m.bias(b + "attn_output.bias", WIDTH)
        m.bias(b + "attn_sinks.weight", HEADS, 2.0)
        m.matrix(b + "ffn_gate_inp.weight", experts, WIDTH)
        m.bias(b + "ffn_gate_inp.bias", experts)
        for side, shape in (("gate", (hidden, WIDTH)), ("up", (hidden, WIDTH)), ("down", (WIDTH, hidden))):
            m.matrix(b + f"ffn_{side}_exps.weight", experts, *shape)
            m.bias(b + f"ffn_{side}_exps.bias", (experts, shape[0]), 0.1)
    m.write()


# Attention in some layers, short convolutions with a state in the others.
def lfm2(folder):
    m = Model(folder, "lfm2", "lfm2", layers=4)
    w = m.writer
    w.add_head_count_kv([0, KV_HEADS, 0, KV_HEADS])
    w.add_rope_dimension_count(WIDTH // HEADS)
    w.add_rope_freq_base(10000.0)
    w.add_shortconv_l_cache(3)
    dim = WIDTH // HEADS
    m.writer.add_tensor("token_embd.weight", m.random.standard_normal((TOKENS, WIDTH)).astype(np.float32))
    m.norm("token_embd_norm.weight")
    for i in range(m.layers):
        b = f"blk.{i}."
        if i % 2:
            m.attention(i, dim=dim)
            m.norm(b + "attn_q_norm.weight", dim)
            m.norm(b + "attn_k_norm.weight", dim)
        else:
            m.norm(b + "attn_norm.weight")
            m.matrix(b + "shortconv.conv.weight", WIDTH, 3)
            m.matrix(b + "shortconv.in_proj.weight", 3 * WIDTH, WIDTH)
            m.matrix(b + "shortconv.out_proj.weight", WIDTH, WIDTH)
        m.dense(i)
    m.write()


# ALiBi, and no RoPE.
def bloom(folder):
    m = Model(folder, "bloom", "bloom")
    m.number("attention.layer_norm_epsilon", 1e-5)
    m.frame()
    m.bias("output_norm.bias", WIDTH)
    m.norm("token_embd_norm.weight")
    m.bias("token_embd_norm.bias", WIDTH)
    for i in range(m.layers):
        b = f"blk.{i}."
        m.norm(b + "attn_norm.weight")
        m.bias(b + "attn_norm.bias", WIDTH)
        m.matrix(b + "attn_qkv.weight", 3 * WIDTH, WIDTH, gain=2.0)
        m.bias(b + "attn_qkv.bias", 3 * WIDTH)
        m.matrix(b + "attn_output.weight", WIDTH, WIDTH)
        m.bias(b + "attn_output.bias", WIDTH)
        m.norm(b + "ffn_norm.weight")
        m.bias(b + "ffn_norm.bias", WIDTH)
        m.matrix(b + "ffn_up.weight", HIDDEN, WIDTH)
        m.bias(b + "ffn_up.bias", HIDDEN)
        m.matrix(b + "ffn_down.weight", WIDTH, HIDDEN)
        m.bias(b + "ffn_down.bias", WIDTH)
    m.write()


ALL = {f.__name__: f for f in (llama, qwen2, qwen3, gemma2, gemma3, deepseek2, gpt_oss, lfm2, bloom)}

if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or ALL:
        ALL[name](out)
