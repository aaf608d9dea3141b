"""In code cells, each public name of get_nb becomes a link to its page of the API."""

import ast
import html
import json
import posixpath
import re

BLOCK = re.compile(r'(<div class="highlight-i?python[^"]*[^>]*><div class="highlight"><pre>)(.*?)(</pre>)', re.S)
WORD = re.compile(
    r'(<span class="o">\.</span>)?<span class="(n|nf|nc|fm|nb|ne)">(\w+)</span>(?=(<span class="o">=</span>)?)'
)


def slug(title):
    "The anchor of a heading, as Jupyter and code hosts name it."
    return title.strip().replace(" ", "-")


def exported(nb):
    "The module that a notebook exports to, or None."
    for cell in nb["cells"]:
        found = re.match(r"#\| default_exp (\S+)", "".join(cell["source"]))
        if found:
            return f"get_nb.{found[1]}"


def imported(code, package):
    "What one cell's imports from get_nb make of its names: name -> dotted name."
    try:
        tree = ast.parse(re.sub(r"(?m)^[%!].*$", "", code))
    except SyntaxError:
        return {}
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "get_nb":
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".")[: -node.level]
            names |= {a.asname or a.name: ".".join([*base, node.module or "", a.name]) for a in node.names}
    return names


def known(env):
    "Dotted name -> page and anchor, of everything public; a name of the package itself stands for where it lives."
    table = {n: (o.docname, o.node_id) for n, o in env.get_domain("py").objects.items()}
    table |= {m: (e.docname, e.node_id) for m, e in env.get_domain("py").modules.items()}
    import get_nb

    for name in get_nb.__all__:
        value = getattr(get_nb, name)
        dotted = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
        if dotted in table:
            table[f"get_nb.{name}"] = table[dotted]
    return table


def names_of(path, table):
    "The names of a notebook that have a page: name -> dotted name."
    nb = json.loads(path.read_text(encoding="utf-8"))
    module = exported(nb)
    names = {n.rpartition(".")[2]: n for n in table if module and n.rpartition(".")[0] == module}
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            names |= imported("".join(cell["source"]), module or "get_nb.x")
    return {n: d for n, d in names.items() if d in table}


def linked(block, names, table, page):
    "One highlighted cell with its links."

    def one(match):
        dot, kind, word, keyword = match.groups()
        before = block[: match.start()]
        if dot:  # get_nb.NAME, and no other attribute
            dotted = f"get_nb.{word}" if before.endswith('<span class="n">get_nb</span>') else None
        else:
            argument = keyword and before.count("(") > before.count(")")
            dotted = None if argument else names.get(word)
        if dotted not in table:
            return match[0]
        doc, anchor = table[dotted]
        target = posixpath.relpath(f"{doc}.html", posixpath.dirname(page) or ".")
        return f'{dot or ""}<a class="name" href="{html.escape(target)}#{anchor}" title="{dotted}"><span class="{kind}">{word}</span></a>'

    return WORD.sub(one, block)


def link_names(app, page, template, context, doctree):
    source = app.env.doc2path(page) if page in app.env.all_docs else ""
    if "body" not in context or not str(source).endswith(".ipynb"):
        return
    if not hasattr(app, "known_names"):
        app.known_names = known(app.env)
    from pathlib import Path

    names = names_of(Path(source), app.known_names)
    context["body"] = BLOCK.sub(lambda m: m[1] + linked(m[2], names, app.known_names, page) + m[3], context["body"])


def setup(app):
    app.connect("html-page-context", link_names)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
