#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
#
#   check_server.py LLAMA_SERVER LIBGGML_KV1 MODEL [THREADS] [PART]...
#
# llama-server on kv1's cache, as its clients see it: parallel clients, prompts cached and reused, slots saved and restored,
# context shift, speculative decoding, calibration. With a cache of "16" greedy text is that of the server without the
# backend; with codes a slot that was restored goes on as it would have. Needs Python alone.
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

# Quantized weights round activations, which makes much of little. On SmolLM2 in Q4_1, log-probabilities of llama.cpp's own
# server move by up to 0.18 with the size of its batches. Twice that is allowed; where two tokens are closer, either may be
# written, and texts go apart there.
NEAR = TIE = 0.36

TOPICS = ("the history of a harbour town", "how bread is baked", "rivers and the bridges over them",
          "the moons of the outer planets")


def prompt(topic, sentences=6, first=0):
    parts = [f"This is a short essay about {topic}."]
    for i in range(first, sentences):
        parts.append(f"In part {i + 1} of {sentences} we look at {topic} from another side, and ask what a reader who "
                     f"knew nothing of it {10 * (i + 1)} years ago would have wanted to be told first.")
    return " ".join(parts) + " To begin with,"


class Server:
    """llama-server, on kv1's cache of a policy, or on its own (None)."""

    def __init__(self, check, policy, *options, variables=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("KV1_", "GGML_", "LLAMA_ARG"))}
        device = ["-dev", "none", "-ngl", "0"]
        if policy is not None:
            device = ["-dev", "KV1", "-ngl", "99"]
            environment["GGML_BACKEND_PATH"] = check.backend
            if policy:
                environment["KV1_POLICY"] = policy
        environment.update(variables or {})
        self.log = open(check.folder / f"server-{check.servers}.log", "w+")
        check.servers += 1
        self.process = subprocess.Popen(
            [check.server, "-m", check.model, "-t", str(check.threads), "-fa", "on", "--no-repack", "--port",
             str(self.port), "--slot-save-path", str(check.folder), "-lv", "4", "--no-warmup", *device, *options],
            env=environment, stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                if self.get("/health")["status"] == "ok":
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise RuntimeError("the server did not start:\n" + self.text()[-3000:])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=60)

    def text(self):
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=600) as r:
            return json.load(r)

    def post(self, path, body):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as r:
                return json.load(r)
        except urllib.error.HTTPError as e:
            raise RuntimeError(f"{path}: {e.code} {e.read().decode(errors='replace')}") from e

    def complete(self, text, tokens=24, **more):
        return self.post("/completion", {"prompt": text, "n_predict": tokens, "temperature": 0, "n_probs": 2,
                                         "cache_prompt": False, "seed": 1, **more})


def tokens_of(answer):
    return [(t["id"], t["logprob"], t["top_logprobs"]) for t in answer["completion_probabilities"]]


class Check:
    def __init__(self, server, backend, model, threads, folder):
        self.server, self.backend, self.model, self.threads = server, str(Path(backend).resolve()), model, threads
        self.folder, self.servers, self.failures = folder, 0, []

    def that(self, holds, what):
        print(f"    {'ok  ' if holds else 'FAIL'} {what}", flush=True)
        if not holds:
            self.failures.append(what)

    def same(self, expected, got, what, probabilities=True):
        """Greedy tokens are the same, or go apart where two were as good as equal."""
        a, b = tokens_of(expected), tokens_of(got)
        for i, (x, y) in enumerate(zip(a, b)):
            if x[0] != y[0]:
                gap = x[2][0]["logprob"] - x[2][1]["logprob"]
                self.that(gap < TIE, f"{what}: {i} of {len(a)} tokens, then {gap:.3f} nats decide")
                return
            if probabilities and abs(x[1] - y[1]) > NEAR:
                self.that(False, f"{what}: token {i} has log-probability {y[1]:.3f}, not {x[1]:.3f}")
                return
        self.that(len(a) == len(b) and len(a) > 0, f"{what}: {len(a)} tokens")

    # ---- parts

    def parallel(self):
        """four clients at once, each as if alone"""
        with Server(self, None, "-c", "4096", "-np", "1") as plain:
            expected = [plain.complete(prompt(t)) for t in TOPICS]
        for policy, options in (("16", ("--kv-unified",)), ("16", ("--no-kv-unified",)), ("safe", ("--kv-unified",))):
            with Server(self, policy, "-c", "4096", "-np", "4", *options) as server:
                answers = [None] * len(TOPICS)

                def ask(i):
                    answers[i] = server.complete(prompt(TOPICS[i]))

                clients = [threading.Thread(target=ask, args=(i,)) for i in range(len(TOPICS))]
                for c in clients:
                    c.start()
                for c in clients:
                    c.join()
                for i, answer in enumerate(answers):
                    what = f"{policy} {options[0]}, client {i}"
                    if answer is None:
                        self.that(False, f"{what}: no answer")
                    elif policy == "16":
                        self.same(expected[i], answer, what)
                    else:
                        self.that(len(tokens_of(answer)) == 24, f"{what}: {answer['content'][:40]!r}")
                self.that("kv1: " + policy[:1] in server.text() or "kv1: c3" in server.text(),
                          f"{policy}: the log says what is in use")

    def prompts(self):
        """a prompt that begins like the last one is computed from where it differs"""
        first, second = prompt(TOPICS[0]), prompt(TOPICS[0]) + " nobody remembers who came first. And yet"
        dropped = prompt(TOPICS[0], first=2) # what follows its first sentence is kept, at other positions
        with Server(self, None, "-c", "2048", "-np", "1") as plain:
            expected = plain.complete(second)
        with Server(self, None, "-c", "2048", "-np", "1", "--cache-reuse", "16") as plain:
            plain.complete(second, cache_prompt=True)
            plain_dropped = plain.complete(dropped, cache_prompt=True)
        with Server(self, "16", "-c", "2048", "-np", "1", "--cache-reuse", "16") as server:
            server.complete(first, cache_prompt=True)
            answer = server.complete(second, cache_prompt=True)
            self.that(answer["timings"]["cache_n"] > 100, f"{answer['timings']['cache_n']} tokens were there")
            self.same(expected, answer, "what follows them")
            answer = server.complete(dropped, cache_prompt=True)
            self.that(answer["timings"]["cache_n"] > 100, f"{answer['timings']['cache_n']} tokens were moved")
            self.same(plain_dropped, answer, "what follows them")
        with Server(self, "safe", "-c", "2048", "-np", "1", "--cache-ram", "256") as server:
            # Prompts of the one slot go to the server's memory and come back.
            server.complete(first, cache_prompt=True)
            before = server.complete(second, cache_prompt=True)
            server.complete(prompt(TOPICS[1]), cache_prompt=True)
            after = server.complete(second, cache_prompt=True)
            self.that(after["timings"]["cache_n"] > 100, f"{after['timings']['cache_n']} tokens came back from memory")
            self.that(len(tokens_of(before)) == len(tokens_of(after)) == 24, "and go on")

    def slots(self):
        """a slot is saved, erased, restored, in this server and in the next"""
        text, more = prompt(TOPICS[2]), prompt(TOPICS[2]) + " the oldest of them"
        for policy in ("16", "safe"):
            name = f"slot-{policy}.bin"
            options = ("-c", "2048", "-np", "2", "--no-kv-unified")
            with Server(self, policy, *options) as server:
                server.complete(text, 1, cache_prompt=True, id_slot=0)
                saved = server.post("/slots/0?action=save", {"filename": name})
                expected = server.complete(more, cache_prompt=True, id_slot=0)
                server.post("/slots/0?action=erase", {})
                server.complete(prompt(TOPICS[3]), 4, cache_prompt=True, id_slot=0)
                restored = server.post("/slots/0?action=restore", {"filename": name})
                self.that(saved["n_saved"] == restored["n_restored"] > 100,
                          f"{policy}: {saved['n_saved']} tokens saved, {restored['n_restored']} restored")
                answer = server.complete(more, cache_prompt=True, id_slot=0)
                self.that(answer["timings"]["cache_n"] > 100, f"{policy}: {answer['timings']['cache_n']} were used")
                self.same(expected, answer, f"{policy}: restored")
            with Server(self, policy, *options) as server:
                server.post("/slots/1?action=restore", {"filename": name})
                answer = server.complete(more, cache_prompt=True, id_slot=1)
                self.same(expected, answer, f"{policy}: restored by another server, in another slot")

    def shift(self):
        """a text longer than the context: its older half goes, and the rest is turned"""
        options = ("-c", "256", "-np", "1", "--context-shift", "--keep", "8")
        text = prompt(TOPICS[0], 5) # of 232 tokens
        with Server(self, None, *options) as plain:
            expected = plain.complete(text, 60)
        for policy in ("16", "safe"):
            with Server(self, policy, *options) as server:
                answer = server.complete(text, 60)
                self.that("slot context shift" in server.text(), f"{policy}: the context was shifted")
                if policy == "16":
                    self.same(expected, answer, "16")
                self.that(len(tokens_of(answer)) == 60, f"{policy}: {len(tokens_of(answer))} tokens")

    def speculative(self):
        """a draft's tokens are tried, and dropped where they are wrong"""
        text = prompt(TOPICS[1])
        with Server(self, None, "-c", "1024", "-np", "1") as plain:
            expected = plain.complete(text, 48)
        # The model as its own draft, and words that follow each other again, which are often wrong.
        draft = ("-md", self.model, "--spec-type", "draft-simple", "--spec-draft-n-max", "4", "-devd")
        kinds = {"draft on KV1": (*draft, "KV1"), "draft on none": (*draft, "none"),
                 "n-grams": ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2",
                             "--spec-ngram-simple-size-m", "4")}
        for policy in ("16", "safe"):
            for kind, options in kinds.items():
                with Server(self, policy, "-c", "1024", "-np", "1", *options) as server:
                    answer = server.complete(text, 48)
                    t = answer["timings"]
                    self.that(t.get("draft_n", 0) > 0,
                              f"{policy}, {kind}: {t.get('draft_n_accepted')} of {t.get('draft_n')} drafted tokens stay")
                    if policy == "16":
                        self.same(expected, answer, f"{policy}, {kind}", probabilities=False)

    def calibration(self):
        """a server's work is a calibration, which the next one uses"""
        file = str(self.folder / "server.kv1calib")
        with Server(self, "", "-c", "2048", "-np", "2", variables={"KV1_CALIBRATE": file}) as server:
            for topic in TOPICS:
                server.complete(prompt(topic), 4)
        self.that(Path(file).exists(), "written when the server ends")
        with Server(self, "", "-c", "2048", "-np", "2", variables={"KV1_CALIBRATION": file}) as server:
            answer = server.complete(prompt(TOPICS[0]))
            self.that("+mean" in server.text(), "its policy is in use")
            self.that(len(tokens_of(answer)) == 24, f"{answer['content'][:40]!r}")


PARTS = ("parallel", "prompts", "slots", "shift", "speculative", "calibration")


def main():
    if len(sys.argv) < 4:
        sys.exit("usage: check_server.py LLAMA_SERVER LIBGGML_KV1 MODEL [THREADS] [PART]...")
    server, backend, model = sys.argv[1:4]
    threads = int(sys.argv[4]) if len(sys.argv) > 4 else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        check = Check(server, backend, model, threads, Path(folder))
        for name in sys.argv[5:] or PARTS:
            part = getattr(check, name)
            print(f"{name}: {part.__doc__}", flush=True)
            try:
                part()
            except (RuntimeError, KeyError, OSError) as e:
                check.that(False, f"{name}: {e!r}")
    if check.failures:
        sys.exit(f"{len(check.failures)} failed")


if __name__ == "__main__":
    main()
