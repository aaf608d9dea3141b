"""Profiles, paths and environments of other people: what is written twice, linked folders, awkward names."""

import os

import pytest

from conftest import get_nb
from get_nb.lab.core import ConfigError
from get_nb.lab.parameters import read_yaml
from get_nb.lab.pipeline import StageError, run_profile
from get_nb.lab.profiles import demo_clone, load_profile

TWICE = {
    "a stage": "stages:\n  a: {n: 1}\n  b: {n: 1}\n  a: {n: 2}",
    "a parameter": "stages:\n  a:\n    n: 1\n    m: 2\n    n: 3",
    "in braces": "stages: {a: {params: {n: 1, n: 1}}}",
    "a section": "stages: {a: {}}\nabout: x\nstages: {b: {}}",
    "in a list": "rows:\n  - {x: 1, x: 2}",
    "beside a merge": "a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}",
    "numbers": "{1: a, 1: b}",
    "quoted": "{a: 1, 'a': 2}",
    "merges": "a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a",
}


@pytest.mark.parametrize("case", TWICE)
def test_what_stands_twice_in_yaml_is_refused_with_its_lines(case):
    with pytest.raises(ConfigError, match=r"profile: .* stands twice, in lines \d+ and \d+; remove one") as e:
        read_yaml(TWICE[case], "profile")
    assert "\n" not in str(e.value)


def test_merged_keys_may_be_overridden():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, y: 4}\nd: [*a, *a]"
    assert read_yaml(text, "") == dict(a=dict(x=1, y=2), b=dict(x=1, y=3), c=dict(x=1, y=4), d=[dict(x=1, y=2)] * 2)


def test_a_profile_with_a_stage_written_twice_is_refused_by_the_command(tmp_path):
    root = demo_clone(tmp_path)
    path = root / "nbs/paper/profiles/demo.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "stages: {}\n", encoding="utf-8")
    done = get_nb("reproduce", "--root", root, "--profile", "demo")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'stages' stands twice" in done.stderr


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "Profile demo, run in an ordinary place: the notebooks' products."
    root = demo_clone(tmp_path_factory.mktemp("plain"))
    return products(run_profile(root, "demo"))


def products(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".md",) and p.is_file()
    }


AWKWARD = "a {b} {0} 100% #1 'ü' $HOME ~ σ"


def test_awkward_names_of_clone_runs_and_temporary_folder_change_nothing(tmp_path, plain, monkeypatch):
    for name in ("clone", "runs", "tmp"):
        (tmp_path / AWKWARD / name).mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(tmp_path / AWKWARD / "tmp"))
    root = demo_clone(tmp_path / AWKWARD / "clone")
    folder = run_profile(root, "demo", runs=tmp_path / AWKWARD / "runs")
    assert folder.parent == tmp_path / AWKWARD / "runs"
    assert plain and products(folder) == plain
    assert all((folder / name / "notebook.ipynb").is_file() for name in load_profile(root, "demo"))


@pytest.mark.parametrize("level", ["stage", "profile", "runs"])
def test_a_linked_folder_is_emptied_through_the_link_and_stays_one(tmp_path, level):
    root, disk, precious = demo_clone(tmp_path / "clone"), tmp_path / "disk", tmp_path / "precious"
    stage = next(iter(load_profile(root, "demo")))
    place = dict(runs=root / "runs", profile=root / "runs/demo", stage=root / "runs/demo" / stage)[level]
    precious.mkdir()
    (precious / "keep.txt").touch()
    disk.mkdir()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(disk)
    folder = root / "runs/demo" / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "old.md").touch()
    (folder / "deep").mkdir()
    (folder / "deep/old.md").touch()
    (folder / "link").symlink_to(precious)
    (folder / "file").symlink_to(precious / "keep.txt")
    run_profile(root, "demo", stage=stage, fresh=True)
    assert place.is_symlink() and (folder / "stamp.json").is_file()
    assert not {"old.md", "deep", "link", "file"} & {p.name for p in folder.iterdir()}
    assert (precious / "keep.txt").is_file()


@pytest.mark.parametrize("kind", ["file", "link to a file", "dangling link", "loop"])
def test_what_is_in_the_way_of_a_stage_is_named(tmp_path, kind):
    root = demo_clone(tmp_path / "clone")
    stage = next(iter(load_profile(root, "demo")))
    place = root / "runs/demo" / stage
    place.parent.mkdir(parents=True)
    (tmp_path / "other").touch()
    target = {"link to a file": tmp_path / "other", "dangling link": tmp_path / "nowhere", "loop": place}.get(kind)
    if target:
        os.symlink(target, place)
    else:
        place.touch()
    with pytest.raises(StageError, match="is in the way") as e:
        run_profile(root, "demo", stage=stage)
    assert "\n" not in str(e.value) and (place.is_symlink() or place.is_file())
