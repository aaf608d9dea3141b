"""CONTRIBUTING.md, followed to the letter: each recipe's text is taken from the page and does what the page says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import get_nb
from conftest import ROOT
from get_nb.lab.data import load_data
from get_nb.lab import pipeline
from lint import docstrings, problems, sizes
from test_numbers import typed_in, unexplained
from test_paper import run_here

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
HEADING = "## (?!Exercise)"  # which stands in a room, not on the page


def blocks(title):
    "The fenced blocks under a heading."
    section = re.search(rf"(?ms)^## {title}\n(.*?)(?=^{HEADING}|\Z)", TEXT)[1]
    return re.findall(r"(?ms)^```\w+\n(.*?)\n```$", section)


def test_every_recipe_has_a_text_to_follow():
    titles = re.findall(f"(?m)^{HEADING}(.*)$", TEXT)
    assert titles == ["A room", "A solver", "A student", "A rival", "A data set", "A table"]
    assert all(map(blocks, titles))


def test_a_room(tmp_path):
    first, *code, asked, solution, folded = blocks("A room")
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_markdown_cell(first), *map(nbformat.v4.new_code_cell, code)]
    nb.cells += [nbformat.v4.new_markdown_cell(asked)]
    nb.cells += [nbformat.v4.new_code_cell(solution, metadata=json.loads(folded))]
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    nbformat.write(nb, tmp_path / "nbs/47_halving.ipynb")
    assert not problems(tmp_path / "nbs/47_halving.ipynb")
    assert not unexplained(typed_in(tmp_path / "nbs/47_halving.ipynb"), {})
    client = NotebookClient(nb, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert any("image/png" in o.get("data", {}) for c in nb.cells for o in c.get("outputs", []))
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True)
    names = {}
    exec((tmp_path / "get_nb/halving.py").read_text(encoding="utf-8"), names)
    exec(solution, names)


def test_a_solver(monkeypatch, tmp_path):
    from get_nb import solvers

    monkeypatch.setitem(solvers.SOLVERS, "lazy", None)  # taken out again after the test
    names = dict(SOLVERS=solvers.SOLVERS, fixed_point_iter=get_nb.fixed_point_iter)
    exec(blocks("A solver")[0], names)
    z, stats = get_nb.solve(torch.cos, torch.zeros(2, 3), solver="lazy", max_iter=60, tol=1e-4)
    assert stats.converged.all()
    torch.testing.assert_close(z.cos(), z, rtol=0, atol=1e-3)
    size = dict(image_size=8, channels=1)
    model = get_nb.create_model("GET-digits/2", solver="lazy", **size)
    with torch.no_grad():
        assert model(torch.randn(2, 1, 8, 8)).shape == (2, 1, 8, 8)
    with pytest.raises(get_nb.ConfigError, match="did you mean 'lazy'"):
        get_nb.create_model("GET-digits/2", solver="lasy", **size)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("#| export\n" + blocks("A solver")[0])])
    nbformat.write(nb, tmp_path / "47_lazy.ipynb")
    assert not [*docstrings(tmp_path / "47_lazy.ipynb"), *sizes(tmp_path / "47_lazy.ipynb")]


def test_a_student(monkeypatch):
    from get_nb import presets

    monkeypatch.setattr(presets, "MODELS", dict(presets.MODELS))
    exec(blocks("A student")[0], dict(MODELS=presets.MODELS, EquilibriumConfig=presets.EquilibriumConfig))
    assert get_nb.create_model("GET-tiny/2", image_size=8)(torch.randn(2, 3, 8, 8)).shape == (2, 3, 8, 8)


def test_a_data_set(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (12, 12), (20 * i, 0, 0)).save(tmp_path / f"{name}/{i}.png")
    names = dict(load_data=load_data)
    exec(blocks("A data set")[0].replace("PATH", str(tmp_path)), names)
    assert names["images"].images.shape[1:] == (3, 8, 8)


SMALL = """
defaults: {data: digits, threads: 1, device: cpu}
stages:
  classifier: {params: {steps: 20, floor_splits: 2}}
  teacher: {params: {steps: 12, batch_size: 32}}
  pairs: {inputs: {teacher: teacher}, params: {n: 192, num_steps: 2}}
  evaluate_teacher: {notebook: evaluate, inputs: {model: teacher, classifier: classifier}, params: {samples: 100, num_steps: 2}}
"""


@pytest.mark.slow
def test_a_rival_and_a_table(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "nbs/paper", tmp_path / "nbs/paper")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copy(tmp_path / "nbs/paper/kd.ipynb", tmp_path / "nbs/paper/mine.ipynb")
    lines = "\n".join(["about: to try it out", SMALL.strip(), *blocks("A rival"), *blocks("A table")])
    (tmp_path / "nbs/paper/profiles/small.yaml").write_text(lines + "\n", encoding="utf-8")
    monkeypatch.setenv("GET_NB_ROOT", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(pipeline, "execute", run_here)
    threads = torch.get_num_threads()
    folder = pipeline.run_profile(tmp_path, "small")
    torch.set_num_threads(threads)
    table = (folder / "table_mine/table_mine.md").read_text(encoding="utf-8")
    assert {"Mine", "Teacher"} <= set(re.findall(r"\w+", table)), table
