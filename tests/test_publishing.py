"""What is published: complete, of nobody else's making meanwhile, and the same on every machine; and the texts that quote it."""

import json
import os

import nbformat
import pytest
from filelock import FileLock

from get_nb.lab import pipeline, publishing
from get_nb.lab.core import ConfigError
from get_nb.lab.profiles import demo_clone
from get_nb.lab.publishing import publish_profile, publish_redrawn, redraw
from get_nb.lab.readme import TEXTS, fill_blocks, write_texts

COLUMN = dict(digits=2, timing=False)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A small clone whose notebooks are not run: a stage writes the files that `made` names."
    root, made = demo_clone(tmp_path / "clone"), ["record.json"]

    def execute(stage, parameters, folder, cwd):
        for name in made:
            (folder / name).write_text(json.dumps({}), encoding="utf-8")
        nbformat.write(nbformat.v4.new_notebook(), folder / "notebook.ipynb")

    monkeypatch.setattr(pipeline, "execute", execute)
    monkeypatch.setattr(pipeline, "_stamp", stamp_of)
    monkeypatch.setattr(publishing, "_write_page", lambda notebook, path, *_: write(path))
    return root, made


def stamp_of(stage, key, folder, seconds):
    about = dict(notebook=stage.notebook.stem, key=key, seed=None, seconds=seconds, python="", packages={}, hardware={})
    return about | dict(outputs=pipeline.stage_outputs(folder))


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}", encoding="utf-8")


def test_a_figure_that_is_drawn_under_another_name_leaves_nothing_of_the_old_one(clone):
    root, made = clone
    made[:] = ["record.json", "table_old.json"]
    pipeline.run_profile(root, "demo")
    publish_profile(root, "demo")
    made[:] = ["record.json", "table_new.json"]
    redraw(root, "demo")
    publish_redrawn(root, "demo")
    there = {p.name for p in (root / "results/demo/tables").iterdir()}
    assert "table_new.json" in there and "table_old.json" not in there
    assert (root / "results/demo/records/square_3/record.json").is_file()


def test_nothing_is_published_while_another_process_runs_a_stage_or_publishes(clone):
    root, _ = clone
    runs = pipeline.run_profile(root, "demo")
    with FileLock(runs / ".square_3.lock"), pytest.raises(pipeline.StageError, match="square_3 is being run"):
        publish_profile(root, "demo")
    (root / "results").mkdir(exist_ok=True)
    with FileLock(root / "results/.demo.lock"), pytest.raises(ConfigError, match="is being published by another"):
        publish_profile(root, "demo")
    assert not (root / "results/demo").exists()
    publish_profile(root, "demo")
    (root / "runs/demo-redrawn").mkdir()
    with FileLock(root / "runs/demo-redrawn/.lock"), pytest.raises(ConfigError, match="in use by another run"):
        redraw(root, "demo")


def test_a_publish_that_was_killed_between_its_two_renames_is_put_back(clone):
    root, _ = clone
    pipeline.run_profile(root, "demo")
    publish_profile(root, "demo")
    os.replace(root / "results/demo", root / "results/.demo.old")
    redraw(root, "demo")
    assert (root / "results/demo/manifest.json").is_file() and not (root / "results/.demo.old").exists()


@pytest.mark.parametrize(
    "hidden, text, shown",
    [
        ("/", "3 images/s, see /tmp", "3 images/s, see /tmp"),
        ("/root", "/root/runs/a, '/root' and /rooted/b", "runs/a, '.' and /rooted/b"),
        ("/home/u", "/home/user/x /home/u/x /mnt/home/u/x", "/home/user/x x /mnt/home/u/x"),
        ("/home/u", "In /home/u.", "In .."),
    ],
)
def test_a_page_names_no_folder_of_the_machine_and_is_otherwise_as_it_was(hidden, text, shown, tmp_path):
    cell = nbformat.v4.new_code_cell("1", metadata=dict(tags=[]), outputs=[nbformat.v4.new_output("stream", text=text)])
    parameters = nbformat.v4.new_code_cell("a = 1", metadata=dict(tags=["parameters"]))
    kernel = dict(name="python3", language="python", display_name="python3")
    nb = nbformat.v4.new_notebook(cells=[parameters, cell], metadata=dict(kernelspec=kernel, papermill={}))
    nbformat.write(nb, tmp_path / "in.ipynb")
    publishing._write_page(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {}, (hidden,))
    page = nbformat.read(tmp_path / "out.ipynb", 4)
    assert [o["text"] for c in page.cells for o in c.get("outputs", [])] == [shown]


@pytest.fixture
def published(tmp_path):
    "A clone with one published table."
    for folder in ("nbs/paper", "results/x/tables"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "settings.ini").touch()
    columns = [dict(COLUMN, key="m", label="method"), dict(COLUMN, key="fd", label="FD")]
    table = dict(title="t", columns=columns, rows=[dict(m="GET", fd=dict(value=1.25))], notes=[])
    (tmp_path / "results/x/tables/t.json").write_text(json.dumps(table), encoding="utf-8")
    return tmp_path


VALUE = "<!-- value: x/tables/t; row=GET; column=fd -->"


@pytest.mark.parametrize(
    "text, said",
    [
        (f"a {VALUE} and prose that stays, then {VALUE}1<!-- end -->", "does not end: <!-- end --> is missing before"),
        (f"a {VALUE} and no more", "does not end: <!-- end --> is missing$"),
        ("a <!-- tabel: x/tables/t -->b<!-- end -->", "unknown kind 'tabel'; did you mean 'table'"),
        ("a <!--value: x/tables/t; row=GET; column=fd-->b<!-- end -->", "write it as <!-- value: ... -->"),
        (f"{VALUE}1<!-- end -->\n2<!-- end -->", "in line 2 ends no block"),
    ],
)
def test_a_block_that_does_not_end_or_is_of_no_known_kind_is_refused(text, said, published):
    with pytest.raises(ConfigError, match=said):
        fill_blocks(published, text)


def test_comments_that_are_no_blocks_stay(published):
    assert fill_blocks(published, f"<!-- a note -->{VALUE}<!-- end -->") == f"<!-- a note -->{VALUE}1.25<!-- end -->"


def test_of_two_texts_both_are_written_or_none(published):
    before = f"{VALUE}0<!-- end -->"
    for name, text in zip(TEXTS, (before, "<!-- value: x/tables/t; row=GTE; column=fd --><!-- end -->")):
        (published / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="GTE"):
        write_texts(published)
    assert (published / TEXTS[0]).read_text(encoding="utf-8") == before
