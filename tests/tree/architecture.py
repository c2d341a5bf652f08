#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks ARCHITECTURE's table of headers against the includes.

usage: architecture.py ROOT

Every public header stands in the table once, a folder such as `quantizers/` for all that lie there. The last column names the public
headers that a header includes; what it reaches, through detail/ too, stands below it.
"""
import pathlib
import re
import sys

root = pathlib.Path(sys.argv[1])
include = root / "include" / "kv1"
errors = []


def place(header):
    """The name that the table has for a header."""
    folder = header.rpartition("/")[0]
    return folder + "/" if folder else header


def includes(header):
    return re.findall(r"^#include <kv1/([^>]+)>", (include / header).read_text(encoding="utf-8"), re.M)


def is_public(header):
    return not header.startswith("detail/")


def reached(header, seen):
    for other in includes(header):
        if other not in seen:
            seen.add(other)
            reached(other, seen)
    return seen


headers = [p.relative_to(include).as_posix() for p in sorted(include.rglob("*.h*"))]
public = [h for h in headers if is_public(h)]

table = {}  # name: (row, names of the last column)
for number, line in enumerate((root / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()):
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if line.startswith("| `") and len(cells) == 3 and re.match(r"`[\w/]+(\.hpp|\.h|/)`", cells[0]):
        needs = None if cells[2] == "all below" else set(re.findall(r"`([\w/.]+)`", cells[2]))
        for name in re.findall(r"`([\w/.]+)`", cells[0]):
            if name in table:
                errors.append(f"{name} stands in the table twice")
            table[name] = (number, needs)

names = {place(h) for h in public}
errors += [f"{name} is not in the table" for name in sorted(names - set(table))]
errors += [f"the table has {name}, which is no public header" for name in sorted(set(table) - names)]

direct = {}
for header in public:
    name = place(header)
    direct.setdefault(name, set()).update(place(h) for h in includes(header) if is_public(h) and place(h) != name)
    for other in sorted({place(h) for h in reached(header, set()) if is_public(h)} - {name}):
        if name in table and other in table and table[other][0] < table[name][0]:
            errors.append(f"{header} depends on {other}, which stands above it")
rows = {}
for name, (number, needs) in table.items():
    rows.setdefault(number, (needs, set(), set()))
    rows[number][1].update(direct.get(name, set()))
    rows[number][2].add(name)
for needs, found, own in rows.values():
    found -= own
    if needs is not None and needs != found:
        errors.append(f"{', '.join(sorted(own))}: the table has {sorted(needs)}, the includes are {sorted(found)}")


# Nor do headers of detail/ go round in circles. What follows a header's declarations is their definition.
def visit(header, path, done):
    if header in path:
        errors.append("a circle: " + " -> ".join(path[path.index(header):] + [header]))
    elif header not in done:
        text = (include / header).read_text(encoding="utf-8")
        before = re.split(r"^namespace ", text, maxsplit=1, flags=re.M)[0]
        for other in re.findall(r"^#include <kv1/([^>]+)>", before, re.M):
            visit(other, path + [header], done)
        done.add(header)


finished = set()
for header in headers:
    visit(header, [], finished)

if not table:
    errors.append("no table of headers found")
for error in errors:
    print("error:", error)
sys.exit(1 if errors else 0)
