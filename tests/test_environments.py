"""Profiles, paths and environments of other people: what is written twice, linked folders, awkward names."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import released
from conftest import COMMAND, ROOT, get_nb
from get_nb.lab import weights
from get_nb.lab.checkpoints import create_model
from get_nb.lab.classifier import create_classifier
from get_nb.lab.core import ConfigError, FileError, setup, torch_rng
from get_nb.lab.files import save_checkpoint
from get_nb.lab.parameters import read_yaml
from get_nb.lab.pipeline import StageError, run_profile
from get_nb.lab.profiles import demo_clone, load_profile
from get_nb.lab.store import PairDataset, save_pairs

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


# Other machines: what a user, a container or a scheduler may have. A site customisation reaches the kernels, too.
STRICT = "import warnings; warnings.filterwarnings('error', module='get_nb')\n"
UNKNOWN = "import pwd\ndef nobody(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\npwd.getpwuid = nobody\n"
SURROUNDINGS = {
    "LC_ALL=C": dict(LC_ALL="C"),
    "LC_ALL=C without UTF-8 mode": dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
    "ISO-8859-1": dict(LC_ALL="en_US.ISO-8859-1", PYTHONUTF8="0", PYTHONIOENCODING="iso-8859-1"),
    "HOME unset": dict(HOME=None),
    "unknown uid": dict(HOME=None, USER=None, LOGNAME=None, site=UNKNOWN),
    "HOME is read-only": dict(HOME="/proc"),
    "HOME is no folder": dict(HOME="/dev/null"),
    "TMPDIR with spaces and braces": dict(TMPDIR="a {b} {0}"),
    "linked runs": dict(link=True),
    "python -O": dict(PYTHONOPTIMIZE="1"),
}
DRIVER = """
import sys
from get_nb.lab.cli import main
for words in {commands!r}:
    try:
        main(words)
    except SystemExit as e:
        if e.code:
            sys.exit(f"{{words}}: exit {{e.code}}")
"""


@pytest.fixture(scope="module")
def belongings(tmp_path_factory):
    "Weights of a GET and of a classifier, and released pairs."
    folder = tmp_path_factory.mktemp("belongings")
    shape = dict(image_size=8, channels=1)
    save_checkpoint(folder / "get.safetensors", create_model("GET-digits/2", dim=8, heads=2, depth=1, **shape))
    save_checkpoint(folder / "classifier.safetensors", create_classifier(num_classes=10, width=4, **shape))
    released.write_pairs(folder / "released", ["11", "7"], 4)
    return folder


def work_in(tmp_path, belongings, changes):
    "sample, evaluate, import and reproduce, one after the other in one process; -> CompletedProcess, folder of runs."
    changes, here = dict(changes), {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    site = STRICT + changes.pop("site", "")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(site, encoding="utf-8")
    here["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    runs = tmp_path / "runs"
    if changes.pop("link", False):
        (tmp_path / "disk").mkdir()
        runs.symlink_to(tmp_path / "disk")
    if "TMPDIR" in changes:
        changes["TMPDIR"] = str(tmp_path / changes["TMPDIR"])
        os.mkdir(changes["TMPDIR"])
    for name, value in changes.items():
        here.pop(name, None)
        if value is not None:
            here[name] = value
    root, weights = demo_clone(tmp_path / "clone"), str(belongings / "get.safetensors")
    measured = ["--classifier", str(belongings / "classifier.safetensors"), "--data", "digits", "--samples", "20"]
    commands = [
        ["sample", weights, "--n", "4", "--out", "made.png"],
        ["evaluate", weights, *measured, "--json", "made.json"],
        ["import", str(belongings / "released"), "--out", "imported"],
        ["reproduce", "--root", str(root), "--profile", "demo", "--runs", str(runs)],
        ["stages", "--root", str(root), "--profile", "demo", "--runs", str(runs)],
    ]
    (tmp_path / "driver.py").write_text(DRIVER.format(commands=commands), encoding="utf-8")
    return subprocess.run([sys.executable, "driver.py"], cwd=tmp_path, env=here, capture_output=True), runs


def check_work(tmp_path, done, runs, plain, what):
    "Everything was made, as everywhere; nothing was said but where caches go."
    said = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 0 and "Traceback" not in said and "Warning" not in said, (what, said)
    assert all((tmp_path / name).stat().st_size for name in ("made.png", "made.json", "imported/manifest.json")), what
    assert plain and products(runs / "demo") == plain, what
    assert not list(tmp_path.glob(".*")), what


def test_a_machine_that_lacks_everything_at_once_works(tmp_path, belongings, plain):
    "Another encoding, no home, no name, an awkward TMPDIR, linked runs, optimised, warnings as errors."
    changes = {}
    for name in ("LC_ALL=C without UTF-8 mode", "ISO-8859-1", "unknown uid", "linked runs", "python -O"):
        changes |= SURROUNDINGS[name]
    changes |= SURROUNDINGS["TMPDIR with spaces and braces"]
    done, runs = work_in(tmp_path, belongings, changes)
    check_work(tmp_path, done, runs, plain, changes)
    assert "no home folder: caches go to" in done.stderr.decode("utf-8", "replace")
    assert not list((tmp_path / changes["TMPDIR"]).glob("get_nb-home-*"))  # lent, and given back


@pytest.mark.slow
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_each_surrounding_works(tmp_path, belongings, plain, name):
    done, runs = work_in(tmp_path, belongings, SURROUNDINGS[name])
    check_work(tmp_path, done, runs, plain, name)


@pytest.mark.parametrize("sign, code, word", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_command_that_is_stopped_says_so_and_leaves_nothing(tmp_path, belongings, sign, code, word, command):
    words = ["--n", "3000000", "--out", "s.npz"]
    if command == "evaluate":
        words = ["--samples", "3000000", "--classifier", belongings / "classifier.safetensors", "--json", "e.json"]
    process = subprocess.Popen(
        [*COMMAND, command, belongings / "get.safetensors", *words],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(ROOT), GET_NB_PROGRESS=str(tmp_path / "progress.json")),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    started = time.time()
    while not (tmp_path / "progress.json").exists() and process.poll() is None and time.time() < started + 60:
        time.sleep(0.05)
    process.send_signal(sign)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and "\n" not in said.strip() and word in said, said
    assert not [p for p in tmp_path.iterdir() if p.name != "progress.json"]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_pairs_reach_the_workers_of_a_loader_however_they_are_started(tmp_path, method):
    g = torch_rng("workers")
    noise, image = torch.randn(2, 30, 1, 4, 4, generator=g)
    save_pairs(tmp_path / "pairs", noise, image, torch.arange(30) % 3, shard_size=7)
    pairs = PairDataset(tmp_path / "pairs")
    loader = torch.utils.data.DataLoader(pairs, batch_size=8, num_workers=1, multiprocessing_context=method)
    read = [b for b in loader]
    for name, value in (("noise", noise), ("image", image), ("label", torch.arange(30) % 3)):
        assert torch.equal(torch.cat([b[name] for b in read]), value)


@pytest.mark.parametrize("command", ["doctor", "stages", "publish"])
def test_root_may_be_named_from_anywhere(tmp_path, command):
    root = demo_clone(tmp_path / "clone")
    words = [command, "--root", root, *([] if command == "doctor" else ["--profile", "demo"])]
    done = subprocess.run([*COMMAND, *words], cwd="/", env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True)
    assert not re.search(b"no get_nb clone|No such option", done.stdout + done.stderr), done.stderr
    assert done.stdout + done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("device, mac", [("mps", True), ("mps", False), ("auto", True)])
def test_the_gpu_of_a_mac_is_not_used_and_that_is_said(capsys, monkeypatch, device, mac):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mac)
    assert setup(device) == torch.device("cpu")
    said = capsys.readouterr().err
    assert "float64" in said and "CPU is used" in said and said.count("\n") == 1
    assert setup("cpu") == torch.device("cpu") and not capsys.readouterr().err


def test_weights_are_asked_for_where_there_is_no_home(monkeypatch):
    monkeypatch.delenv("GET_NB_WEIGHTS", raising=False)
    monkeypatch.setattr(weights, "home_folder", lambda: None)
    with pytest.raises(FileError, match="set GET_NB_WEIGHTS"):
        weights.weights_folder()
