"""The house rules for notebooks, as functions that return what is wrong: python tests/lint.py [NOTEBOOK ...]

Spine (nbs/NN_*.ipynb): functions of at most 25 lines, at most 150 exported lines. Lab (nbs/lab): 30 and 250.
Docstrings, comments and blank lines are not counted. No line of code over 120 characters.
Every public function, class and method says in its docstring what each argument is, what is returned and what is raised.
A spine room ends with an exercise and its folded, tested solution. No room says that it needs a lab room it does without.
"""

import ast
import functools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPINE = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
LAB = sorted((ROOT / "nbs/lab").glob("*.ipynb"))
PAPER = sorted((ROOT / "nbs/paper").glob("*.ipynb"))
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SIDE_EFFECTS = ast.BoolOp | ast.IfExp | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def is_exported(text):
    return re.match(r"#\|\s*export", text) is not None


def exported(path):
    "The exported code of a notebook, cell by cell."
    return [s for s in map(source, cells(path)) if is_exported(s)]


def module_of(path):
    "Name of the module that a notebook exports, such as 'solvers' or 'lab.core'; '' if it exports none."
    return next((m[1] for c in cells(path) if (m := re.search(r"#\|\s*default_exp (\S+)", source(c)))), "")


def counted(text):
    "Numbers of the lines that count: no docstring, comment or blank line."
    tree, skip = ast.parse(text), set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Module | ast.ClassDef | FUNCTIONS) and ast.get_docstring(n) is not None:
            skip |= set(range(n.body[0].lineno, n.body[0].end_lineno + 1))
    lines = enumerate(text.split("\n"), 1)
    return {i for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in skip}


def sizes(path):
    "Functions and rooms that are too long."
    lab = path.parent.name == "lab"
    most, room = (30, 250) if lab else (25, 150)
    total = 0
    for text in exported(path):
        lines = counted(text)
        total += len(lines)
        for n in ast.walk(ast.parse(text)):
            if isinstance(n, FUNCTIONS):
                own = sum(n.lineno <= i <= n.end_lineno for i in lines)
                if own > most:
                    yield f"{path.name}: {n.name} has {own} lines, {most} at most"
    if total > room:
        yield f"{path.name}: exports {total} lines, {room} at most"


def long_lines(path):
    "Lines of code that are cut off on the page."
    for number, c in enumerate(cells(path)):
        for line in source(c).split("\n"):
            if len(line) > 120:
                yield f"{path.name}: code cell {number}: a line of {len(line)} characters: {line.strip()[:60]}"


def side_effects(path):
    "Expressions that are evaluated for what they do."
    for number, c in enumerate(cells(path)):
        body = ast.parse(source(c)).body
        last = body[-1] if body else None
        for n in (n for s in body for n in ast.walk(s)):
            shown = n is last and not is_exported(source(c))  # a notebook shows the value of its last line
            if isinstance(n, ast.Expr) and isinstance(n.value, SIDE_EFFECTS) and not shown:
                yield f"{path.name}: code cell {number}: {ast.unparse(n)[:70]}: a statement says it better"


def sections(doc):
    "A docstring's sections: heading -> text."
    parts = re.split(r"(?m)^\s*(Args|Attributes|Returns|Yields|Raises):\s*$", doc)
    return dict(zip(parts[1::2], parts[2::2]))


def named(section):
    "Names that a section explains; several may share a line."
    found = re.findall(r"(?m)^\s*((?:\*{0,2}\w+(?:, )?)+)(?: \([^)]*\))?:\s*\S", section)
    return {name.strip("* ") for names in found for name in names.split(",")}


def says_nothing(section):
    return re.findall(r"(?m)^\s*([\w, *]+):\s*$", section)


def only_a_type(section):
    "Names that a section explains by nothing but the name of a type."
    return re.findall(r"(?m)^\s*([\w*, ]+?)(?: \([^)]*\))?:\s*[A-Z]\w+\.?\s*$", section)


def raises(node):
    "Does a function raise on purpose?"
    return any(isinstance(n, ast.Raise) and n.exc is not None for n in ast.walk(node))


def returns(node):
    inner = {
        id(x) for n in ast.walk(node) if isinstance(n, FUNCTIONS | ast.Lambda) and n is not node for x in ast.walk(n)
    }
    return any(isinstance(n, ast.Return) and n.value is not None and id(n) not in inner for n in ast.walk(node))


def undocumented(name, node, doc):
    "What the docstring of a function leaves out; `doc` may be its class's, for __init__."
    if not doc:
        yield f"{name}: no docstring"
        return
    part = sections(doc)
    a = node.args
    args = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    wanted = [x.arg for x in args if x.arg not in ("self", "cls") and not x.arg.startswith("_")]
    missing = [w for w in wanted if w not in named(part.get("Args", "") + part.get("Attributes", ""))]
    if missing:
        yield f"{name}: its docstring does not say what {', '.join(missing)} are"
    property_like = any("property" in ast.unparse(d) for d in node.decorator_list)
    if wanted and returns(node) and not {"Returns", "Yields"} & part.keys() and not property_like:
        yield f"{name}: its docstring does not say what is returned"
    if raises(node) and "Raises" not in part and node.name != "__init__":
        yield f"{name}: its docstring does not say what is raised"
    for k in part:
        for empty in says_nothing(part[k]):
            yield f"{name}: {k}: {empty.strip()} is not explained"
    yield from types_alone(name, part)


def types_alone(name, part):
    "Arguments of whose purpose a docstring's sections say nothing."
    for k in ("Args", "Attributes"):
        for alone in only_a_type(part.get(k, "")):
            yield f"{name}: {k}: {alone.strip()} is explained by a type alone; say what it is for"


def is_command(node):
    "Is it a command of the command line? Its options explain themselves under --help."
    return any(re.search(r"\.(command|group)\b", ast.unparse(d)) for d in node.decorator_list)


def docstrings(path):
    "Public names whose `help()` is not enough to use them."
    for text in exported(path):
        for n in ast.parse(text).body:
            if isinstance(n, FUNCTIONS) and not n.name.startswith("_") and not is_command(n):
                yield from (f"{path.name}: {m}" for m in undocumented(n.name, n, ast.get_docstring(n)))
            if isinstance(n, ast.ClassDef) and not n.name.startswith("_"):
                yield from (f"{path.name}: {m}" for m in class_docstrings(n))


def class_docstrings(node):
    doc = ast.get_docstring(node) or ""
    if not doc:
        yield f"{node.name}: no docstring"
    fields = [f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
    part = sections(doc)
    yield from types_alone(node.name, part)
    known = named(part.get("Attributes", "") + part.get("Args", ""))
    missing = [f for f in fields if f not in known and not f.startswith("_")]
    if missing:
        yield f"{node.name}: its docstring does not say what {', '.join(missing)} are"
    for n in node.body:
        if not isinstance(n, FUNCTIONS) or (n.name.startswith("_") and n.name != "__init__"):
            continue
        yield from undocumented(f"{node.name}.{n.name}", n, doc if n.name == "__init__" else ast.get_docstring(n))


def modules_in(text):
    "Names below get_nb that some code imports, at the top or inside a function; functions among them."
    for n in ast.walk(ast.parse(text)):
        if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "get_nb":
            base = n.module.removeprefix("get_nb").lstrip(".")
            yield from [base, *(f"{base}.{a.name}".lstrip(".") for a in n.names)]  # `from get_nb.lab import stages`
        if isinstance(n, ast.Import):
            yield from (a.name.removeprefix("get_nb.") for a in n.names if a.name.startswith("get_nb."))


def house(paths):
    "The import graph of the exported cells: module -> set of modules."
    modules = {module_of(p): p for p in paths}
    graph = {m: set() for m in modules if m}
    for m in graph:
        graph[m] = {x for text in exported(modules[m]) for x in modules_in(text) if x in graph}
    return graph


def place(path):
    "Where a room stands: (part of the house, number); spine, ground (lab rooms below 20) and lab."
    number = re.match(r"\d\d[a-z]?", path.stem)[0]
    return ("ground" if number < "20" else "lab", number) if path.parent.name == "lab" else ("spine", number)


def wrong_edges(paths):
    "Imports that run back: a spine room imports lower spine rooms and the ground, the ground itself, the lab all."
    where = {module_of(p): place(p) for p in paths}
    for m, used in house(paths).items():
        for u in used:
            (part, number), (upart, unumber) = where[m], where[u]
            lower = unumber < number
            good = dict(
                ground=upart == "ground" and lower,
                spine=upart == "ground" or (upart == "spine" and lower),
                lab=upart in ("spine", "ground") or lower,
            )[part]
            if not good:
                yield f"{m} imports {u}"


def imports_by_string(path):
    "Imports that no reader and no tool can follow."
    for text in exported(path):
        for n in ast.walk(ast.parse(text)):
            if isinstance(n, ast.Call) and ast.unparse(n.func).split(".")[-1] in ("import_module", "__import__"):
                yield f"{path.name}: {ast.unparse(n)}"


def is_stored(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def public_names(path):
    "Names that a notebook exports to others."
    for text in exported(path):
        for n in ast.parse(text).body:
            if isinstance(n, ast.ClassDef | FUNCTIONS):
                yield n.name
            if isinstance(n, ast.Assign | ast.AnnAssign):
                targets = n.targets if isinstance(n, ast.Assign) else [n.target]
                yield from (x.id for t in targets for x in ast.walk(t) if is_stored(x))


def locale_calls(code):
    "Lines of code that read or write text in whatever encoding the user's locale has."
    for n in ast.walk(ast.parse(code)):
        name = getattr(n.func, "attr", getattr(n.func, "id", "")) if isinstance(n, ast.Call) else ""
        if name not in ("open", "read_text", "write_text") or any(k.arg in ("encoding", None) for k in n.keywords):
            continue
        if name == "open":
            mode = [*n.args[1:2], *(k.value for k in n.keywords if k.arg == "mode")]
            binary = mode and isinstance(mode[0], ast.Constant) and "b" in str(mode[0].value)
            if isinstance(n.func, ast.Name) and not binary:
                yield n.lineno
        elif len(n.args) < (1 if name == "read_text" else 2):
            yield n.lineno


def encodings(path):
    "Text that is read or written in the locale's encoding."
    for number, c in enumerate(cells(path)):
        for line in locale_calls(source(c)):
            yield f'{path.name}: code cell {number}, line {line}: say encoding="utf-8"'


def exercise(path):
    "A spine room ends with one exercise: a heading, what to do, and a solution that is folded, not exported, and asserts."
    if not re.match(r"\d", path.name) or path.parent.name != "nbs":
        return
    every = json.loads(path.read_text(encoding="utf-8"))["cells"]
    asked = [i for i, c in enumerate(every) if re.match("## Exercise", source(c))]
    if asked != [len(every) - 2] or every[-2]["cell_type"] != "markdown" or every[-1]["cell_type"] != "code":
        yield f"{path.name}: the last two cells are to be the one `## Exercise` and its solution"
        return
    meta, text = every[-1]["metadata"], source(every[-1])
    folded = dict(outputs_hidden=True, source_hidden=True)
    if meta.get("jupyter") != folded or "hide-cell" not in meta.get("tags", []):
        yield f"{path.name}: the solution is not folded: its metadata lack the tag hide-cell, or jupyter: {folded}"
    if is_exported(text) or not any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(text))):
        yield f"{path.name}: the solution is to assert that it is right, and not to be exported"


@functools.cache
def whole_house():
    return house([*SPINE, *LAB])


def named_rooms(path):
    "Lab rooms that the introduction says are needed."
    intro = " ".join(source(c) for c in cells(path, "markdown")[:2])
    for said in re.findall(r"\bneeds (?:[^.;]*? and )?lab rooms? ([\w, ]+)", intro):
        yield from (m for name in re.split(r", (?:and )?| and ", said) if (m := f"lab.{name}") in whole_house())


def needless(path):
    "Lab rooms that are said to be needed and are not imported, by the page or by what it imports."
    todo, reached = {m for c in cells(path) for m in modules_in(source(c))}, set()
    while todo:
        m = todo.pop()
        reached.add(m)
        todo |= whole_house().get(m, set()) - reached
    yield from (
        f"{path.name}: needs lab room {m[4:]}, it says, and never imports it"
        for m in named_rooms(path)
        if m not in reached
    )


RULES = (sizes, long_lines, side_effects, docstrings, encodings, exercise, needless)


def problems(path):
    return [m for rule in RULES for m in rule(path)]


if __name__ == "__main__":
    found = [
        m for p in (map(Path, sys.argv[1:]) if sys.argv[1:] else [*SPINE, *LAB, *PAPER]) for m in problems(p.resolve())
    ]
    print("\n".join(found) or "nothing to say")
    sys.exit(bool(found))
