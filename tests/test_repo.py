"""The repository keeps its own rules: package in step with its notebooks, notebooks clean, one source for each fact."""

import base64
import inspect
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import distributions
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rooms import compare_picture

from conftest import ROOT
from lint import (
    LAB,
    PAPER,
    SPINE,
    cells,
    exercise,
    house,
    imports_by_string,
    module_of,
    needless,
    problems,
    public_names,
    source,
    wrong_edges,
)

ROOMS = [*SPINE, *LAB]
PAGES = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if p not in SPINE)  # start, index and the like
CONTRACT = set(
    """create_model fixed_point_iter anderson broyden solve equilibrium unroll unroll_constant create_teacher heun_sample
    euler_sample edm_sigmas load_data PairDataset generate_pairs save_pairs import_reference_pairs train TrainConfig distill
    DistillConfig evaluate EvalConfig compare load_features load_reference_get load_edm_pickle save_checkpoint
    load_checkpoint ConfigError FileError UnsafeFileError""".split()
)
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")


def test_the_package_is_what_the_notebooks_export(tmp_path):
    for name in ("nbs", "get_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True)
    here, there = (sorted(p.relative_to(r / "get_nb") for p in (r / "get_nb").rglob("*.py")) for r in (ROOT, tmp_path))
    assert here == there
    for path in here:
        same = (tmp_path / "get_nb" / path).read_text(encoding="utf-8") == (ROOT / "get_nb" / path).read_text(
            encoding="utf-8"
        )
        assert same, f"{path}: run nbdev_export"
    assert not (tmp_path / "pyproject.toml").exists()


def test_cleaning_keeps_tags_and_changes_nothing(tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", "nbs"], cwd=tmp_path, check=True)
    for path in [*PAGES, *ROOMS, *PAPER]:
        assert (tmp_path / path.relative_to(ROOT)).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), (
            f"{path.name}: run nbdev_clean"
        )


@pytest.mark.parametrize("path", [*PAGES, *ROOMS, *PAPER], ids=lambda p: p.stem)
def test_a_notebook_is_fit_to_be_read(path):
    code = cells(path)
    assert not any("if False" in source(c) for c in code)
    assert not any(o["output_type"] == "error" for c in code for o in c["outputs"])
    assert not any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for c in code for o in c["outputs"])
    assert path.stat().st_size < 300_000
    assert not re.search(r"(/root/|/home/|/work/|/tmp/)", "".join(json.dumps(c["outputs"]) for c in code)), (
        "an absolute path in the outputs"
    )
    first = source(json.loads(path.read_text(encoding="utf-8"))["cells"][0])
    assert first.startswith("# ") and "\n\n> " in first


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_a_paper_notebook_has_one_parameters_cell_and_no_outputs(path):
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells(path)) == 1
    assert not any(c["outputs"] for c in cells(path))


@pytest.mark.parametrize("path", [*PAGES, *ROOMS, *PAPER], ids=lambda p: p.stem)
def test_a_notebook_keeps_the_house_rules(path):
    assert not problems(path)


FAULTS = {
    "missing": lambda cells: cells[:-2],
    "not the last": lambda cells: [*cells, cells[0]],
    "two": lambda cells: [*cells[:-2], *cells[-2:] * 2],
    "no solution": lambda cells: cells[:-1],
    "open on the site": lambda cells: [*cells[:-1], cells[-1] | dict(metadata=cells[-1]["metadata"] | dict(tags=[]))],
    "open in JupyterLab": lambda cells: [*cells[:-1], cells[-1] | dict(metadata=dict(tags=["hide-cell"]))],
    "exported": lambda cells: [*cells[:-1], cells[-1] | dict(source="#| export\nassert True")],
    "proves nothing": lambda cells: [*cells[:-1], cells[-1] | dict(source="print(1)")],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spine_room_without_a_folded_exercise_is_noticed(fault, tmp_path):
    path = tmp_path / "nbs" / SPINE[0].name
    path.parent.mkdir()
    nb = json.loads(SPINE[0].read_text(encoding="utf-8"))
    path.write_text(json.dumps(nb), encoding="utf-8")
    assert not list(exercise(path))
    path.write_text(json.dumps(nb | dict(cells=FAULTS[fault](nb["cells"]))), encoding="utf-8")
    assert list(exercise(path))


def test_a_room_that_is_said_to_be_needed_and_is_not_imported_is_found(tmp_path):
    text = (ROOT / "nbs/lab/38_launch.ipynb").read_text(encoding="utf-8")
    path = tmp_path / "38_launch.ipynb"
    path.write_text(text.replace("lab rooms parameters,", "lab rooms pipeline, parameters,"), encoding="utf-8")
    assert list(needless(path)) == ["38_launch.ipynb: needs lab room pipeline, it says, and never imports it"]


def test_imports_of_exported_cells_run_one_way():
    assert not list(wrong_edges(ROOMS))


def test_the_import_graph_has_no_circle():
    graph = house(ROOMS)
    assert len(graph) == len([p for p in ROOMS if module_of(p)]) and graph["distillation"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_nothing_is_imported_by_a_string(path):
    assert not list(imports_by_string(path))


def test_an_edge_that_runs_back_a_circle_and_an_import_by_string_are_noticed(tmp_path):
    (tmp_path / "lab").mkdir()
    rooms = {
        "10_a.ipynb": ("a", "from get_nb.b import x"),  # spine imports a higher room
        "20_b.ipynb": ("b", "from get_nb.lab.c import y\nfrom get_nb.a import z"),  # spine imports the lab
        "lab/30_c.ipynb": ("lab.c", "import importlib\nimportlib.import_module('get_nb.a')"),
        "lab/05_d.ipynb": ("lab.d", "def f():\n    from get_nb.a import x"),  # the ground imports the spine
    }
    for name, (module, code) in rooms.items():
        nb = nbformat.v4.new_notebook()
        nb.cells = [nbformat.v4.new_code_cell(t) for t in (f"#| default_exp {module}", f"#| export\n{code}")]
        nbformat.write(nb, tmp_path / name)
    paths = [tmp_path / name for name in rooms]
    assert set(wrong_edges(paths)) == {"a imports b", "b imports lab.c", "lab.d imports a"}
    with pytest.raises(CycleError):
        list(TopologicalSorter(house(paths)).static_order())
    assert list(imports_by_string(paths[2])) and not list(imports_by_string(paths[0]))


def test_a_public_name_means_one_thing():
    where = {}
    for path in ROOMS:
        for name in set(public_names(path)):
            if not name.startswith("_"):
                where.setdefault(name, []).append(module_of(path))
    assert not {k: v for k, v in where.items() if len(v) > 1}


def test_get_nb_gives_the_contract_and_imports_nothing_slow():
    code = "import sys, get_nb; print(*sorted(get_nb.__all__)); assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert CONTRACT <= set(done.stdout.split())


def test_every_name_of_get_nb_is_there_and_explains_itself():
    import get_nb

    for name in get_nb.__all__:
        assert inspect.getdoc(getattr(get_nb, name)), name
    for module in (m.name for m in pkgutil.iter_modules(get_nb.__path__)):
        assert module not in get_nb.__all__, f"the module {module} would hide the name"


def test_environment_yml_says_what_settings_ini_says():
    cfg = SETTINGS["DEFAULT"]
    wanted = [*cfg["requirements"].split(), *cfg["dev_requirements"].split()]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"][-1]["pip"] == ["-c constraints.txt", *wanted]
    assert environment["dependencies"][0] == "python >=3.11,<3.14" and cfg["min_python"] == "3.11"
    assert cfg["allowed_cell_metadata_keys"].split() == ["tags", "jupyter"]


def test_the_metadata_of_pyproject_say_what_settings_ini_says():
    cfg, text = SETTINGS["DEFAULT"], (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = {k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")}
    same = dict(
        name=cfg["lib_name"],
        description=cfg["description"],
        keywords=cfg["keywords"].split(),
        dependencies=cfg["requirements"].split(),
        scripts=dict(s.split("=") for s in cfg["console_scripts"].split()),
        authors=[dict(name=cfg["author"], email=cfg["author_email"])],
    )
    assert {k: project[k] for k in same} == same and project["optional-dependencies"] == extras
    assert project["requires-python"] == f">={cfg['min_python']}" and project["dynamic"] == ["version"]
    assert project["urls"]["Source"] == f"https://github.com/{cfg['user']}/{cfg['repo']}"
    assert f'__version__ = "{cfg["version"]}"' in (ROOT / "get_nb/__init__.py").read_text(encoding="utf-8")


def test_the_type_checker_reads_every_public_name():
    import get_nb

    used = set(re.findall(r"get_nb\.(\w+)", (ROOT / "tests/surface.py").read_text(encoding="utf-8")))
    assert set(get_nb.__all__) <= used


@pytest.mark.slow
def test_the_public_surface_has_no_type_errors():
    pytest.importorskip("mypy", reason="the extra `types`: make types installs it")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir=/dev/null"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_every_requirement_is_pinned():
    pinned = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    for requirement in " ".join(v for k, v in SETTINGS["DEFAULT"].items() if k.endswith("requirements")).split():
        assert re.split(r"[<>=]", requirement)[0].lower().replace("_", "-") in pinned, requirement


def test_every_pinned_version_accepts_the_lowest_python_that_is_promised():
    lowest = SETTINGS["DEFAULT"]["min_python"] + ".0"
    pins = re.findall(r"(?m)^([\w.-]+)==([\w.+-]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    pinned = {(canonicalize_name(name), version) for name, version in pins}
    asked = {(canonicalize_name(d.name), d.version): d.metadata["Requires-Python"] or "" for d in distributions()}
    assert len(pinned & asked.keys()) > 100
    assert not {k: asked[k] for k in pinned & asked.keys() if not SpecifierSet(asked[k]).contains(lowest)}


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_a_report_shows_what_is_published(name):
    from get_nb.lab.readme import fill_blocks

    text = (ROOT / name).read_text(encoding="utf-8")
    assert fill_blocks(ROOT, text) == text, "run make readme"


def prose_of(path):
    "The markdown of a page."
    if path.suffix == ".ipynb":
        return "\n".join(source(c) for c in cells(path, "markdown"))
    return path.read_text(encoding="utf-8")


def test_links_lead_somewhere():
    linked = [ROOT / n for n in ("README.md", "results/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
    found = 0
    for page in [*linked, *ROOT.glob("nbs/**/*.ipynb")]:
        for path, anchor in re.findall(r"\]\((?!https?:|attachment:)([^)#\s]*)(#[^)\s]*)?\)", prose_of(page)):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.relative_to(ROOT)}: {path}"
            if anchor and target.suffix in (".ipynb", ".md"):
                assert anchor[1:] in anchors(target), f"{page.name}: {path}{anchor}: {sorted(anchors(target))}"
            found += 1
    assert found > 100


def anchors(path):
    "The headings of a page, as Jupyter (as they are) or code hosts (in small letters, without punctuation) name them."
    headings = [h.strip() for h in re.findall(r"(?m)^#+ (.+)$", prose_of(path))]
    if path.suffix == ".ipynb":
        return {h.replace(" ", "-") for h in headings}
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_shares_in_the_readme_are_those_of_the_models():
    import torch

    from get_nb.presets import build_model

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = [int(s) for s in re.search(r"keeps (\d+)% of its weights .*?GET-B (\d+)%", text).groups()]
    with torch.device("meta"):
        models = build_model("GET-digits/2", image_size=8, channels=1), build_model("GET-B/2")
    assert said == [round(100 * count(m.deq_blocks) / count(m)) for m in models]


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_what_the_readme_prints_runs():
    from get_nb.lab.cli import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"(?s)```python\n(.*?)```", text)
    exec(code.replace("num_steps=18", "num_steps=1"), {})  # one step in place of eighteen, which take a minute
    lines = re.findall(r"(?m)^get-nb (.*?)(?: *#.*)?$", text)
    assert len(lines) >= 6
    for line in lines:
        name, *words = shlex.split(line)
        if not name.startswith("-"):
            cli.commands[name].make_context(name, words)


def test_the_readme_is_short():
    shown = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(encoding="utf-8"))  # comments are not read
    assert len(shown.split()) <= 900


def test_a_stage_depends_on_every_module_that_its_notebook_runs():
    from get_nb.lab.stages import code_hashes

    used = code_hashes(ROOT / "nbs/paper/evaluate.ipynb").keys()
    spine = "layers get solvers gradients equilibrium_get sampler unet precond evaluation".split()
    assert {"notebook", "lab.core", "lab.files", "lab.metrics", *spine} <= used
    assert not {"lab.stages", "lab.pipeline", "lab.cli"} & used


def test_a_figure_can_be_drawn_by_hand_from_the_published_records(tmp_path):
    nb = nbformat.read(ROOT / "nbs/paper/figure_quality_time.ipynb", 4)
    cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = cell.source.replace("runs/by-hand/figure_quality_time", str(tmp_path))
    NotebookClient(nb, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs/paper")}}).execute()
    published = ROOT / "results/cpu/figures/figure_quality_time"
    drawn = tmp_path / "figure_quality_time"
    data, again = (json.loads(p.with_suffix(".json").read_text(encoding="utf-8")) for p in (published, drawn))
    assert data == again
    pictures = [base64.b64encode(p.with_suffix(".png").read_bytes()).decode() for p in (published, drawn)]
    assert compare_picture(*pictures) == ""


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_people_cite_and_what_a_machine_runs_agree_with_settings_ini():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    s = SETTINGS["DEFAULT"]
    assert (cited["title"], cited["version"]) == (s["lib_name"], s["version"]) and cited["abstract"] == s["description"]
    bibtex = (ROOT / "README.md").read_text(encoding="utf-8")
    paper = cited["preferred-citation"]
    assert paper["title"] in bibtex and str(paper["year"]) in bibtex and paper["url"] in bibtex
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in bibtex
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    assert {"run": ".ci/run"} in workflow["jobs"]["test"]["steps"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {s['version']}" in changes and "## Unreleased" in changes
    assert (ROOT / "get_nb/py.typed").is_file() and "py.typed" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


MOVING = [p for p in [*PAGES, *ROOMS] if any("explore(" in source(c) for c in cells(p))]


@pytest.mark.parametrize("path", MOVING, ids=lambda p: p.stem)
def test_sliders_stand_beside_a_picture_that_the_same_function_drew(path):
    "What a reader without a kernel sees: the picture, and one sentence in place of the sliders."
    pictured = set()
    for c in cells(path):
        shown = [o.get("data", {}) for o in c["outputs"]]
        if any("image/png" in data for data in shown):
            pictured |= set(re.findall(r"(?m)^(\w+)\(\);$", source(c)))
        for name in re.findall(r"(?m)^explore\((\w+), ", source(c)):
            assert name in pictured, f"{name} is shown by sliders only"
            said = "".join("".join(data["text/plain"]) for data in shown)
            assert said.startswith("Run this page in JupyterLab to choose ") and said.count(".") == 1


def test_a_hosted_notebook_installs_what_is_pinned_and_opens_the_start_page():
    s, readme = SETTINGS["DEFAULT"], (ROOT / "README.md").read_text(encoding="utf-8")
    address = f"https://mybinder.org/v2/gh/{s['user']}/{s['repo']}/{s['branch']}"
    assert re.findall(re.escape(address) + r"\?labpath=([\w%.]+)\)", readme) == ["nbs%2Fstart.ipynb"]
    lines = (ROOT / "binder/requirements.txt").read_text(encoding="utf-8").split("\n")
    asked = {line for line in lines if line and not line.startswith("#")}
    assert {"-c ../constraints.txt", "-e .", "torch", "--extra-index-url https://download.pytorch.org/whl/cpu"} <= asked
    known = s["requirements"] + " " + s["dev_requirements"]
    assert {line for line in asked if line[0] != "-"} <= {re.split(r"[<>=]", r)[0] for r in known.split()}
    python = (ROOT / "binder/runtime.txt").read_text(encoding="utf-8").strip().removeprefix("python-")
    assert SpecifierSet(">=3.11,<3.14").contains(python)
    assert "jupyter lab nbs/start.ipynb" in (ROOT / "Makefile").read_text(encoding="utf-8")
