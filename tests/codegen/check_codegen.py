#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that every function of an object file uses the instructions of its target, and no others.

usage: check_codegen.py FEATURES OBJDUMP OBJECT...

FEATURES is detail/target_features.hpp, whose lists say what each target may use. The target of a function is the
namespace it lies in: kv1's detail::<target>, or the xsimd that was parsed for it, kv1_xsimd_{avx2,avx512}. Everything
else is the baseline, which knows no VEX. Target avx512_vbmi is those functions of avx512_vnni that take keys in pairs.
"""
import collections
import re
import subprocess
import sys

# Classes of instructions that come with a feature.
BROUGHT = {"avx": {"vex"}, "avx512f": {"evex", "zmm"}, "avxvnni": {"vnni"}, "avx512vnni": {"vnni"}, "avx512vbmi": {"vbmi"}}


def read_features(path):
    """The features of each target, by its name."""
    lists = {}
    with open(path, encoding="utf-8") as header:
        for name, base, own in re.findall(r'#define KV1_FEATURES_(\w+) (?:KV1_FEATURES_(\w+) )?"([^"]+)"', header.read()):
            lists[name] = (lists[base] if base else []) + own.strip(",").split(",")
    return {name.lower(): found for name, found in lists.items()}


def classes_in(features):
    """What the functions of a target may use and, between them, do."""
    brought = set().union(*(BROUGHT.get(f, set()) for f in features))
    return brought or {"sse41"}  # with VEX no instruction has its old encoding


FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\s+(?:(?:lock|rep|repz|repnz|bnd|notrack|data16|cs|\{\w+\})\s+)*(\S+)(.*)$")
# every VEX or EVEX instruction begins with v, but for the opmask moves and the BMI ones
NOT_VEX = {"verr", "verw"}
OPMASK = re.compile(r"^k(mov|and|andn|or|orn|ortest|not|xor|xnor|add|shift[lr]|test|unpck\w*)[bwdq]+$")
BMI = {"andn", "bextr", "blsi", "blsmsk", "blsr", "bzhi", "mulx", "pdep", "pext", "rorx", "sarx", "shlx", "shrx"}
# some of what SSSE3 and SSE4.1 brought, without VEX
SSE41 = {"pmaddubsw", "pshufb", "pabsd", "pmulld", "pminsd", "pmaxsd", "pminud", "pmaxud", "blendvps", "pblendvb",
         "roundps", "roundss", "ptest", "pmovzxbd", "pmovzxwd", "pmovsxbd", "pextrd", "pinsrd", "packusdw", "palignr"}


def target_of(name, namespaces):
    # the function's own name decides, not its arguments' types; an inlined lambda or a thunk keeps its scope
    found = namespaces.search(name)
    target = (found.group(1) or found.group(2)) if found else "baseline"
    return "avx512_vbmi" if target == "avx512_vnni" and "pair_dots" in name else target


def classes_of(mnemonic, operands):
    found = set()
    vector = (mnemonic.startswith("v") and mnemonic not in NOT_VEX) or OPMASK.match(mnemonic) or mnemonic in BMI
    if vector:
        found.add("vex")
    if "%zmm" in operands:
        found.add("zmm")
    # EVEX alone: opmasks, 512-bit registers, and registers 16 to 31
    if "%zmm" in operands or OPMASK.match(mnemonic) or re.search(r"%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])", operands):
        found.add("evex")
    if mnemonic.startswith(("vpdpbusd", "vpdpwssd")):
        found.add("vnni")
    if mnemonic in ("vpermb", "vpermi2b", "vpermt2b", "vpmultishiftqb"):
        found.add("vbmi")
    if mnemonic in SSE41:
        found.add("sse41")
    return found


def check(features, objdump, path):
    used_by = {name: classes_in(found) for name, found in features.items()}
    # longer names first
    names = "|".join(sorted(features, key=len, reverse=True))
    namespaces = re.compile(rf"\bkv1::v\w+::detail::({names})::|\bkv1_xsimd_({names})::")
    text = subprocess.run([objdump, "-dC", "--no-show-raw-insn", path], capture_output=True, text=True, check=True).stdout
    used = collections.defaultdict(lambda: collections.defaultdict(collections.Counter))
    target = function = None
    errors = []
    for line in text.splitlines():
        if header := FUNCTION.match(line):
            function = header.group(1)
            target = target_of(function, namespaces)
            used[target]  # seen, even if it uses nothing
            continue
        if target is None or not (instruction := INSTRUCTION.match(line)):
            continue
        mnemonic, operands = instruction.groups()
        for kind in classes_of(mnemonic, operands):
            if kind not in used_by.get(target, ()) and not used[target][kind][function]:
                errors.append(f"{kind} in a function of target {target}: {function[:200]}: {line.strip()}")
            used[target][kind][function] += 1
    for name, kinds in used_by.items():
        for kind in kinds - set(used[name]):
            errors.append(f"no {kind} in any function of target {name}")
    for name in ["baseline", *used_by]:
        counts = ", ".join(f"{kind}: {sum(c.values())} in {len(c)} functions" for kind, c in sorted(used[name].items()))
        print(f"{path}: {name}: {counts or 'nothing but the baseline'}")
    for error in errors[:20]:
        print(f"{path}: error: {error}")
    return not errors


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    listed = read_features(sys.argv[1])
    if not listed:
        sys.exit(f"{sys.argv[1]}: no list of features found")
    sys.exit(0 if all([check(listed, sys.argv[2], path) for path in sys.argv[3:]]) else 1)
