"""What users have reported: each test names what must not happen again; siblings of a fault share its test."""

import shutil

import pytest

import get_nb
from get_nb.lab import pipeline, publishing
from get_nb.lab.core import ConfigError, is_main
from get_nb.lab.files import save_checkpoint
from get_nb.lab.profiles import demo_clone, load_profile
from get_nb.lab.publishing import publish_profile
from get_nb.lab.records import save_record
from get_nb.lab.stages import profile_runs, runs_folder, stage_key


@pytest.fixture
def clone(tmp_path):
    "A clone in miniature."
    return demo_clone(tmp_path / "clone")


@pytest.fixture
def written(monkeypatch):
    "Stages write what the demo's notebooks would, without a kernel."

    def execute(stage, parameters, folder, cwd):
        shutil.copyfile(stage.notebook, folder / "notebook.ipynb")
        if stage.draws:
            (folder / f"{stage.name}.json").write_text("{}")
        else:
            save_record(folder, dict(total=parameters["n"]))

    def page(notebook, path, *_):
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(notebook, path)

    monkeypatch.setattr(pipeline, "execute", execute)
    monkeypatch.setattr(publishing, "_write_page", page)


@pytest.mark.parametrize(
    "variables, main",
    [
        (dict(RANK="1"), True),  # left behind by another launcher
        (dict(RANK="1", WORLD_SIZE="1"), True),
        (dict(RANK="1", WORLD_SIZE=""), True),
        (dict(RANK="0", WORLD_SIZE="2"), True),
        (dict(RANK="1", WORLD_SIZE="2"), False),
    ],
)
def test_a_rank_alone_does_not_keep_files_from_being_written(variables, main, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_main() == main
    save_checkpoint(tmp_path / "model.safetensors", get_nb.create_model("GET-digits/2", image_size=8, channels=1))
    save_record(tmp_path / "stage", dict(a=1))
    assert (tmp_path / "model.safetensors").is_file() == (tmp_path / "stage/record.json").is_file() == main


def test_a_kernel_does_not_inherit_the_launchers_variables(clone, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(pipeline, "_papermill", lambda source, notebook, parameters, cwd, env, log: seen.update(env))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    pipeline.execute(load_profile(clone, "demo")["square_3"], {}, tmp_path, clone)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & seen.keys() and "PATH" in seen


def test_a_stage_that_leaves_nothing_is_not_done_and_keeps_its_checkpoints(clone, monkeypatch):
    stage, runs = load_profile(clone, "demo")["square_3"], runs_folder(clone, "demo")
    state = runs / "square_3/state/step-3"

    def execute(stage, parameters, folder, cwd):
        state.mkdir(parents=True)

    monkeypatch.setattr(pipeline, "execute", execute)
    with pytest.raises(pipeline.StageError, match="square_3 failed: .* left no file"):
        pipeline.run_stage(stage, stage_key(stage, runs), clone, runs)
    assert state.is_dir() and not (runs / "square_3/stamp.json").exists()


def test_two_profiles_of_one_file_name_do_not_share_runs_or_results(clone, written, monkeypatch):
    text = (clone / "nbs/paper/profiles/demo.yaml").read_text()
    for folder in ("pa", "pb"):
        (clone / folder).mkdir()
        (clone / folder / "p.yaml").write_text(text)
    first, second = (str(clone / folder / "p.yaml") for folder in ("pa", "pb"))
    folder = pipeline.run_profile(clone, first)
    for use in (pipeline.run_profile, profile_runs, publish_profile):
        with pytest.raises(ConfigError, match=r"runs/p belongs to pa/p.yaml, not to pb/p.yaml: rename yours"):
            use(clone, second)
    assert (folder / "square_3/stamp.json").is_file()
    publish_profile(clone, first)
    other = clone / "elsewhere"
    pipeline.run_profile(clone, second, runs=other)
    with pytest.raises(ConfigError, match=r"results/p belongs to pa/p.yaml, not to pb/p.yaml"):
        publish_profile(clone, second, runs=other)
    monkeypatch.chdir(clone)
    assert profile_runs(clone, "pa/p.yaml") == folder
    moved = clone.rename(clone.with_name("moved"))
    assert "published 3 stages" in publish_profile(moved, str(moved / "pa/p.yaml"))
    (moved / "pa/p.yaml").unlink()
    assert runs_folder(moved, str(moved / "pb/p.yaml")) == moved / "runs/p"
