# SPDX-License-Identifier: Apache-2.0
#
# What a cache policy costs a model that nobody trained for it. README.md has the commands.
#
#   calibrate   lets the model read texts, and writes the calibration file
#   kld         lets it read another text twice, with a plain fp32 cache and with kv1's, and prints the mean KL
#               divergence of the second prediction from the first, in nats a token, and the perplexity
#   choose      measures what each layer costs under each of some policies, all others plain, and prints how each layer
#               should be kept so that a vector takes so many bytes on average
import argparse
import random
import time

import numpy

import cache
import llama
import peers


def chunks(model, paths, tokens, wanted, shuffled):
    """So many chunks of a text's tokens; texts are cut anew after each chunk. Shuffled: from all over them."""
    tokenizer = model.tokenizer()
    found = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            ids = tokenizer.encode(file.read()).ids
        found += [ids[i:i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)]
    if shuffled:
        random.Random(1).shuffle(found)
    if len(found) < wanted:
        raise SystemExit(f"the texts have {len(found)} chunks of {tokens} tokens; {wanted} were asked for")
    return [numpy.array(c) for c in found[:wanted]]


def calibrate(options, model, library):
    calibrator = cache.Calibrator(library, model, options.policy, options.stride)

    def attend(layer, q, k, v):
        calibrator.add(layer, q, k, v)
        return llama.plain_attention(layer, q, k, v)

    for tokens, wanted in (1024, options.short), (8192, options.long):
        for chunk in chunks(model, options.text, tokens, wanted, True) if wanted else []:
            start = time.time()
            model.forward(chunk, attend)
            print(f"{tokens} tokens, {time.time() - start:.0f} s", flush=True)
    calibrator.save(options.calibration)


def kld(options, model, library):
    texts = chunks(model, options.text, options.tokens, options.chunks, False)
    first = options.tokens - (options.last or options.tokens)
    plain = [model.forward(t, llama.plain_attention)[first:] for t in texts]
    print(f"{options.chunks} chunks of {options.tokens} tokens, positions from {first} on")
    print("| policy | KLD | perplexity |\n| --- | --- | --- |")
    for policy in [None] + options.policies + options.peers:
        divergence, loss, count, predicted = 0.0, 0.0, 0, 0
        for text, reference in zip(texts, plain):
            hidden = reference
            if policy in options.peers:
                hidden = model.forward(text, peers.attend(policy, model.dim))[first:]
            elif policy is not None:
                kept = cache.Cache(library, model, options.calibration, policy, len(text), options.exact)
                hidden = model.forward(text, kept.attend)[first:]
            for i in range(0, len(hidden), 256):
                p = model.log_probabilities(reference[i:i + 256])
                q = model.log_probabilities(hidden[i:i + 256]) if policy is not None else p
                divergence += float((numpy.exp(p) * (p - q)).sum(dtype=numpy.float64))
                following = text[first + i + 1:first + i + 1 + len(q)]
                loss -= float(q[numpy.arange(len(following)), following].sum(dtype=numpy.float64))
                count, predicted = count + len(q), predicted + len(following)
        print(f"| {policy or 'fp32'} | {divergence / count:.4f} | {numpy.exp(loss / predicted):.2f} |", flush=True)


def choose(options, model, library):
    texts = chunks(model, options.text, options.tokens, options.chunks, False)
    plain = [model.forward(t, llama.plain_attention) for t in texts]
    found = []
    for layer in range(model.layers):
        for policy in options.policies:
            kept_so, at, fp16 = policy.partition("@")
            divergence = 0.0
            for text, reference in zip(texts, plain):
                kept = cache.Cache(library, model, options.calibration, f"32/{layer}:{kept_so}{at}{fp16}", len(text))

                def attend(i, q, k, v):
                    return (kept.attend if i == layer else llama.plain_attention)(i, q, k, v)

                hidden = model.forward(text, attend)
                for i in range(0, len(hidden), 256):
                    p = model.log_probabilities(reference[i:i + 256])
                    q = model.log_probabilities(hidden[i:i + 256])
                    divergence += float((numpy.exp(p) * (p - q)).sum(dtype=numpy.float64))
            found.append((layer, policy, divergence / (len(texts) * options.tokens)))
            print(f"layer {layer}, {policy}: {found[-1][2]:.3g}", flush=True)
    vectors = 2 * model.kv_heads * model.layers
    print(library.choose_layers(cache.Shape(model, options.tokens), found, options.bytes * vectors))


def main():
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--library", required=True, help="kv1's C library, built with -DBUILD_SHARED_LIBS=ON")
    common.add_argument("--model", required=True, help="GGUF file of a Llama model")
    common.add_argument("--calibration", help="file that calibrate writes and kld reads; none: policies need none")
    common.add_argument("--text", nargs="+", required=True, help="text files")
    parser = argparse.ArgumentParser(description="What a cache policy costs a model that nobody trained for it.")
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("calibrate", parents=[common])
    first.add_argument("--policy", default="c3+ls+basis+had+mean+ew,c2+ls+basis+had+ew@4:32")
    first.add_argument("--short", type=int, default=16, help="chunks of 1,024 tokens")
    first.add_argument("--long", type=int, default=2, help="chunks of 8,192 tokens")
    first.add_argument("--stride", type=int, default=4, help="every so many queries count for error weights and bases")
    second = commands.add_parser("kld", parents=[common])
    second.add_argument("--policies", nargs="*", default=[])
    second.add_argument("--peers", nargs="*", default=[], help="caches of others (peers.py), such as q4_0+had")
    second.add_argument("--tokens", type=int, default=1024)
    second.add_argument("--chunks", type=int, default=8)
    second.add_argument("--last", type=int, help="positions of a chunk that count; all unless it is given")
    second.add_argument("--exact", action="store_true", help="attention in fp32 on decoded values")
    third = commands.add_parser("choose", parents=[common])
    third.add_argument("--policies", nargs="+", required=True, help="ways to keep a layer, with the same fp16 tokens")
    third.add_argument("--bytes", type=float, required=True, help="of a vector, on average")
    third.add_argument("--tokens", type=int, default=1024)
    third.add_argument("--chunks", type=int, default=2)
    options = parser.parse_args()
    if options.command == "calibrate" and options.calibration is None:
        parser.error("calibrate needs --calibration, the file to write")
    model, library = llama.Model(options.model), cache.Library(options.library)
    {"calibrate": calibrate, "kld": kld, "choose": choose}[options.command](options, model, library)


if __name__ == "__main__":
    main()
