#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a decoded token's attention takes over many ranks, on networks of a stated latency and bandwidth.

usage: simulate.py            prints tables
       simulate.py FIGURE.svg draws them, too (needs matplotlib). A dot: the shortest context, of powers of two, at
                              which communication is less than half of the time

Every rank has a clock, and every message of a collective moves those of its two ends: a step of a collective ends
latency + bytes / bandwidth after the later of both. Collectives are those that distributed_cache makes, as recursive
doubling (the extra ranks of other numbers than powers of two fold in first and out last). Between them a rank attends
to its own tokens; noise, drawn anew for each rank and layer, stands for what machines do beside.
"""
import math
import random
import sys

# Qwen3-8B: the cache's shape, and what was measured of it on one thread of a Zen 4 (README of the project): 0.25 s for
# 131,072 tokens in two bits.
LAYERS, HEADS, KV_HEADS, DIM, HIDDEN = 36, 32, 8, 128, 4096
SECONDS_A_TOKEN_AND_THREAD = 0.25 / 131072
BYTES_A_TOKEN = 36 * 8 * 72  # keys and values of 36 bytes
THREADS = 16  # of a rank
MEMORY_BANDWIDTH = 200e9  # of a rank, bytes a second
PAGE = 64
NOISE = 2e-6  # mean of an exponential distribution, seconds a layer
JOIN_BANDWIDTH = 4e9  # bytes of rows that a rank joins a second
AGREEMENT = 32  # bytes

# Seconds from one rank's memory to another's through MPI, and bytes a second: assumptions, of common hardware.
NETWORKS = {
    "10 Gbit/s Ethernet": (30e-6, 1.25e9),
    "100 Gbit/s Ethernet": (10e-6, 12.5e9),
    "200 Gbit/s InfiniBand": (2e-6, 25e9),
}
RANKS = (1, 2, 4, 8, 16, 32, 64)


class Group:
    """Ranks that talk to each other, by their places in a list of clocks."""

    def __init__(self, clocks, members, network):
        self.clocks, self.members = clocks, members
        self.latency, self.bandwidth = NETWORKS[network]

    def exchange(self, a, b, size, joined):
        end = max(self.clocks[a], self.clocks[b]) + self.latency + size / self.bandwidth + joined / JOIN_BANDWIDTH
        self.clocks[a] = self.clocks[b] = end

    def doubling(self, size_of_round, joined_of_round, last_size):
        """A collective of log2(n) rounds; `last_size`: what folded ranks get in the end."""
        n = len(self.members)
        power = 1 << (n.bit_length() - 1)
        for i in range(power, n):
            self.exchange(self.members[i - power], self.members[i], size_of_round(0), joined_of_round(0))
        for step in range(power.bit_length() - 1):
            for i in range(power):
                other = i ^ (1 << step)
                if i < other:
                    self.exchange(self.members[i], self.members[other], size_of_round(step), joined_of_round(step))
        for i in range(power, n):
            self.exchange(self.members[i - power], self.members[i], last_size, 0)

    def all_reduce(self, size, joined):
        if len(self.members) > 1:
            self.doubling(lambda step: size, lambda step: joined, size)

    def all_gather(self, size):
        n = len(self.members)
        if n > 1:
            self.doubling(lambda step: size << step, lambda step: 0, size * n)
            for m in self.members:
                self.clocks[m] += n * size / JOIN_BANDWIDTH


def simulate(tokens, ranks, network, join="reduced", head_groups=1, steps=2):
    """Seconds a token, and how many of them the slowest rank did not attend. head_groups: ranks are split into so many
    groups, each with its share of the KV heads; whole contexts are dealt within a group."""
    rng = random.Random(1)
    context_ranks = ranks // head_groups
    clocks = [0.0] * ranks
    columns = [
        Group(clocks, list(range(g * context_ranks, (g + 1) * context_ranks)), network) for g in range(head_groups)
    ]
    rows = [Group(clocks, list(range(c, ranks, context_ranks)), network) for c in range(context_ranks)]
    row_bytes = HEADS // head_groups * (DIM + 1) * 4
    attended = [0.0] * ranks
    for step in range(steps):
        length = tokens + step
        pages, rest = divmod(length, PAGE)
        for layer in range(LAYERS):
            for column in columns:
                column.all_reduce(AGREEMENT, 0)  # what append_and_attend was called with
                for place, rank in enumerate(column.members):
                    own = pages // context_ranks * PAGE
                    own += PAGE if place < pages % context_ranks else rest if place == pages % context_ranks else 0
                    share = own / (LAYERS * head_groups)
                    busy = max(
                        share * SECONDS_A_TOKEN_AND_THREAD / THREADS, share * BYTES_A_TOKEN / MEMORY_BANDWIDTH
                    ) + rng.expovariate(1 / NOISE)
                    clocks[rank] += busy
                    attended[rank] += busy
                if join == "reduced":
                    column.all_reduce(row_bytes, row_bytes)
                else:
                    column.all_gather(row_bytes)
            for row in rows:  # the output projection's partial sums; without head groups every rank has all heads
                row.all_reduce(HIDDEN * 4, HIDDEN * 4)
        for column in columns:
            column.all_reduce(AGREEMENT, 0)  # commit, twice
            column.all_reduce(AGREEMENT, 0)
    total = max(clocks) / steps
    return total, total - max(attended) / steps


def crossing(ranks, network, **how):
    """The shortest context, of powers of two, at which ranks attend longer than they talk."""
    for power in range(10, 28):
        total, talked = simulate(1 << power, ranks, network, **how)
        if talked < total / 2:
            return 1 << power
    return None


def faster_from(ranks, network, **how):
    """The shortest context, of powers of two, at which so many ranks are faster than one."""
    for power in range(10, 28):
        if simulate(1 << power, ranks, network, **how)[0] < simulate(1 << power, 1, network)[0]:
            return 1 << power
    return None


def short(tokens):
    if tokens is None:
        return "-"
    return f"{tokens >> 20} Mi" if tokens >= 1 << 20 else f"{tokens >> 10} Ki"


def table(head, lines):
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def tables():
    sizes = [1 << 17, 1 << 20, 1 << 22, 1 << 24]
    for network in NETWORKS:
        print(f"{network}: ms a token (share of communication), joined by reduction\n")
        lines = []
        for ranks in RANKS:
            cells = [str(ranks)]
            for tokens in sizes:
                total, talked = simulate(tokens, ranks, network)
                cells.append(f"{total * 1e3:.1f} ({100 * talked / total:.0f} %)")
            lines.append(cells + [short((1 << 24) // ranks), f"{(1 << 24) / ranks * BYTES_A_TOKEN / 2**30:.1f} GiB"])
        table(["ranks"] + [short(s) + " tokens" for s in sizes] + ["tokens a rank of 16 Mi", "bytes"], lines)
    print("Contexts from which ranks are faster than one, and from which communication is less than half of the time\n")
    table(
        ["ranks"] + [f"{n}, {j}" for n in NETWORKS for j in ("reduced", "in rank order")],
        [
            [str(r)]
            + [
                f"{short(faster_from(r, n, join=j))}, {short(crossing(r, n, join=j))}"
                for n in NETWORKS
                for j in ("reduced", "in_rank_order")
            ]
            for r in RANKS[1:]
        ],
    )
    print("64 ranks, split into groups by KV heads: ms a token (share of communication)\n")
    table(
        ["groups"] + [f"{n}, {short(s)}" for n in NETWORKS for s in (1 << 20, 1 << 24)],
        [
            [str(g)]
            + [
                "{:.1f} ({:.0f} %)".format(t * 1e3, 100 * c / t)
                for n in NETWORKS
                for s in (1 << 20, 1 << 24)
                for t, c in [simulate(s, 64, n, head_groups=g)]
            ]
            for g in (1, 2, 4, 8)
        ],
    )


def figure(path):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "kv1"  # the same bytes in every run
    colours = ["#6c757d", "#c17c18", "#0b6e4f", "#1d3557"]
    drawn, axes = plt.subplots(1, len(NETWORKS), figsize=(9.6, 3.6), sharey=True, layout="constrained")
    sizes = [1 << p for p in range(14, 25)]
    for ax, network in zip(axes, NETWORKS):
        for ranks, colour in zip((1, 4, 16, 64), colours):
            results = [simulate(s, ranks, network) for s in sizes]
            label = "1 rank" if ranks == 1 else f"{ranks} ranks"
            ax.plot([s / 2**20 for s in sizes], [t * 1e3 for t, _ in results], color=colour, label=label)
            if ranks > 1:
                ax.plot([s / 2**20 for s in sizes], [c * 1e3 for _, c in results], color=colour, ls=":", lw=1)
                half = crossing(ranks, network)
                if half in sizes:
                    ax.plot(half / 2**20, results[sizes.index(half)][0] * 1e3, "o", color=colour, ms=4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(network, fontsize=10)
        ax.set_xticks([2**-6, 2**-3, 1, 8], ["16 Ki", "128 Ki", "1 Mi", "8 Mi"])
        ax.set_xlabel("tokens")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("ms a token, of it communication dotted")
    axes[0].legend(fontsize=8)
    drawn.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    tables()
    if len(sys.argv) == 2:
        figure(sys.argv[1])
