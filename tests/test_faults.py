"""Wrong use and bad luck: one clear line, the right exit code, nothing half-written."""

import json
import shutil

import pytest
import yaml

from conftest import ROOT, get_nb
from get_nb.lab import launch
from get_nb.lab.profiles import load_profile

STAGES = load_profile(ROOT, "smoke")


def says(done, code, *words):
    assert done.returncode == code, (done.stdout, done.stderr)
    line = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and line.startswith("get-nb: ")
    for word in words:
        assert word in line, line


def usage(done, *words):
    says(done, 2, *words)
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def profile(tmp_path, **change):
    "A copy of the smoke profile with one stage's spec changed."
    spec = yaml.safe_load((ROOT / "nbs/paper/profiles/smoke.yaml").read_text(encoding="utf-8"))
    for stage, params in change.items():
        spec["stages"][stage]["params"] |= params
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "args, words",
    [
        (["reproduse"], ["'reproduse'", "did you mean 'reproduce'"]),
        (["reproduce", "--profil", "cpu"], ["--profil", "--profile"]),
        (["reproduce", "--profile", "cpuu"], ["unknown profile 'cpuu'", "did you mean 'cpu'"]),
        (["reproduce", "--stage", "teecher"], ["unknown stage 'teecher'", "did you mean 'teacher'"]),
        (["reproduce", "--group", "studens"], ["unknown group 'studens'"]),
        (["sample", "there_is_no.safetensors"], ["there_is_no.safetensors", "no such file"]),
        (["sample", "x.safetensors", "--n", "0"], ["--n", "0"]),
        (["sample", "x.safetensors", "--out", "x.gif"], [".png or .npz"]),
        (["publish", "--profile", "smoke", "--root", "/"], ["no get_nb clone", "--root"]),
    ],
)
def test_a_wrong_word_is_one_line_that_names_the_right_one(args, words, tmp_path):
    usage(get_nb(*args), *words)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(teacher=dict(stepz=3)), ["stage teacher", "unknown parameter 'stepz'", "did you mean 'steps'"]),
        (dict(teacher=dict(steps=0)), ["stage teacher", "steps = 0", "greater than 0"]),
        (dict(teacher=dict(lr="fast")), ["stage teacher", "lr = 'fast'", "valid number"]),
        (dict(teacher=dict(lr="1e-3")), ["stage teacher", "lr = '1e-3'", "write 0.001"]),
        (dict(teacher=dict(out="elsewhere")), ["stage teacher", "'out' is set by the runner"]),
        (dict(pairs=dict(sampler="hun")), ["stage pairs", "sampler = 'hun'", "heun"]),
        (dict(teacher=dict(label_dropout=1.5)), ["stage teacher", "label_dropout = 1.5", "less than or equal to 1"]),
    ],
)
def test_a_wrong_parameter_stops_before_anything_is_written(change, words, tmp_path):
    usage(get_nb("reproduce", "--profile", profile(tmp_path, **change), "--runs", tmp_path / "runs"), *words)
    assert not (tmp_path / "runs").exists()


def test_an_unwritable_runs_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    usage(
        get_nb("reproduce", "--profile", "smoke", "--runs", tmp_path / "file"),
        "cannot write to",
        str(tmp_path / "file"),
        "--runs",
    )


def test_two_runs_do_not_share_a_folder(tmp_path):
    from filelock import FileLock

    (tmp_path / "smoke").mkdir()
    with FileLock(tmp_path / "smoke/.lock"):
        usage(get_nb("reproduce", "--profile", "smoke", "--runs", tmp_path), "in use by another run")


def test_a_damaged_stamp_is_reported_and_its_stage_runs_again(smoke, tmp_path):
    runs = shutil.copytree(smoke[0], tmp_path / "runs")
    (runs / "smoke/figure_samples/stamp.json").write_text('{"key": ', encoding="utf-8")
    done = get_nb("stages", "--profile", "smoke", "--runs", runs)
    assert (
        done.returncode == 0 and "damaged stamp" in done.stdout and done.stdout.count("up to date") == len(STAGES) - 1
    )
    done = get_nb("reproduce", "--profile", "smoke", "--runs", runs)
    assert (
        done.returncode == 0
        and "figure_samples: running" in done.stdout
        and done.stdout.count(": up to date") == len(STAGES) - 1
    )


def test_a_nan_loss_stops_the_stage_and_names_step_and_checkpoint(smoke, tmp_path):
    runs = tmp_path / "runs/mine"
    for stage in ("classifier", "teacher", "pairs"):
        shutil.copytree(smoke[0] / "smoke" / stage, runs / stage)
    mine = profile(tmp_path, get=dict(lr=1e30, clip=0.0, warmup=0, checkpoint_every=1))
    done = get_nb("reproduce", "--profile", mine, "--runs", tmp_path / "runs", "--stage", "get")
    says(done, 1, "stage get failed", "Diverged", "loss", "at step", "last good checkpoint", "notebook.html")
    assert not (runs / "get/stamp.json").exists() and (runs / "get/notebook.html").is_file()


def test_a_missing_record_is_named(tmp_path):
    from get_nb.lab.core import ConfigError
    from get_nb.lab.records import read_record

    (tmp_path / "evaluate_get").mkdir()
    (tmp_path / "evaluate_get/record.json").write_text(json.dumps(dict(stage="evaluate_get")), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'evaluate_get'"):
        read_record(tmp_path, "evaluate_gt")


def test_a_full_disk_that_names_no_file_is_said_in_words(monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launch, "run_notebook", full)
    with pytest.raises(SystemExit) as stop:
        launch.launch_main(["student.ipynb"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("standard output: No space left on device\n")
