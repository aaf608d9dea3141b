"""The site: everything is reachable, every link leads somewhere, nothing is fetched, pages fit a phone."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from conftest import ROOT

SAMPLE = """nbs/index nbs/10_precond nbs/21_get nbs/22_solvers nbs/24_jacobian nbs/differences nbs/lab/12_train results/README
    results/cpu-full/pages/table_1_unconditional docs/api/get_nb.fixed_point docs/api/get_nb""".split()


def load(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_notebook_page_and_public_module_is_in_the_table_of_contents():
    trees = load("conf").trees()
    listed = [d for names in trees.values() for d in names]
    assert len(listed) == len(set(listed))
    notebooks = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("results/*/pages/*.ipynb")]
    wanted = {str(p.relative_to(ROOT).with_suffix("")) for p in notebooks if ".ipynb_checkpoints" not in p.parts}
    assert wanted - {"nbs/index"} == {
        d for d in listed if not d.startswith(("docs/", "CONTRIBUTING", "results/README"))
    }
    modules = json.dumps(sorted(d.removeprefix("docs/api/") for d in listed if d.startswith("docs/api/")))
    for path in ROOT.glob("get_nb/**/*.py"):
        if not path.name.startswith("_"):
            assert f'"{".".join(path.relative_to(ROOT).with_suffix("").parts)}"' in modules


def test_rooms_stand_in_reading_order():
    spine = [d for d in load("conf").trees()["Spine"] if re.match(r"nbs/\d", d)]
    assert spine == sorted(spine) and len(spine) > 20


@pytest.mark.parametrize(
    "tex", [r"\big(x\big)", r"\Bigl[x\Bigr]", r"x_1,\dots,x_n", r"\tfrac87", r"\frac1{2}", r"\lVert x\rVert^2"]
)
def test_a_formula_becomes_mathml(tex):
    pytest.importorskip("docutils.utils.math.latex2mathml")
    assert load("formulas").mathml(tex, False).startswith("<math")


def test_names_in_code_are_linked_and_arguments_and_attributes_are_not():
    span = '<span class="{}">{}</span>'.format
    code = (
        span("n", "solve")
        + "("
        + span("n", "tol")
        + span("o", "=")
        + span("n", "x")
        + span("o", ".")
        + span("n", "tol")
        + ")"
    )
    table = {"get_nb.solvers.solve": ("docs/api/get_nb.solvers", "a"), "get_nb.x.tol": ("docs/api/get_nb.x", "b")}
    names = {"solve": "get_nb.solvers.solve", "tol": "get_nb.x.tol"}
    page = load("names").linked(code, names, table, "nbs/lab/x")
    assert page.count("<a ") == 1 and 'href="../../docs/api/get_nb.solvers.html#a"' in page


class Page(HTMLParser):
    "Links, anchors and fetched addresses of a page, and what stands in it as text."

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.fetched, self.text, self.code = [], set(), [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.code += tag in ("pre", "code", "script", "style", "annotation")
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("img", "script", "iframe", "source") and attrs.get("src"):
            self.fetched.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preload"):
            self.fetched.append(attrs["href"])

    def handle_endtag(self, tag):
        self.code -= tag in ("pre", "code", "script", "style", "annotation")

    def handle_data(self, data):
        if not self.code:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("myst_nb", reason="the site needs the extra `docs`: make docs installs it")
    out = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-b", "html", ".", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {p.resolve(): Page(p) for p in site.rglob("*.html") if "_static" not in p.parts}


@pytest.mark.slow
def test_every_link_and_picture_leads_somewhere_and_nothing_is_fetched_from_elsewhere(site, pages):
    assert len(pages) > 200
    bad = []
    for path, page in pages.items():
        for address in [*page.links, *page.fetched]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                bad += [(path, address)] if address in page.fetched and parts.scheme != "data" else []
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else None
            if not target.is_file() or (
                parts.fragment and anchors is not None and unquote(parts.fragment) not in anchors
            ):
                bad.append((path, address))
    assert not bad
    styles = [
        p
        for p in site.rglob("*.css")
        if re.search(r"(@import|url\()\s*[\"']?(https?:)?//", p.read_text(encoding="utf-8"))
    ]
    assert not styles


@pytest.mark.slow
def test_every_equation_and_table_is_drawn(pages):
    assert sum("<math" in p.read_text(encoding="utf-8") for p in pages) > 20
    for path, page in pages.items():
        text = "".join(page.text)
        assert not re.search(r"\$[^$\n]*\\[a-z]+[^$\n]*\$|\\(mathrm|lVert|sigma)\b|\|---\|", text), path


@pytest.mark.slow
@pytest.mark.parametrize("page", SAMPLE)
def test_a_page_fits_its_window_in_a_browser(site, page, tmp_path):
    browser = pytest.importorskip("browser")
    if not browser.CHROMIUM:
        pytest.skip("no chromium on this machine: pages were not looked at")
    with browser.Browser() as b:
        for width, colour in browser.VIEWS:
            b.show(site / f"{page}.html", width, colour)
            assert b.evaluate("document.documentElement.scrollWidth") <= width, (page, width)
            assert not b.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).length")
            wide = "e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.table-wrapper, pre, .cell_output, .math, dt')"
            cut = b.evaluate(
                f"[...document.querySelectorAll('article *')].filter({wide}).slice(0, 3).map(e => e.outerHTML.slice(0, 200))"
            )
            assert not cut, (page, width)
            b.shot(tmp_path / f"{width}-{colour}.png")
            light = b.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
            assert light == (colour == "light")
