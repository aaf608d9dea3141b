"""What is wrong is said in one line, with exit code 2: prices, profiles, manifests, launched notebooks, options that exclude each other."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from conftest import ROOT
from get_nb.lab import cli, launch
from get_nb.lab.core import ConfigError
from get_nb.lab.core import FileError
from get_nb.lab.measured import measured_rates
from get_nb.lab.parameters import check_parameters, code_cells, declared_parameters
from get_nb.lab.profiles import WIRING, load_profile, select_stages

PAPER = ROOT / "nbs/paper"


@pytest.fixture
def said(capsys):
    "Run a command in this process, which must end with exit code 2 and one line; -> the line."

    def run(main, *args):
        with pytest.raises(SystemExit) as e:
            main([str(a) for a in args])
        out = capsys.readouterr()
        assert e.value.code == 2 and out.err.count("\n") == 1 and not out.out, out.err
        return out.err

    return run


@pytest.mark.parametrize(
    "given, hint",
    [
        ("gpus=3", "unknown key 'gpus'"),
        ("record=1", "unknown key 'record'"),
        ("training=0", "training = 0.0"),
        ("peak=inf", "peak = inf"),
        ("peak=nan", "peak = nan"),
        ("peak=1e-320", "greater than"),
        ("samples=1e400", "samples = inf"),
        ("samples=1e300", "less than"),
        ("samples=1.5", "samples = 1.5"),
        ("half_batch=inf", "half_batch = inf"),
    ],
)
def test_an_assumption_that_makes_no_sense(said, given, hint):
    assert hint in said(cli.main, "price", "--set", given)


@pytest.mark.parametrize(
    "text",
    [
        '{"device": "cuda"}',
        "[]",
        "5",
        "null",
        "{",
        "\xff",
        '{"device": "cuda", "rows": [5], "peaks": {"bf16": 1}}',
        '{"device": "cuda", "rows": [], "peaks": 5}',
    ],
)
def test_a_file_that_is_no_record_of_a_benchmark(said, tmp_path, text):
    (tmp_path / "r.json").write_bytes(text.encode("latin-1"))
    assert "not a record of get-nb bench" in said(cli.main, "price", "--record", tmp_path / "r.json")


def test_a_price_says_what_does_not_fit():
    from get_nb.lab.price import price_paper

    assert "Does not fit into 20 GB per GPU: train GET-B/2," in price_paper(
        (1,), memory=2e10
    ) and "not fit" not in price_paper((1, 8))


@pytest.mark.parametrize(
    "text, hint",
    [
        ("stages: {a: 5}", "stages.a = 5"),
        ("stages: {1: {}}", "as 1, which is no text"),
        ("stages: {}", "at least 1"),
        ("stages: {teacher: {each: 5}}", "each = 5"),
        ("stages: {teacher: {each: {a: []}}}", "each.a"),
        ("stages: {teacher: {params: [1]}}", "params = [1]"),
        ("stages: {pairs: {inputs: [a]}}", "inputs = ['a']"),
        ("stages: {pairs: {inputs: {teacher: 5}}}", "inputs.teacher = 5"),
        ("stages: {table_one_step: {rows: {a: 5}}}", "rows.a = 5: needs a stage"),
        ("stages: {table_one_step: {rows: {a: {b: [5]}}}}", "needs a stage, a list of stages, or {use"),
        ("stages: {teacher: {group: [1]}}", "group = [1]"),
        ("{defaults: [seed], stages: {teacher: }}", "defaults = ['seed']"),
        ("stages: {teacher: {notebook: 5}}", "notebook = 5"),
        ("stages: {teacher: {5: 6}}", "stages.teacher.5"),
        ("stages: [teacher]", "needs a mapping"),
        ("stages: {teacher: {params: {out: 2020-13-45}}}", "not yaml"),
        ("about: \xff", "not yaml"),
        ("stages: {teacher: {each: {a: [1, 2]}}}", "two stages are named 'teacher'"),
        (
            "stages: {t_1: {notebook: teacher}, 't_{a}': {notebook: teacher, each: {a: [1]}}}",
            "two stages are named 't_1'",
        ),
        ("stages: {teacher: {params: {steps: 1e3}}}", "write 1000"),
        ("stages: {teacher: {params: {lr: 1e-5}}}", "write 1.0e-05"),
    ],
)
def test_a_profile_of_the_wrong_shape(said, tmp_path, text, hint):
    (tmp_path / "p.yaml").write_bytes(text.encode("latin-1"))
    line = said(cli.main, "stages", "--root", ROOT, "--profile", tmp_path / "p.yaml")
    assert hint in line and (not hint.startswith("write") or line.rstrip().endswith(hint))


@pytest.mark.parametrize("name, text", [("steps", "1e3"), ("lr", "1e-3"), ("lr", "1e-5"), ("lr", "1e3")])
def test_a_hint_about_yaml_is_accepted_when_followed(name, text):
    declared = declared_parameters(PAPER / "student.ipynb")
    with pytest.raises(ConfigError) as e:
        check_parameters("demo", declared, {name: yaml.safe_load(text)})
    follow = str(e.value).split("write ")[1]
    assert check_parameters("demo", declared, {name: yaml.safe_load(follow)})[name] == float(text)


@pytest.mark.parametrize("name, text", [("steps", "-1e3"), ("lr", "inf"), ("steps", "1.5e0"), ("steps", "many")])
def test_no_hint_where_no_number_would_do(name, text):
    with pytest.raises(ConfigError) as e:
        check_parameters("demo", declared_parameters(PAPER / "student.ipynb"), {name: text})
    assert "write" not in str(e.value)


@pytest.fixture
def clone(tmp_path):
    "A clone with one profile and nothing published."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").touch()
    shutil.copytree(PAPER, tmp_path / "nbs/paper")
    (tmp_path / "results/smoke").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"stages": 5}', '{"stages": {"teacher": 5}}', '{"stages": {"teacher": {}}}']
)
def test_a_damaged_manifest(said, clone, text):
    (clone / "results/smoke/manifest.json").write_text(text, encoding="utf-8")
    assert "damaged manifest" in said(cli.main, "stages", "--root", clone, "--profile", "smoke")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"train_tflop": "a", "seconds": 1, "provenance": 5}'])
def test_a_damaged_published_record(tmp_path, text):
    (tmp_path / "cpu/records/get").mkdir(parents=True)
    (tmp_path / "cpu/records/get/record.json").write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match="damaged record"):
        measured_rates(tmp_path)


@pytest.mark.parametrize(
    "notebook, given, hint",
    [
        ("teacher", ["steps={a"], "is not yaml"),
        ("teacher", ["out=/proc/x"], "cannot write to /proc/x"),
        ("teacher", ["lr=1e-3"], "write 0.001"),
        ("teacher", ["steps=1e3"], "write 1000"),
        ("evaluate", ["inputs={model: nowhere, classifier: nowhere}"], "not in its inputs"),
        ("evaluate", ["inputs={modle: x}"], "did you mean 'model'"),
        ("student", ["inputs={pair: x}"], "did you mean 'pairs'"),
        ("student", ["inputs={pairs: 5}"], "needs the name of a folder"),
        ("student", ["inputs={pairs: nowhere}"], "nowhere"),
        ("kd", ["inputs={pairs: nowhere}"], "nowhere"),
        ("pairs", ["inputs={teacher: nowhere}"], "nowhere"),
    ],
)
def test_a_launched_notebook_with_wrong_parameters(said, tmp_path, monkeypatch, notebook, given, hint):
    monkeypatch.chdir(ROOT)
    out = [] if given[0].startswith("out") else [f"out={tmp_path / 'out'}"]
    assert hint in said(launch.launch_main, PAPER / f"{notebook}.ipynb", *out, *given)


@pytest.mark.parametrize(
    "other", [["--stage", "teacher"], ["--group", "a"], ["--fresh"], ["--keep"], ["--dry-run"], ["--cores", "2"]]
)
def test_redraw_goes_with_nothing_that_chooses_stages(said, other):
    assert f"not with {other[0]}" in said(cli.main, "reproduce", "--root", ROOT, "--redraw", *other)


@pytest.mark.parametrize("other", [["--group", "a"], ["--keep"]])
def test_what_is_redrawn_is_published_as_a_whole(said, other):
    assert f"not with {other[0]}" in said(cli.main, "publish", "--root", ROOT, "--redrawn", *other)


def test_nothing_is_published_before_it_is_redrawn(said, tmp_path):
    line = said(cli.main, "publish", "--root", ROOT, "--profile", "cpu", "--redrawn", "--runs", tmp_path)
    assert "is not redrawn (not run yet)" in line and "--redraw" in line


@pytest.mark.parametrize("command", ["stages", "reproduce"])
def test_a_stage_or_a_group(said, command):
    assert "choose one of the two" in said(
        cli.main, command, "--root", ROOT, "--stage", "teacher", "--group", "students"
    )


@pytest.mark.parametrize("stage", [None, "pairs"])
def test_a_dry_run_says_what_fresh_would_run(monkeypatch, capsys, tmp_path, stage):
    monkeypatch.setattr(cli, "why_run", lambda *a: "")
    cli._list_stages(cli._stage_states(ROOT, "smoke", stage, None, tmp_path, False, fresh=True))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["pairs"].endswith("asked for") and ("asked for" in lines["teacher"]) == (stage is None)


def test_every_task_of_the_benchmark_can_be_asked_for():
    from typing import get_args, get_type_hints
    from get_nb.lab.bench import BenchConfig

    option = next(p for p in cli.cli.commands["bench"].params if p.name == "tasks")
    assert tuple(option.type.choices) == get_args(get_args(get_type_hints(BenchConfig)["tasks"])[0])


@pytest.mark.parametrize("path", sorted((PAPER / "profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_profile_has_the_right_shape(path):
    assert load_profile(ROOT, path.stem)


@pytest.mark.parametrize("path", sorted((PAPER / "profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_no_parameter_of_a_profile_names_another_stage(path):
    stages, named = load_profile(ROOT, path.stem), []
    for s in stages.values():
        declared = declared_parameters(s.notebook)
        texts = {k: v for k, v in s.params.items() if declared[k][0] in (str, list, dict) and k not in WIRING}
        others = stages.keys() - {s.name, *s.inputs.values()}  # features: classifier is of the input of that name
        named += [(s.name, k) for k, v in texts.items() for leaf in _texts(v) if leaf in others]
    assert not named  # --stage would not run it first, and a change of it would go unnoticed


def _texts(value):
    if isinstance(value, dict | list):
        return [t for part in (value.values() if isinstance(value, dict) else value) for t in _texts(part)]
    return [value]


DRAWING = [p for p in sorted(PAPER.glob("*.ipynb")) if "rows" in declared_parameters(p)]


@pytest.mark.parametrize("path", DRAWING, ids=lambda p: p.stem)
def test_a_page_that_draws_reads_no_records_but_those_of_its_rows(path):
    others = (
        declared_parameters(path).keys() - WIRING - {"features", "clothes"}
    )  # which distances; what another profile has published
    calls = [n for cell in code_cells(path) for n in ast.walk(ast.parse(cell)) if isinstance(n, ast.Call)]
    opened = [n for n in calls if ast.unparse(n.func) in ("read_record", "read_rows")]
    assert opened
    assert not others & {n.id for call in opened for n in ast.walk(call) if isinstance(n, ast.Name)}


def test_a_figure_alone_is_drawn_after_all_that_it_shows():
    wanted = select_stages(load_profile(ROOT, "smoke"), stage="figure_quality_compute")
    assert {"evaluate_teacher", "teacher", "kd", "pairs"} <= wanted.keys()


def test_doctor_outside_a_clone_says_so_and_lists_the_rest(tmp_path):
    command = [sys.executable, "-c", "from get_nb.lab.cli import main; main()", "doctor"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT))
    )
    assert done.returncode == 1 and not done.stderr
    assert "MISSING clone: no get_nb clone at" in done.stdout and "packages: " in done.stdout
