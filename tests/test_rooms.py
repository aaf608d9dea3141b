"""Each room runs from top to bottom in a fresh kernel, and shows what is saved in it."""

import os

import nbformat
import pytest
from lint import SPINE
from nbclient import NotebookClient
from rooms import PATIENT, ROOMS, compare_picture, compare_text, differences, run
from style import pictures


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_a_room_runs_and_shows_what_is_saved(path, runs):
    nb, _ = runs[path].result()
    assert not differences(path, nb), "run `make rooms`, look at what changed, and commit it"


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_a_room_has_its_outputs(path):
    code = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    assert any(c.outputs for c in code) and not any(o.output_type == "error" for c in code for o in c.outputs)


@pytest.mark.parametrize("path", SPINE, ids=lambda p: p.stem)
def test_a_spine_room_shows_a_picture(path):
    assert pictures(path)


def test_a_changed_number_word_or_picture_is_noticed():
    assert not compare_text("loss 1.00 after 12 steps", "loss 1.03 after 12 steps", 0.05)
    assert compare_text("loss 1.00", "loss 1.20", 0.05) and not compare_text("loss 1.00", "loss 1.20", 0.5)
    assert compare_text("FID 3", "FD 3", 0.05) and compare_text("1 2", "1 2 3", 0.05)
    assert compare_text("error -0.5", "error 0.5", 0.05)
    white, black, small = (png(size, value) for size, value in ((64, 255), (64, 0), (32, 255)))
    assert not compare_picture(white, white) and compare_picture(white, black) and compare_picture(white, small)


def test_what_a_test_sets_for_itself_does_not_reach_a_room_that_runs_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("GET_NB_DATA", "elsewhere")
    code = "import os\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nos.environ.get('GET_NB_DATA')"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path / "room.ipynb")
    made, _ = run(tmp_path / "room.ipynb")
    shown = [o.get("data", {}) for o in made.cells[0].outputs]
    assert any("image/png" in data for data in shown) and not any("elsewhere" in str(data) for data in shown)


LATE = """
import sys, time
sys.stdout.flush_timeout = sys.stderr.flush_timeout = 0
get_ipython().kernel.iopub_thread.schedule(lambda: time.sleep(6))
display("late")
"""  # the thread that sends what is shown is held back, and the cell's end does not wait for it


def test_what_a_cell_shows_late_is_not_lost():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LATE)])
    NotebookClient(nb, **PATIENT).execute()
    assert [o.data["text/plain"] for o in nb.cells[0].outputs] == ["'late'"]


def test_what_a_stage_shows_late_is_not_lost(tmp_path):
    from get_nb.lab.pipeline import _papermill, _register_engine

    _register_engine()
    source, made = tmp_path / "late.ipynb", tmp_path / "made.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LATE)]), source)
    _papermill(source, made, {}, tmp_path, dict(os.environ), tmp_path / "log")
    assert [o.data["text/plain"] for o in nbformat.read(made, 4).cells[-1].outputs] == ["'late'"]


def png(size, value):
    import base64
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("L", (size, size), value).save(out, "png")
    return base64.b64encode(out.getvalue()).decode()
