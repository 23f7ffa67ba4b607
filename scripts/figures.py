#!/usr/bin/env python3
"""Prints how the program's code is built: sizes of files and functions, comments, words, visibility.

Unit tests and blank lines are left out, so that the figures are those of the code that runs. Rust is read with
tree-sitter, which is installed into target/tools with the linters. `just figures` runs this; with `--check` it ends
with 1 where a figure is over its goal.
"""
import re
import statistics
import sys
from pathlib import Path

import tree_sitter_rust
from tree_sitter import Language, Parser

ROOT = Path(__file__).resolve().parent.parent
# Words of a dialect that a reader has to translate; the rule is in CONTRIBUTING.
DIALECT = re.compile(r"\b(tells?|told|says?|said|hears?|heard|whose|nobody|whoever|meanwhile)\b", re.I)
PARSER = Parser(Language(tree_sitter_rust.language()))


def is_test(node, text):
    """Whether the item follows the attribute `#[cfg(test)]`."""
    before = node.prev_named_sibling
    while before is not None and before.type in ("attribute_item", "line_comment"):
        if b"cfg(test)" in text[before.start_byte:before.end_byte]:
            return True
        before = before.prev_named_sibling
    return False


def walk(node, text, found):
    for child in node.named_children:
        if child.type in ("mod_item", "function_item", "impl_item") and is_test(child, text):
            found["tests"].append((child.start_point[0], child.end_point[0]))
            continue
        if child.type == "function_item":
            found["functions"].append(child)
        if child.type == "visibility_modifier":
            found["visibility"].append(text[child.start_byte:child.end_byte].decode())
        if child.type == "line_comment":
            found["comments"].append(child)
        walk(child, text, found)


def measure(path):
    text = path.read_bytes()
    found = {"tests": [], "functions": [], "visibility": [], "comments": []}
    walk(PARSER.parse(text).root_node, text, found)
    lines = text.decode().split("\n")
    skipped = {n for first, last in found["tests"] for n in range(first, last + 1)}
    # Lines that hold nothing but a comment; a doc comment and a reason are counted apart.
    comments = {n: line.strip() for n, line in enumerate(lines) if n not in skipped and line.strip().startswith("//")}
    code = [line for n, line in enumerate(lines) if n not in skipped and n not in comments and line.strip()]
    whys = sum(1 for line in comments.values() if not line.startswith(("///", "//!")))
    lengths = []
    for function in found["functions"]:
        span = range(function.start_point[0], function.end_point[0] + 1)
        count = sum(1 for n in span if lines[n].strip() and n not in comments)
        name = function.child_by_field_name("name")
        lengths.append((count, f"{path.relative_to(ROOT)}: {text[name.start_byte:name.end_byte].decode()}"))
    return {
        "code": code,
        "comments": list(comments.values()),
        "whys": whys,
        "functions": lengths,
        "pub": found["visibility"].count("pub"),
    }


def percentile(values, part):
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def main():
    folders = [ROOT / "src", *sorted((ROOT / "crates").glob("*/src"))]
    paths = [
        path
        for folder in folders
        for path in sorted(folder.rglob("*.rs"))
        if path.name not in ("tests.rs", "fake.rs") and "tests" not in path.parts
    ]
    files = [measure(path) for path in paths]
    sizes = [len(file["code"]) for file in files]
    functions = [function for file in files for function in file["functions"]]
    lengths = [length for length, _ in functions]
    code = [line for file in files for line in file["code"]]
    comments = [line for file in files for line in file["comments"]]
    dialect = [line for line in comments if DIALECT.search(line)]
    long = sorted((f for f in functions if f[0] > 60), reverse=True)
    whys = sum(file["whys"] for file in files)
    rows = [
        ("files", len(files), None),
        ("code lines", len(code), None),
        ("median file, lines", statistics.median(sizes), lambda n: n < 150),
        ("90th percentile of files", percentile(sizes, 0.9), None),
        ("median function, lines", statistics.median(lengths), None),
        ("90th percentile of functions", percentile(lengths, 0.9), None),
        ("functions over 60 lines", len(long), lambda n: n == 0),
        ("lines of // for 100 lines of code", round(100 * whys / len(code), 1), lambda n: n >= 4),
        ("characters a line", round(sum(len(line.strip()) for line in code) / len(code), 1), None),
        ("comment lines with dialect, %", round(100 * len(dialect) / len(comments), 2), lambda n: n < 1),
        ("items and fields that are `pub`", sum(file["pub"] for file in files), lambda n: n < 400),
    ]
    wrong = 0
    for name, figure, goal in rows:
        verdict = "" if goal is None else "ok" if goal(figure) else "over its goal"
        wrong += verdict == "over its goal"
        print(f"{name:<36} {figure:>10}  {verdict}")
    for length, name in long:
        print(f"  {length} lines: {name}")
    if "--dialect" in sys.argv:
        print("\n".join(dialect))
    return 1 if wrong and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
