#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes kv1 as one header: single_header.py <include folder> <output file>

Headers are expanded where they are first included, .inl files wherever they are: kernels are parsed once per
target, so their text is there once per target. xsimd and the standard library stay included.
"""
import pathlib
import re
import sys

OWN = re.compile(r"\s*#\s*include\s+<(kv1/[^>]+)>")

BEGIN = """\
// SPDX-License-Identifier: Apache-2.0
//
// kv1 {version} in one file, written by cmake/single_header.py from the headers under include/. It needs xsimd
// 13.2 or newer, and replaces <kv1/kv1.hpp>; do not include it beside kv1's own headers.
#ifndef KV1_SINGLE_HEADER
#define KV1_SINGLE_HEADER

#if defined(KV1_EXTERNAL_KERNELS)
#error "KV1_EXTERNAL_KERNELS needs kv1's own headers: <kv1/kernels.hpp> is not in this file"
#endif
"""


def expand(root, name, seen, out):
    if name.endswith(".hpp"):
        if name in seen:
            return
        seen.add(name)
    lines = (root / name).read_text(encoding="utf-8").splitlines()
    out.append(f"// ---- {name}")
    for line in lines:
        include = OWN.match(line)
        if include:
            expand(root, include.group(1), seen, out)
        elif line.strip() != "#pragma once" and not line.startswith("// SPDX-License-Identifier"):
            out.append(line)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    root, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    version = ".".join(
        re.findall(r"#define KV1_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", (root / "kv1/version.hpp").read_text())
    )
    out = [BEGIN.format(version=version)]
    expand(root, "kv1/kv1.hpp", set(), out)
    out.append("#endif")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(out) + "\n", encoding="utf-8")


main()
