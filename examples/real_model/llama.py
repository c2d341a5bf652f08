# SPDX-License-Identifier: Apache-2.0
#
# A model of the Llama family in numpy: weights and tokenizer from a GGUF file, and a forward pass that attends
# wherever its caller's cache is. It is an engine small enough to read. What it shows is where a cache stands in one:
# forward() calls attend(layer, queries, keys, values) once a layer, with queries and keys after RoPE.
#
# Needs numpy, gguf and tokenizers from PyPI.
import numpy


class Model:
    def __init__(self, path):
        import gguf

        reader = gguf.GGUFReader(path)
        self.fields = reader.fields
        if self.value("general.architecture") != "llama":
            raise SystemExit(f"{path}: the architecture is not llama")
        self.layers = self.value("llama.block_count")
        self.heads = self.value("llama.attention.head_count")
        self.kv_heads = self.value("llama.attention.head_count_kv")
        self.dim = self.value("llama.embedding_length") // self.heads
        self.epsilon = self.value("llama.attention.layer_norm_rms_epsilon")
        self.weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(numpy.float32)
                        for t in reader.tensors}
        self.unembedding = self.weights.get("output.weight", self.weights["token_embd.weight"])
        # of each pair of neighbouring channels, in radians a position
        base, turned = self.value("llama.rope.freq_base"), self.value("llama.rope.dimension_count")
        self.frequencies = float(base) ** (-numpy.arange(0, turned, 2) / turned)

    def value(self, name):
        return self.fields[name].contents()

    def tokenizer(self):
        """Byte-level BPE whose digits stand alone, as SmolLM2 has it."""
        import tokenizers

        if self.value("tokenizer.ggml.pre") != "smollm":
            raise SystemExit("the tokenizer is not SmolLM2's")
        tokens = self.value("tokenizer.ggml.tokens")
        merges = [tuple(m.split(" ")) for m in self.value("tokenizer.ggml.merges")]
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.Digits(individual_digits=True),
             tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
        return bpe

    def normalize(self, x, name):
        scale = 1 / numpy.sqrt(numpy.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x * scale * self.weights[name]

    def turn(self, x):
        """RoPE of [tokens][heads][channels]: token p's channels 2j and 2j + 1 turn by p times frequency j."""
        angles = numpy.arange(len(x))[:, None, None] * self.frequencies
        cosine, sine = numpy.cos(angles).astype(numpy.float32), numpy.sin(angles).astype(numpy.float32)
        out = x.copy()
        n = 2 * len(self.frequencies)
        out[..., 0:n:2] = x[..., 0:n:2] * cosine - x[..., 1:n:2] * sine
        out[..., 1:n:2] = x[..., 0:n:2] * sine + x[..., 1:n:2] * cosine
        return out

    def forward(self, tokens, attend):
        """The normalized hidden states of a text, [tokens][channels]."""
        w = self.weights
        x = w["token_embd.weight"][tokens]
        for layer in range(self.layers):
            name = f"blk.{layer}."
            h = self.normalize(x, name + "attn_norm.weight")
            q = (h @ w[name + "attn_q.weight"].T).reshape(len(tokens), self.heads, self.dim)
            k = (h @ w[name + "attn_k.weight"].T).reshape(len(tokens), self.kv_heads, self.dim)
            v = (h @ w[name + "attn_v.weight"].T).reshape(len(tokens), self.kv_heads, self.dim)
            a = attend(layer, self.turn(q), self.turn(k), v)
            x = x + a.reshape(len(tokens), -1) @ w[name + "attn_output.weight"].T
            h = self.normalize(x, name + "ffn_norm.weight")
            gate = h @ w[name + "ffn_gate.weight"].T
            gate = gate / (1 + numpy.exp(-gate)) * (h @ w[name + "ffn_up.weight"].T)
            x = x + gate @ w[name + "ffn_down.weight"].T
        return self.normalize(x, "output_norm.weight")

    def log_probabilities(self, hidden):
        logits = hidden @ self.unembedding.T
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= numpy.log(numpy.exp(logits).sum(axis=-1, keepdims=True))
        return logits


def plain_attention(layer, q, k, v, queries=256):
    """Causal attention in fp32 on keys and values as they are, some queries at a time."""
    out = numpy.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for first in range(0, len(q), queries):
        last = min(first + queries, len(q))
        hidden = numpy.arange(last)[None] > numpy.arange(first, last)[:, None]
        for head in range(q.shape[1]):
            scores = q[first:last, head] @ k[:last, head // group].T / numpy.float32(q.shape[2] ** 0.5)
            scores[hidden] = -numpy.inf
            weights = numpy.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[first:last, head] = weights @ v[:last, head // group]
    return out
