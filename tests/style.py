"""How the code reads, as one table: python tests/style.py

Exported code of spine and lab (docstrings, comments and blank lines left out), lesson cells, and the experiments' pages.
"""

import ast
import statistics
import sys

from lint import FUNCTIONS, LAB, PAPER, ROOT, SPINE, cells, counted, exported, is_exported, source


def lessons(path):
    return [s for s in map(source, cells(path)) if not is_exported(s) and not s.startswith("#| default_exp")]


def code_lines(texts):
    return [line.rstrip() for t in texts for i, line in enumerate(t.split("\n"), 1) if i in counted(t)]


def joined(texts):
    "Statements that share a line with another by a semicolon."
    found = 0
    for t in texts:
        rows = [(n.lineno, n.end_lineno) for n in ast.walk(ast.parse(t)) if isinstance(n, ast.stmt)]
        first = [a for a, b in rows if a == b]
        found += len(first) - len(set(first))
    return found


def row(name, texts):
    lines = code_lines(texts)
    length, wide = statistics.fmean(map(len, lines)), 100 * sum(len(x) > 120 for x in lines) / len(lines)
    return f"{name:24}{len(lines):8,}{length:10.1f}{wide:10.1f}{100 * joined(texts) / len(lines):10.1f}"


def pictures(path):
    return sum("image/png" in o.get("data", {}) for c in cells(path) for o in c["outputs"])


def calls_to_the_iteration():
    "Functions that a reader enters between GET.forward and the line that applies the blocks to the state."
    tree = ast.parse("\n".join(exported(ROOT / "nbs/21_get.ipynb")))
    functions = {n.name: n for n in tree.body if isinstance(n, FUNCTIONS)}
    get = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "GET")
    here, hops = next(n for n in get.body if isinstance(n, FUNCTIONS) and n.name == "forward"), 0
    while "block(z" not in ast.unparse(here):
        called = [n.func.id for n in ast.walk(here) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        here, hops = functions[next(c for c in called if c in functions)], hops + 1
    return hops


def main():
    print(f"{'':24}{'lines':>8}{'length':>10}{'% > 120':>10}{'; / 100':>10}")
    print(row("spine, exported", [t for p in SPINE for t in exported(p)]))
    print(row("lab, exported", [t for p in LAB for t in exported(p)]))
    print(row("lesson cells", [t for p in [*SPINE, *LAB] for t in lessons(p)]))
    print(row("experiments", [source(c) for p in PAPER for c in cells(p)]))
    n = [pictures(p) for p in SPINE]
    print(f"\npictures per spine room: {statistics.fmean(n):.1f}, at least {min(n)}")
    print(f"words of README.md: {len((ROOT / 'README.md').read_text(encoding='utf-8').split())}")
    print(f"calls between GET.forward and the iteration: {calls_to_the_iteration()}")


if __name__ == "__main__":
    sys.exit(main())
