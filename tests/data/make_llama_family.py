#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes llama_family/: tiny random models of the Llama family as Transformers saves them, each with an adapter as
PEFT saves it, and the logits of both: golden.safetensors has ids, logits [tokens][words], adapted_logits.

usage: make_llama_family.py FOLDER       needs torch, transformers, peft and safetensors
"""
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

COMMON = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, use_cache=False)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**COMMON, rope_theta=10000.0, tie_word_embeddings=False), ATTENTION),
    "llama_tied": (LlamaForCausalLM,
                   LlamaConfig(**COMMON, rope_theta=100000.0, tie_word_embeddings=True, attention_bias=True),
                   ["q_proj", "v_proj"]),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**COMMON, rope_theta=1000000.0, tie_word_embeddings=True),
              ATTENTION + ["gate_proj", "up_proj", "down_proj"]),
    "qwen3": (Qwen3ForCausalLM,
              Qwen3Config(**COMMON, head_dim=16, rope_theta=1000000.0, tie_word_embeddings=False), ATTENTION),
}


@torch.no_grad()
def fill(parameters, generator):
    """Logits of a few units, which tell one architecture from another; biases and norms are not 0 and 1."""
    for name, p in parameters:
        noise = torch.randn(p.shape, generator=generator)
        if "lora_" in name:
            p.copy_(noise * 0.3)
        elif "norm" in name:
            p.copy_(1 + noise * 0.2)
        elif name.endswith("bias"):
            p.copy_(noise * 0.3)
        else:
            p.copy_(noise * (1.0 if "embed" in name else 1.5 / p.shape[1] ** 0.5))


def main(out):
    for name, (model_class, config, targets) in MODELS.items():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(len(name))
        config._attn_implementation = "eager"
        model = model_class(config).float().eval()
        fill(model.named_parameters(), generator)
        folder = out / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        ids = torch.randint(0, config.vocab_size, (1, 40), generator=generator)
        with torch.no_grad():
            logits = model(ids).logits[0]
        adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM"))
        adapted.eval()
        fill([(n, p) for n, p in adapted.named_parameters() if "lora_" in n], generator)
        with torch.no_grad():
            adapted_logits = adapted(ids).logits[0]
        adapted.save_pretrained(folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
        config_file = folder / "adapter" / "adapter_config.json"
        written = json.loads(config_file.read_text())
        written["base_model_name_or_path"] = name
        written["target_modules"] = sorted(written["target_modules"])
        config_file.write_text(json.dumps(written, indent=2) + "\n")
        save_file({"ids": ids[0].float(), "logits": logits.contiguous(), "adapted_logits": adapted_logits.contiguous()},
                  folder / "golden.safetensors")
        print(name, logits.std().item(), (adapted_logits - logits).abs().mean().item())


main(Path(sys.argv[1]))
