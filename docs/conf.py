"""Configuration of the site: `make docs`. Its pages are the notebooks with their saved outputs; nothing is executed.

The folder of the sources is the clone itself, so that links between notebooks mean here what they mean in JupyterLab.
"""

import json
import re
import sys
import warnings
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]

project, author, copyright = SETTINGS["title"], SETTINGS["author"], SETTINGS["copyright"]
version = release = SETTINGS["version"]
warnings.filterwarnings("ignore", message="Cell is missing an id field")  # pages that papermill executed
REPOSITORY = f"https://github.com/{SETTINGS['user']}/{SETTINGS['repo']}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "formulas", "names"]
root_doc = "nbs/index"
include_patterns = ["nbs/**.ipynb", "results/README.md", "results/*/pages/*.ipynb", "CONTRIBUTING.md"]
include_patterns += ["docs/sections/*.md", "docs/api/*.rst"]  # written by write_pages
exclude_patterns = ["**/.ipynb_checkpoints"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
myst_heading_slug_func = "names.slug"
html_math_renderer = "mathml"
napoleon_use_ivar = True
python_maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
python_display_short_literal_types = True

html_theme = "furo"
html_title = "get_nb"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style, pygments_dark_style = "default", "github-dark"


def documents(pattern):
    return sorted(str(p.relative_to(ROOT).with_suffix("")) for p in ROOT.glob(pattern))


def modules():
    "Every public module of the package, by its dotted name."
    paths = sorted(p.relative_to(ROOT) for p in ROOT.glob("get_nb/**/*.py") if not p.name.startswith("_"))
    return [".".join(p.with_suffix("").parts) for p in paths]


def trees():
    "The table of contents: title -> documents. What stands here is what a reader can reach."
    spine = [d for d in documents("nbs/*.ipynb") if re.match(r"nbs/\d", d)]
    start = [d for d in documents("nbs/*.ipynb") if d not in spine and d != root_doc]
    profiles = [f.parent.name for f in sorted(ROOT.glob("results/*/pages"))]
    pages = {f"Experiments: {p}": documents(f"results/{p}/pages/*.ipynb") for p in profiles}
    return {
        "Spine": [*(d for d in start if d.endswith("start")), *spine],
        "Around it": [d for d in start if not d.endswith("start")],
        "Report": ["results/README"],
        **pages,
        "Experiments: their notebooks": documents("nbs/paper/*.ipynb"),
        "Lab": documents("nbs/lab/*.ipynb"),
        "API": ["docs/api/get_nb", *(f"docs/api/{m}" for m in modules())],
        "Project": documents("CONTRIBUTING.md"),
    }


DIRECT = (
    "Spine",
    "Around it",
    "Report",
)  # their pages stand in the side bar itself; the other sections have a page that lists theirs


def section(title):
    return "docs/sections/" + re.sub(r"\W+", "-", title.lower())


def write(path, text):
    "Written only if it changed, so that a second build reads only what changed."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_pages(app):
    "The pages that list others, and one page of the API per module."
    for title, names in trees().items():
        if title in DIRECT:
            continue
        tree = "\n".join(f"/{n}" for n in names)
        write(ROOT / f"{section(title)}.md", f"# {title}\n\n```{{toctree}}\n:maxdepth: 1\n\n{tree}\n```\n")
    for name in modules():
        heading = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n   :show-inheritance:\n"
        write(ROOT / f"docs/api/{name}.rst", heading)
    import get_nb

    rows = []
    for name in sorted(get_nb.__all__, key=str.lower):
        value = getattr(get_nb, name)
        where = getattr(value, "__module__", None)
        if str(where).startswith("get_nb"):
            summary = " ".join(value.__doc__.split("\n\n")[0].split())
            rows.append(f"`get_nb.{name} <{where}.html#{where}.{value.__qualname__}>`__\n    {plain(summary)}\n")
    text = "Names of get_nb\n===============\n\n``import get_nb`` gives these; each is explained where it lives.\n\n"
    write(ROOT / "docs/api/get_nb.rst", text + "\n".join(rows))


def plain(line):
    "A line of a docstring, which is plain text with `code` in it, as reStructuredText."
    parts = re.split(r"(`+[^`]+`+)", line)
    return "".join(f"``{p.strip('`')}``" if p.startswith("`") else re.sub(r"([*|_`\\])", r"\\\1", p) for p in parts)


def plain_signature(app, what, name, obj, options, signature, returned):
    "Annotated[int, Gt(gt=0)] is an int: the range stands in the docstring, or in the error."
    return signature and re.sub(r"Annotated\[(\w+), [^\]]*\]", r"\1", signature), returned


def plain_docstring(app, what, name, obj, options, lines):
    lines[:] = [plain(line) for line in lines]


def link(match):
    "A link to a folder leads to the page that lists it; one to a file that is no page leads to the repository."
    target, here = match[1], link.here
    folders = {"lab": "Lab", "paper": "Experiments: their notebooks"}
    title = folders.get(target, f"Experiments: {target.removesuffix('/pages')}")
    if title in trees():
        return f"](/{section(title)}.md)"
    path = (ROOT / here).parent / target.split("#")[0]
    if target.startswith(("http", "#")) or not path.exists():
        return match[0]
    if path.suffix in (".ipynb", ".png", ".jpg", ".svg") or path.resolve() in (
        ROOT / "CONTRIBUTING.md",
        ROOT / "results/README.md",
    ):
        return match[0]
    return f"]({REPOSITORY}/blob/main/{path.resolve().relative_to(ROOT.resolve())})"


def prepare(app, name, content):
    "Links, and the table of contents under the front page."
    if name.startswith("docs/"):
        return
    path = app.env.doc2path(name, base=False)
    link.here = path
    relink = lambda text: re.sub(r"\]\(([^)\s]+)\)", link, text)  # noqa: E731
    if not str(path).endswith(".ipynb"):
        content[0] = relink(content[0])
        return
    nb = json.loads(content[0])
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = relink("".join(cell["source"]))
        else:
            cell["source"] = re.sub(r"(?m)^#\|.*\n?", "", "".join(cell["source"]))  # nbdev's directives
            if "hide-cell" in cell["metadata"].get("tags", []):
                cell["metadata"]["mystnb"] = dict(code_prompt_show="Show the solution", code_prompt_hide="Hide it")
    nb["cells"] = [c for c in nb["cells"] if c["source"] or c.get("outputs")]
    if name == root_doc:
        lists = {t: names for t, names in trees().items() if t in DIRECT}
        lists["Lists"] = [section(t) for t in trees() if t not in DIRECT]
        for title, names in lists.items():
            shown = "\n".join(f"/{n}" for n in names)
            tree = f"```{{toctree}}\n:hidden:\n:caption: {title}\n:maxdepth: 2\n\n{shown}\n```"
            nb["cells"].append(dict(cell_type="markdown", metadata={}, source=tree))
    content[0] = json.dumps(nb)


def front(app, error):
    "index.html at the top leads to the front page."
    text = f'<!doctype html><meta charset="utf-8"><title>get_nb</title><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
    (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")


def front_page_again(app, env, added, changed, removed):
    "The front page lists the others, so it is read again in every build: a new page may have come."
    return [root_doc]


def setup(app):
    app.connect("env-get-outdated", front_page_again)
    app.connect("builder-inited", write_pages)
    app.connect("source-read", prepare)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)
    app.connect("build-finished", front)
