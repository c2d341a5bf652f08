#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""PEFT loads what kv1-train writes: an adapter's logits in PEFT are those of the weights that kv1-train merged.

usage: check_peft.py KV1_TRAIN BASE_FOLDER       needs torch, transformers, peft and tokenizers
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import torch
    from peft import PeftModel
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    from transformers import AutoModelForCausalLM
except ImportError as missing:
    print("skipped:", missing)
    sys.exit(0)

program, golden = sys.argv[1], Path(sys.argv[2])


def run(*arguments):
    subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    base = folder / "base"
    shutil.copytree(golden, base)
    # 64 words: an end, letters and a space
    letters = "abcdefghijklmnopqrstuvwxyz "
    words = {"<|end|>": 0}
    for letter in letters:
        words["\u0120" if letter == " " else letter] = len(words)
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(base / "tokenizer.json"))
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and the dog lay by the door " * 40)
    run("pack", "--text", text, "--tokenizer", base, "--out", folder / "tokens", "--document-end", "<|end|>")
    run("train", "--data", folder / "tokens", "--model", base, "--out", folder / "run", "--lora-rank", 4, "--lora-targets",
        "q_proj,k_proj,v_proj,o_proj,down_proj", "--lora-norms", "--steps", 8, "--batch", 4, "--length", 32, "--lr", 2e-2,
        "--warmup", 1, "--held-out", 66, "--kv", "c2+ls@1:4", "--device", "cpu", "--seed", 3)
    adapter = folder / "run" / "step-00000008"
    run("merge", "--model", base, "--adapter", adapter, "--out", folder / "merged")

    ids = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def logits(model):
        return model.float().eval()(ids).logits

    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    changed = ((adapted - plain).norm() / plain.norm()).item()
    differs = ((adapted - merged).norm() / plain.norm()).item()
    print(f"the adapter changes logits by {changed:.4f} of their size, PEFT and the merged weights differ by {differs:.6f}")
    # Merged weights and adapters are rounded to fp16's 11 bits.
    assert changed > 0.02 and differs < 0.003
    unused = json.loads((adapter / "adapter_config.json").read_text())
    assert unused["r"] == 4 and unused["peft_type"] == "LORA"
