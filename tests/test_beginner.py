"""What a beginner types wrongly ends in one line that helps, with an exit code, and leaves nothing behind. And what is printed helps."""

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import click
import pytest
import torch

from conftest import ROOT
from get_nb.lab import cli, pipeline
from get_nb.lab.checkpoints import create_model, create_teacher
from get_nb.lab.classifier import create_classifier
from get_nb.lab.core import _LOG, progress
from get_nb.lab.files import save_checkpoint
from get_nb.lab.profiles import Stage

SHAPE = dict(num_classes=10, image_size=8, channels=1)
TINY = dict(dim=16, heads=2, depth=1)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with models, and with things that are none."
    folder = tmp_path_factory.mktemp("desk")
    torch.manual_seed(0)
    models = dict(
        get=create_model("GET-digits/2", **SHAPE, **TINY),
        vit=create_model("ViT-digits/2", image_size=8, channels=1, **TINY),
        large=create_model("ViT-digits/2", image_size=16, channels=1, **TINY),
        teacher=create_teacher("unet-digits", **SHAPE, base=8),
        classifier=create_classifier(**SHAPE, width=8),
    )
    for name, model in models.items():
        save_checkpoint(folder / f"{name}.safetensors", model)
    (folder / "notes.txt").write_text("my notes", encoding="utf-8")
    (folder / "short.safetensors").write_bytes((folder / "get.safetensors").read_bytes()[:900])
    (folder / "empty").mkdir()
    for split in ("videos/train/a", "videos/train/b"):
        (folder / split).mkdir(parents=True)
        (folder / split / "clip.mp4").write_bytes(b"\0\0\0 ftypisom")
    (folder / "mine.txt").write_text("stages: {teacher: }", encoding="utf-8")
    return folder


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def said(words, capsys, code=2):
    "Run a command that must fail; -> its one line."
    with pytest.raises(SystemExit) as e:
        cli.main(words)
    out = capsys.readouterr()
    assert e.value.code == code and len(out.err.splitlines()) == 1 and not out.out, out
    return out.err


WRONG = {
    "sample nowhere.safetensors": "no such file",
    "sample fashion_get": "no shipped weights of that name",
    "sample empty": "a folder without model.safetensors",
    "sample notes.txt": "not a whole safetensors file",
    "sample short.safetensors": "not a whole safetensors file",
    "sample classifier.safetensors": "holds a classifier, which makes no images",
    "sample get.safetensors --label 10": "labels must lie in 0..9, got [10]",
    "sample get.safetensors --label three": "'three' is not a valid integer",
    "sample vit.safetensors --label 3": "an unconditional model takes no labels",
    "sample vit.safetensors --iterations 3": "does not iterate",
    "sample get.safetensors --steps 5": "--steps is for teachers",
    "sample get.safetensors -n 0": "0 is not in the range",
    "sample get.safetensors --out pictures": "a .png or .npz file",
    "sample get.safetensors --out empty": "'empty' is a directory",
    "sample get.safetensors --out notes.txt/x.png": "notes.txt",
    "sample get.safetensors --precision fp8": "'fp8' is not one of",
    "sample": "Missing argument 'WEIGHTS'",
    "sample get.safetensors vit.safetensors": "unexpected extra argument",
    "evaluate get.safetensors": "name a classifier with --classifier",
    "evaluate get.safetensors --classifier get.safetensors": "not a classifier",
    "evaluate get.safetensors --classifier classifier.safetensors --data digit": "did you mean 'digits'",
    "evaluate large.safetensors --classifier classifier.safetensors --data digits": "images of 1x16x16, digits",
    "evaluate get.safetensors --classifier classifier.safetensors --data folder:videos": "videos",
    "evaluate get.safetensors --classifier classifier.safetensors --data folder:nowhere": "nowhere",
    "evaluate get.safetensors --classifier classifier.safetensors --device gpu": "did you mean 'cpu'",
    "evaluate get.safetensors --classifier classifier.safetensors --unconditional": "takes neither --steps nor",
    "import videos/train/a/clip.mp4": "clip.mp4",
    "import nowhere.pth": "nowhere.pth",
    "import empty": "empty",
    "pairs info empty": "empty",
    "pairs verify nowhere": "nowhere",
    "pairs merge all nowhere": "nowhere",
    "stages --profile cpuu --root {root}": "did you mean 'cpu'",
    "stages --profile mine.txt --root {root}": "mine.txt",
    "stages --root empty": "no get_nb clone",
    "stages": "change into one, or name it with --root",
    "reproduce --json --root {root}": "--json goes with --dry-run",
    "reproduce --root {root} --cores 0": "0 is not in the range",
    "reproduce --root {root} --runs notes.txt --profile smoke": "cannot write to",
    "publish --root {root} --profile smoke --runs empty": "is not up to date",
    "bench --device cuda --task sampling": "no GPU is visible",
    "bench --size GET-X/2 --task sampling": "GET-X/2",
    "price --gpus 0": "0 is not in the range",
    "price --set peak": "NAME=NUMBER",
    "pricee": "did you mean 'price'",
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_wrong_use_is_one_helpful_line_and_leaves_nothing(typed, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = snapshot(desk)
    line = said(shlex.split(typed.format(root=ROOT)), capsys)
    assert WRONG[typed] in line and len(line) < 400, line
    assert snapshot(desk) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
@pytest.mark.parametrize("out", ["x.png", "x.npz"])
def test_a_full_disk_or_a_folder_that_may_not_be_written_to(error, out, desk, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.chdir(desk)
    monkeypatch.setattr(os, "fsync", fail)
    before = snapshot(desk)
    assert error.strerror in said(["sample", "get.safetensors", "-n", "2", "--out", out], capsys)
    assert snapshot(desk).keys() == before.keys()


def commands(group=cli.cli, words=("get-nb",)):
    "Every command with the words that call it."
    for name, command in group.commands.items():
        yield " ".join([*words, name]), command
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples_that_it_would_accept(name):
    shown = [line.strip() for line in COMMANDS[name].get_help(click.Context(COMMANDS[name])).splitlines()]
    examples = [re.sub(r"  +.*", "", line) for line in shown if line.startswith("get-nb ")]
    assert examples and examples[0].startswith(name)
    for example in examples:
        words, command = shlex.split(example)[1:], cli.cli
        while isinstance(command, click.Group):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(command.name, words)  # click refuses an option or a value that it does not know


@pytest.mark.parametrize("words", ["stages", "reproduce --dry-run", "doctor"])
def test_a_machine_reads_what_a_person_reads(words, capsys, tmp_path):
    clone = ["--root", str(ROOT)]
    chain = ["--profile", "smoke", "--runs", str(tmp_path)] if words[0] in "sr" else []
    told = []
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as e:
            cli.main([*words.split(), *clone, *chain, *more])
        out = capsys.readouterr()
        assert not e.value.code and not out.err
        told.append(out.out)
    found = json.loads(told[1])
    first = dict(stages=lambda: found[0]["stage"], reproduce=lambda: found["stages"][0]["stage"])
    first["doctor"] = lambda: found[0]["text"]
    assert first[words.split()[0]]() in told[0]


@pytest.mark.slow
def test_a_machine_reads_the_price(capsys):
    with pytest.raises(SystemExit):
        cli.main(["price", "--gpus", "2", "--set", "price=2.5", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["assumptions"]["price"] == 2.5 and found["gpus"]["2"]["rows"]


@pytest.mark.parametrize("terminal, no_color, painted", [(True, "", True), (True, "1", False), (False, "", False)])
def test_colour_is_for_terminals_and_for_those_who_want_it(terminal, no_color, painted, monkeypatch):
    monkeypatch.setattr(sys, "stdout", type("Out", (), dict(isatty=lambda self: terminal))())
    monkeypatch.setenv("NO_COLOR", no_color)
    assert ("\x1b[" in cli._paint("up to date", True)) == painted


def test_a_log_gets_a_line_per_stage_now_and_then(tmp_path, monkeypatch, capsys):
    def slow(stage, key, root, runs, *_, **__):
        (runs / stage.name).mkdir()
        state = dict(n=300, total=2200, rate=10.0, desc="teacher", note="loss=0.52")
        (runs / stage.name / "progress.json").write_text(json.dumps(state), encoding="utf-8")
        time.sleep(2.2)
        return dict(seconds=2.2)

    monkeypatch.setattr(pipeline, "run_stage", slow)
    monkeypatch.setattr(pipeline, "stage_key", lambda *_: {})
    monkeypatch.setattr(pipeline, "why_run", lambda *_: "not run yet")
    monkeypatch.setattr(pipeline, "_LOG_EVERY", 0.9)
    stage = Stage("teacher", Path("teacher.ipynb"), params=dict(threads=1))
    pipeline._run_all(pipeline._Schedule(dict(teacher=stage), tmp_path, tmp_path, 1, (), False))
    lines = [line for line in capsys.readouterr().out.splitlines() if "300/2200" in line]
    assert 1 <= len(lines) <= 2
    assert lines[0] == "[1/1] teacher: teacher 300/2200, 03:10 left, loss=0.52"


def test_a_bar_in_a_log_is_lines_far_apart(monkeypatch, capsys):
    monkeypatch.setenv("GET_NB_PROGRESS", "")
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert _LOG["mininterval"] == 60
    for delay in (60.0, 1e-9):
        monkeypatch.setitem(_LOG, "delay", delay)
        monkeypatch.setitem(_LOG, "mininterval", 0.0)
        for _ in progress(range(3), desc="samples"):
            time.sleep(0.01)
        err = capsys.readouterr().err
        assert (err == "") == (delay == 60.0) and "\r" not in err
    assert all(re.fullmatch(r"samples: \d/3, .* left", line) for line in err.splitlines()), err
