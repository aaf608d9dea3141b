"Stages that run side by side: a failing one lets its neighbour finish, and nothing after it starts."

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from get_nb.lab import pipeline, stages
from get_nb.lab.profiles import Stage


def stage(name, *needs, **params):
    return Stage(name, Path("student.ipynb"), inputs={n: n for n in needs}, params=params)


@pytest.fixture
def run(monkeypatch, tmp_path):
    "Run fake stages: what each does is a function; -> names in the order of start, end and what was raised."

    def run(some, work, cores, **how):
        log = []

        def fake(s, key, root, runs, fresh, **how):
            log.append(f"{s.name} starts{' afresh' * fresh}")
            work(s.name)
            log.append(f"{s.name} ends")
            return dict(seconds=0)

        monkeypatch.setattr(pipeline, "run_stage", fake)
        monkeypatch.setattr(pipeline, "why_run", lambda s, runs, keep=False: "test")
        monkeypatch.setattr(pipeline, "stage_key", lambda s, runs, keep=False: {})
        monkeypatch.setattr(pipeline, "load_profile", lambda root, name: {s.name: s for s in some})
        error = None
        try:
            pipeline.run_profile(tmp_path, "p", runs=tmp_path, cores=cores, **how)
        except pipeline.StageError as e:
            error = str(e)
        return log, error

    return run


def test_a_failure_lets_the_neighbour_finish_and_starts_nothing_else(run, capsys):
    def work(name):
        if name == "bad":
            raise pipeline.StageError("stage bad failed")
        time.sleep(0.3)

    log, error = run([stage("bad"), stage("good"), stage("after", "good")], work, 2)
    assert error == "stage bad failed" and "good ends" in log and "after starts" not in log
    assert "waiting for good" in capsys.readouterr().out


def test_going_on_leaves_out_what_needs_the_failed_stage_and_nothing_else(run):
    def work(name):
        if name == "bad":
            raise pipeline.StageError("stage bad failed")

    some = [stage("bad"), stage("good"), stage("child", "bad"), stage("after", "good"), stage("grandchild", "child")]
    log, error = run(some, work, 1, go_on=True)
    ended = {line.split()[0] for line in log if line.endswith("ends")}
    assert error == "stage bad failed" and ended == {"good", "after"}


def test_a_stage_waits_for_what_it_needs_and_for_cores(run):
    log, error = run(
        [stage("a"), stage("b"), stage("c", "a", "b"), stage("wide", threads=2)], lambda name: time.sleep(0.1), 2
    )
    assert error is None and log.index("c starts") > max(log.index("a ends"), log.index("b ends"))
    at = log.index("wide starts")
    assert log[at + 1] == "wide ends"


@pytest.mark.parametrize(
    "params, cores",
    [
        (dict(threads=1, device="cpu"), 1),
        (dict(threads=8, device="cpu"), 4),
        (dict(threads=0, device="cpu"), 4),
        (dict(threads=1, device="cuda"), 1),  # small networks share a GPU
        ({}, 1),
    ],
)
def test_a_stage_takes_the_cores_that_it_says(params, cores):
    assert pipeline.cores_of(stage("s", **params), 4) == cores


@pytest.mark.parametrize("cores, threads", [(None, {"a": 8, "b": 0}), (2, {"a": 2, "b": 2}), (9, {"a": 8, "b": 9})])
def test_no_stage_gets_more_threads_than_the_cores_that_were_given(cores, threads, tmp_path, monkeypatch):
    got = {}

    def execute(s, parameters, folder, root):
        got[s.name] = parameters.get("threads", "its own")
        (folder / "record.json").write_text("{}", encoding="utf-8")

    some = {s.name: s for s in (stage("a", threads=8), stage("b", threads=0), stage("c"))}
    monkeypatch.setattr(pipeline, "execute", execute)
    monkeypatch.setattr(pipeline, "_stamp", lambda *_: dict(seconds=0, outputs={"record.json": {}}))
    monkeypatch.setattr(pipeline, "why_run", lambda s, runs, keep=False: "test")
    monkeypatch.setattr(pipeline, "stage_key", lambda s, runs: dict(params=s.params))
    monkeypatch.setattr(pipeline, "load_profile", lambda root, name: some)
    pipeline.run_profile(tmp_path, "p", runs=tmp_path, cores=cores)
    assert got == threads | {"c": "its own"}
    key = json.loads((tmp_path / "p/a/key.json").read_text(encoding="utf-8"))
    assert key == dict(params=dict(threads=8))


def test_fresh_means_what_was_asked_for_not_what_that_needs(run):
    some = [stage("a"), replace(stage("b", "a"), group="g"), replace(stage("c", "b"), group="g")]
    for asked, afresh in (({}, "abc"), (dict(stage="c"), "c"), (dict(group="g"), "bc")):
        log, _ = run(some, lambda name: None, 1, fresh=True, **asked)
        assert [line[0] for line in log if "afresh" in line] == list(afresh)


def test_the_seconds_of_a_stage_are_those_of_all_its_sessions(tmp_path, monkeypatch):
    def killed(s, parameters, folder, root):
        (folder / "state").mkdir(exist_ok=True)
        (folder / "state/step.safetensors").touch()
        later = (folder / ".began").stat().st_mtime + 100
        os.utime(folder / "state/step.safetensors", (later, later))
        raise KeyboardInterrupt

    def ends(s, parameters, folder, root):
        (folder / "record.txt").touch()

    monkeypatch.setattr(pipeline, "provenance", dict)
    for execute in (killed, killed):
        monkeypatch.setattr(pipeline, "execute", execute)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run_stage(stage("s"), dict(code="a"), tmp_path, tmp_path)
    monkeypatch.setattr(pipeline, "execute", ends)
    stamp = pipeline.run_stage(stage("s"), dict(code="a"), tmp_path, tmp_path)
    assert 200 <= stamp["seconds"] < 220 and set(stamp["outputs"]) == {"record.txt"}
    stamp = pipeline.run_stage(stage("s"), dict(code="b"), tmp_path, tmp_path)
    assert stamp["seconds"] < 20  # another key is another result


def test_every_failure_is_said(run, capsys):
    def work(name):
        time.sleep(0.2 * (name == "b"))
        raise pipeline.StageError(f"stage {name} failed: reason {name}")

    _, error = run([stage("a", threads=1), stage("b", threads=1)], work, 2)
    said = capsys.readouterr()
    assert "reason a" in error and "reason b" in said.out + said.err


def test_a_stage_that_another_process_runs_is_left_to_it(tmp_path):
    with FileLock(tmp_path / ".a.lock"):
        with pytest.raises(pipeline.StageError, match="stage a is being run by another process"):
            pipeline.run_stage(stage("a"), {}, tmp_path, tmp_path)
    assert not (tmp_path / "a").exists()


def test_a_half_finished_stage_survives_a_start_that_cannot_write(tmp_path, monkeypatch):
    folder, key = tmp_path / "a", dict(code="x")
    pipeline._prepare_folder(folder, key, fresh=False)
    (folder / "state").mkdir()

    def full(self, text):
        self.open("w").close()  # truncated, then no space
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        pipeline._prepare_folder(folder, key, fresh=False)
    pipeline._prepare_folder(folder, key, fresh=False)
    assert (folder / "state").is_dir()
    pipeline._prepare_folder(folder, dict(code="y"), fresh=False)
    assert not (folder / "state").exists()


@pytest.mark.parametrize(
    "gone, keep, draws, up_to_date",
    [
        ("student.safetensors", False, False, False),
        ("student.safetensors", True, False, True),  # weights stay on the machine that trained
        ("record.json", True, False, False),
        ("figure.png", True, True, False),  # a figure is drawn anew
    ],
)
def test_records_that_were_brought_from_another_machine_count(tmp_path, monkeypatch, gone, keep, draws, up_to_date):
    s = Stage("s", Path("x.ipynb"), rows={"a": "b"} if draws else {})
    assert s.draws == draws
    monkeypatch.setattr(stages, "stage_key", lambda *_: dict(code={}, params={}, rows={}, inputs={}))
    monkeypatch.setattr(stages, "declared_parameters", lambda _: {})
    folder = tmp_path / "s"
    folder.mkdir()
    for name in ("record.json", gone):
        (folder / name).write_text("1")
    stamp = dict(key=stages.stage_key(), outputs=stages.stage_outputs(folder), seconds=1.0)
    (folder / "stamp.json").write_text(json.dumps(stamp))
    assert stages.why_run(s, tmp_path, keep) == ""
    (folder / gone).unlink()
    assert (stages.why_run(s, tmp_path, keep) == "") == up_to_date
