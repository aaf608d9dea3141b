"""The repository keeps its own rules: package in step with its notebooks, notebooks clean, one source for each fact."""

import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from conftest import ROOT

ROOMS = sorted((ROOT / "nbs").glob("*.ipynb"))
PAPER = sorted((ROOT / "nbs/paper").glob("*.ipynb"))
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def test_the_package_is_what_the_notebooks_export(tmp_path):
    for name in ("nbs", "get_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True)
    for path in sorted((tmp_path / "get_nb").glob("*.py")):
        assert path.read_text() == (ROOT / "get_nb" / path.name).read_text(), f"{path.name}: run nbdev_export"
    assert {p.name for p in (ROOT / "get_nb").glob("*.py")} == {p.name for p in (tmp_path / "get_nb").glob("*.py")}
    assert not (tmp_path / "pyproject.toml").exists()


def test_cleaning_keeps_tags_and_changes_nothing(tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", "nbs"], cwd=tmp_path, check=True)
    for path in [*ROOMS, *PAPER]:
        assert (tmp_path / path.relative_to(ROOT)).read_text() == path.read_text(), f"{path.name}: run nbdev_clean"


@pytest.mark.parametrize("path", [*ROOMS, *PAPER], ids=lambda p: p.stem)
def test_a_notebook_is_fit_to_be_read(path):
    code = cells(path)
    assert not any("if False" in source(c) for c in code)
    assert not any(o["output_type"] == "error" for c in code for o in c["outputs"])
    assert not any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for c in code for o in c["outputs"])
    assert path.stat().st_size < 300_000
    assert not re.search(r"(/root/|/home/|/work/|/tmp/)", "".join(json.dumps(c["outputs"]) for c in code)), (
        "an absolute path in the outputs"
    )
    first = source(json.loads(path.read_text())["cells"][0])
    assert first.startswith("# ") and "\n\n> " in first


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_a_paper_notebook_has_one_parameters_cell_and_no_outputs(path):
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells(path)) == 1
    assert not any(c["outputs"] for c in cells(path))


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_a_room_exports_short_cells_that_import_lower_rooms_only(path):
    exported = [source(c) for c in cells(path) if re.match(r"#\|\s*export", source(c))]
    assert all(len(s.splitlines()) <= 40 for s in exported)
    assert sum(len(s.splitlines()) for s in exported) <= 350
    numbers = {re.search(r"default_exp (\S+)", "".join(source(c) for c in cells(p)))[1]: int(p.stem[:2]) for p in ROOMS}
    for node in ast.walk(ast.parse("\n".join(exported))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("get_nb"):
            assert all(a.name != "*" for a in node.names)
            used = [node.module.split(".")[1]] if "." in node.module else [a.name for a in node.names]

            assert all(numbers[u] < int(path.stem[:2]) for u in used if u in numbers), used


@pytest.mark.parametrize("path", sorted((ROOT / "get_nb").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_public_function_and_class_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    missing = [
        n.name
        for n in tree.body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") and not ast.get_docstring(n)
    ]
    assert not missing, missing


def test_environment_yml_and_setup_say_what_settings_ini_says():
    cfg = SETTINGS["DEFAULT"]
    wanted = [*cfg["requirements"].split(), *cfg["dev_requirements"].split()]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1]["pip"] == wanted
    assert environment["dependencies"][0] == "python >=3.11,<3.14" and cfg["min_python"] == "3.11"
    assert "tags" in cfg["allowed_cell_metadata_keys"].split()


def test_every_requirement_is_pinned():
    pinned = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in (SETTINGS["DEFAULT"]["requirements"] + " " + SETTINGS["DEFAULT"]["dev_requirements"]).split():
        assert re.split(r"[<>=]", requirement)[0].lower().replace("_", "-") in pinned, requirement


def test_the_readme_shows_what_is_published(tmp_path):
    from get_nb.lab.report import readme_text

    text = (ROOT / "README.md").read_text()
    assert readme_text(ROOT, text) == text, "run make readme"


def test_a_stage_depends_on_every_module_that_its_notebook_runs():
    from get_nb.lab.stages import code_hashes

    used = code_hashes(ROOT / "nbs/paper/evaluate.ipynb").keys()
    assert {
        "notebook",
        "core",
        "models",
        "layers",
        "solvers",
        "deq",
        "sampler",
        "unet",
        "precond",
        "metrics",
        "files",
    } <= used
    assert not {"stages", "pipeline", "cli"} & used


def test_a_figure_can_be_drawn_by_hand_from_the_published_records(tmp_path):
    nb = nbformat.read(ROOT / "nbs/paper/figure_quality_time.ipynb", 4)
    cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = cell.source.replace("runs/by-hand/figure_quality_time", str(tmp_path))
    NotebookClient(nb, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs/paper")}}).execute()
    assert (tmp_path / "figure_quality_time.png").read_bytes() == (
        ROOT / "results/cpu/figures/figure_quality_time.png"
    ).read_bytes()


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
