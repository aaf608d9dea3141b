"""A profile may begin with a teacher that the package ships, and a search may rest on its short trainings."""

import json

import pytest
import torch
import yaml

from conftest import ROOT
from get_nb.lab.checkpoints import load_checkpoint
from get_nb.lab.core import ConfigError, FileError
from get_nb.lab.costs import stage_cost, teacher_of
from get_nb.lab.files import sha256_file
from get_nb.lab.imports import import_file
from get_nb.lab.profiles import load_profile
from get_nb.lab.shipped import find_checkpoint
from test_paper import run_profile_here

SEARCH = dict(model="GET-digits/2", steps=8, samples=30, batch_size=4, lrs=[0.001, 0.002], n_iter=2, checkpoint_every=2)
SPEC = dict(
    about="a shipped teacher",
    defaults=dict(data="digits", threads=1, device="cpu", seed=0),
    stages=dict(
        classifier=dict(params=dict(steps=3, batch_size=32, floor_splits=1)),
        teacher=dict(notebook="import_teacher", params=dict(file="digits-teacher", num_steps=2)),
        pairs=dict(inputs=dict(teacher="teacher"), params=dict(n=16, num_steps=2, shard_size=8, batch_size=8)),
        search=dict(
            inputs=dict(pairs="pairs", classifier="classifier"),
            params=SEARCH | dict(share=0.25, confirm=False, extend=0),
        ),
        table_search=dict(rows=dict(GET=["search"])),
    ),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Runs folder of a profile whose teacher is the shipped one."
    tmp = tmp_path_factory.mktemp("shipped teacher")
    (tmp / "mine.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False), encoding="utf-8")
    return run_profile_here(tmp / "mine.yaml", tmp / "runs")


def test_the_copy_of_a_shipped_teacher_is_the_teacher_and_names_the_file_that_it_comes_from(runs):
    copy, shipped = load_checkpoint(runs / "teacher/teacher.safetensors"), load_checkpoint("digits-teacher")
    assert copy.config == shipped.config
    for name, value in shipped.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value), name
    record = json.loads((runs / "teacher/record.json").read_text(encoding="utf-8"))
    assert record["imported"] == "digits-teacher"
    assert record["sha256"] == sha256_file(find_checkpoint("digits-teacher"))


def test_a_search_that_is_not_confirmed_trains_nothing_at_full_length_and_its_table_says_so(runs):
    record = json.loads((runs / "search/record.json").read_text(encoding="utf-8"))
    assert {t["steps"] for t in record["trials"]} == {2} == {record["steps"], record["short_steps"]}
    best = min(record["trials"], key=lambda t: t["fd"])
    assert (record["lr"], record["fd"]) == (best["lr"], best["fd"])
    assert record["train_tflop"] == pytest.approx(record["train_gflop"] * 2 * 4 / 1000)
    table = json.loads((runs / "table_search/table_search.json").read_text(encoding="utf-8"))
    assert "none longer" in " ".join(table["notes"])
    assert "short" not in {c["key"] for c in table["columns"]}


def test_a_confirmed_search_is_priced_with_its_long_trainings_and_a_short_one_without(tmp_path):
    def pflop(confirm):
        spec = json.loads(json.dumps(SPEC))
        spec["stages"]["search"]["params"]["confirm"] = confirm
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        stages = load_profile(ROOT, str(path))
        return stage_cost(stages["search"], stages, "digits")["pflop"]

    assert pflop(True) == pytest.approx(pflop(False) * (0.25 * 2 + 3) / (0.25 * 2))


def test_the_price_knows_the_network_of_a_shipped_teacher(tmp_path):
    stages = load_profile(ROOT, "fashion-laptop")
    assert teacher_of(stages["teacher"]) == "unet-fashion"
    assert stage_cost(stages["pairs"], stages, "fashion-mnist")["pflop"] > 0


def test_a_file_is_preferred_to_a_shipped_name_and_a_misspelt_name_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "10 classes" in import_file("digits-teacher", "copy.safetensors")
    with pytest.raises(ConfigError, match="is there already"):
        import_file("digits-teacher", "copy.safetensors")
    with pytest.raises(
        FileError,
        match="^digits-teecher: no such file, and no shipped weights of that name; did you mean 'digits-teacher'",
    ):
        import_file("digits-teecher", "other.safetensors")
    (tmp_path / "digits-teacher").write_bytes(b"no weights")
    with pytest.raises(FileError, match="^digits-teacher: neither a released GET"):
        import_file("digits-teacher", "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
