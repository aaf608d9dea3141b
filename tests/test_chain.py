"""The chain: complete, repeatable, resumable after kill -9, publishable, redrawable."""

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest

from conftest import COMMAND, ROOT, get_nb, traced_cells, until
from get_nb.lab.publishing import compare_table
from get_nb.lab.profiles import demo_clone, load_profile
from get_nb.lab.stages import code_hashes, imported_modules, read_stamp, stage_key, stage_outputs

STAGES = load_profile(ROOT, "smoke")


def tables(runs):
    return {
        p.stem: json.loads(p.read_text(encoding="utf-8"))
        for p in sorted((runs / "smoke").glob("table_*/*.json"))
        if p.name != "stamp.json" and p.name != "key.json"
    }


def test_every_stage_leaves_a_stamp_a_page_and_its_products(smoke):
    runs, printed = smoke
    for name, stage in STAGES.items():
        folder = runs / "smoke" / name
        stamp = json.loads((folder / "stamp.json").read_text(encoding="utf-8"))
        assert {"key", "outputs", "seconds", "packages", "hardware", "seed"} <= stamp.keys()
        assert "</html>" in (folder / "notebook.html").read_text(encoding="utf-8")
        assert not (folder / "state").exists() and not (folder / "progress.json").exists()
        wanted = (
            {f"{name}.json"} | ({f"{name}.md"} if name.startswith("table") else {f"{name}.png", f"{name}.svg"})
            if stage.draws
            else {"record.json"}
        )
        assert wanted <= stamp["outputs"].keys(), name
    assert "table_2_conditional: " in printed and "table_3_get_vs_vit: " in printed


def test_each_number_of_a_table_is_the_one_in_the_records_it_names(smoke):
    runs, _ = smoke
    checked, with_seeds = 0, 0
    for table in tables(runs).values():
        for key, cell, recorded in traced_cells(table, runs / "smoke"):
            assert cell["value"] == pytest.approx(recorded), (key, cell)
            checked, with_seeds = checked + 1, with_seeds + (len(cell["source"]) > 1)
    assert checked > 50 and with_seeds > 5


def test_a_second_run_runs_nothing(smoke):
    runs, _ = smoke
    began = time.time()
    done = get_nb("reproduce", "--profile", "smoke", "--runs", runs)
    assert done.returncode == 0 and done.stdout.count(": up to date") == len(STAGES) and "running" not in done.stdout
    print(f"checked {len(STAGES)} stages in {time.time() - began:.1f} s")


def test_a_missing_output_runs_its_stage_again_and_nothing_that_does_not_change(smoke, tmp_path):
    runs = shutil.copytree(smoke[0], tmp_path / "runs")
    (runs / "smoke/get/student.safetensors").unlink()
    done = get_nb("reproduce", "--profile", "smoke", "--runs", runs, "--stage", "evaluate_get")
    assert done.returncode == 0, done.stderr
    assert "get: running (output student.safetensors is gone or changed)" in done.stdout
    assert "evaluate_get: up to date" in done.stdout  # the student came out the same, bit for bit


def children(process):
    "The pids of a process's children: the kernels of its stages."
    lines = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if int(line.split()[1]) == process.pid]


def running(pid):
    "Is there such a process, and has it not ended?"
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_when(args, ready):
    "Start the command in its own process group; kill -9 all of it as soon as ready() is true."
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    until(ready, process)
    for pid in [process.pid, *children(process)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "stage, sign",
    [
        ("teacher", "state/step-*.safetensors"),
        ("pairs", "pairs-00000.safetensors"),
        ("get", "state/step-*.safetensors"),
    ],
)
def test_kill_9_goes_on_where_it_was_and_ends_the_same(smoke, tmp_path, stage, sign):
    runs = shutil.copytree(smoke[0], tmp_path / "runs")
    folder = runs / "smoke" / stage
    before = {f: v["sha256"] for f, v in stage_outputs(folder).items()}
    shutil.rmtree(folder)
    kill_when(["reproduce", "--profile", "smoke", "--runs", runs, "--stage", stage], lambda: any(folder.glob(sign)))
    assert not (folder / "stamp.json").exists()
    kept = next(folder.glob(sign)).stat().st_mtime_ns
    done = get_nb("reproduce", "--profile", "smoke", "--runs", runs)
    assert done.returncode == 0, done.stderr
    assert f"{stage}: running (never finished)" in done.stdout
    after = {f: v["sha256"] for f, v in stage_outputs(folder).items()}
    assert {f: h for f, h in after.items() if not f.startswith("record")} == {
        f: h for f, h in before.items() if not f.startswith("record")
    }
    if stage == "pairs":
        assert (folder / sign).stat().st_mtime_ns == kept  # a finished shard is not touched
    else:
        assert json.loads((folder / "record.json").read_text(encoding="utf-8"))[
            "resumed_at"
        ]  # it did go on from a checkpoint
    for name, table in tables(runs).items():
        assert compare_table(table, tables(smoke[0])[name]) == "identical (timing apart)"


def test_a_kernel_that_dies_is_one_line_and_the_run_goes_on_from_there(smoke, tmp_path):
    runs = shutil.copytree(smoke[0], tmp_path / "runs")
    folder = runs / "smoke/teacher"
    shutil.rmtree(folder)
    process = subprocess.Popen(
        [*COMMAND, "reproduce", "--profile", "smoke", "--runs", str(runs), "--stage", "teacher"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    until(lambda: any(folder.glob("state/step-*.safetensors")), process)
    for pid in children(process):
        os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode == 1
        and "stage teacher failed: its kernel died" in err.splitlines()[-1]
        and "Traceback" not in err
    )
    assert get_nb("reproduce", "--profile", "smoke", "--runs", runs, "--stage", "teacher").returncode == 0


@pytest.fixture(scope="module")
def clone(smoke, tmp_path_factory):
    "A clone that has published the smoke chain."
    clone = tmp_path_factory.mktemp("clone")
    shutil.copy(ROOT / "settings.ini", clone)
    shutil.copytree(ROOT / "nbs", clone / "nbs")
    done = get_nb("publish", "--root", clone, "--profile", "smoke", "--runs", smoke[0])
    assert done.returncode == 0, done.stderr
    return clone


@pytest.fixture(scope="module")
def redrawn(clone, tmp_path_factory):
    "Folder of runs with everything drawn again, after the code that made two records changed; and what was printed."
    runs, notebook = tmp_path_factory.mktemp("redrawn"), clone / "nbs/paper/student.ipynb"
    notebook.write_text(
        notebook.read_text(encoding="utf-8").replace('\\"student\\")', '\\"pupil\\")', 1), encoding="utf-8"
    )
    done = get_nb("reproduce", "--root", clone, "--profile", "smoke", "--redraw", "--runs", runs)
    assert done.returncode == 0, done.stderr
    return runs, done.stdout


def published_files(clone):
    "Every published file but the manifest -> its bytes."
    results = clone / "results/smoke"
    files = {p.relative_to(results).as_posix(): p.read_bytes() for p in results.rglob("*") if p.is_file()}
    del files["manifest.json"]
    return files


def manifest(clone):
    return json.loads((clone / "results/smoke/manifest.json").read_text(encoding="utf-8"))["stages"]


def test_the_manifest_lists_what_is_published_and_no_weights_are(clone):
    files = published_files(clone)
    listed = {f: h for s in manifest(clone).values() for f, h in s["files"].items()}
    assert listed == {f: hashlib.sha256(content).hexdigest() for f, content in files.items()}
    assert not any(f.endswith(".safetensors") for f in files)


def test_the_executed_page_of_all_that_draws_is_published_and_names_no_place_or_time(clone, smoke):
    for name, stage in STAGES.items():
        path = clone / f"results/smoke/pages/{name}.ipynb"
        assert path.is_file() == stage.draws, name
        if not stage.draws:
            continue
        page = nbformat.read(path, 4)
        nbformat.validate(page)
        code = [c for c in page.cells if c.cell_type == "code"]
        assert any(o.output_type != "stream" for c in code for o in c.outputs), f"{name}: nothing to see"
        assert all(c.execution_count is None for c in code) and page.metadata.keys() == {"kernelspec"}
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in (str(smoke[0]), str(ROOT), "/home/", "papermill", "duration"))
        assert 'records = "results/smoke/records"' in "\n".join(c.source for c in code)
        assert path.stat().st_size < 300_000


def test_what_is_published_can_be_drawn_again_without_the_runs(clone, redrawn, smoke):
    runs, printed = redrawn
    assert "record of get: made by older code (notebook changed since)" in printed
    assert "record of teacher" not in printed
    assert printed.count("identical (timing apart)") == len(tables(smoke[0]))
    figure = runs / "smoke-redrawn/figure_same_noise/figure_same_noise.png"
    assert figure.read_bytes() == (clone / "results/smoke/figures/figure_same_noise.png").read_bytes()


def test_what_is_redrawn_from_the_same_records_is_published_to_the_same_bytes(clone, redrawn):
    before, stages = published_files(clone), manifest(clone)
    for page in (clone / "results/smoke/pages").iterdir():
        page.unlink()
    done = get_nb("publish", "--root", clone, "--profile", "smoke", "--redrawn", "--runs", redrawn[0])
    assert done.returncode == 0, done.stderr
    assert published_files(clone) == before
    after = manifest(clone)
    assert after.keys() == stages.keys() and all(after[n]["key"] == m["key"] for n, m in stages.items())


def test_what_has_changed_since_it_was_redrawn_is_not_published(clone, redrawn, tmp_path):
    copy = shutil.copytree(clone, tmp_path / "clone")
    record = copy / "results/smoke/records/evaluate_get/record.json"
    record.write_text(record.read_text(encoding="utf-8").replace("{", "{ ", 1), encoding="utf-8")
    before = published_files(copy)
    done = get_nb("publish", "--root", copy, "--profile", "smoke", "--redrawn", "--runs", redrawn[0])
    assert done.returncode == 2 and "is not redrawn (inputs changed: evaluate_get/record.json)" in done.stderr
    assert published_files(copy) == before


def test_publishing_refuses_what_is_not_up_to_date(smoke, tmp_path):
    runs = shutil.copytree(smoke[0], tmp_path / "runs")
    (runs / "smoke/get/record.json").unlink()
    done = get_nb("publish", "--profile", "smoke", "--runs", runs)
    assert (
        done.returncode == 2 and "stage get is not up to date" in done.stderr and not (ROOT / "results/smoke").exists()
    )


def test_sample_and_evaluate_work_on_the_chain_s_checkpoints(smoke, tmp_path):
    runs = smoke[0] / "smoke"
    done = get_nb("sample", runs / "get/student.safetensors", "--n", 4, "--label", 3, "--out", tmp_path / "s.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "s.npz") as f:
        assert f["images"].shape == (4, 1, 8, 8) and f["labels"].tolist() == [3] * 4
    done = get_nb(
        "evaluate",
        runs / "vit/student.safetensors",
        "--classifier",
        runs / "classifier/classifier.safetensors",
        "--n",
        200,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["fd"] > 0


def test_ctrl_c_ends_at_once_and_leaves_no_kernel(tmp_path):
    root = demo_clone(tmp_path)
    notebook = root / "nbs/paper/square.ipynb"
    notebook.write_text(
        notebook.read_text(encoding="utf-8").replace("i * i", "__import__('time').sleep(600)", 1), encoding="utf-8"
    )
    process = subprocess.Popen(
        [*COMMAND, "reproduce", "--profile", "demo", "--root", str(root)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
    )
    while "running" not in process.stdout.readline():
        assert process.poll() is None
    until(lambda: children(process), process)
    (kernel,) = children(process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err and time.monotonic() - began < 10
    until(lambda: not running(kernel), seconds=10)
    assert not (root / "runs/demo/square_3/stamp.json").exists()


@pytest.mark.parametrize(
    "code",
    [
        "from get_nb import create_model",
        "from get_nb import *",
        "import get_nb\nget_nb.create_model('GET-B/2')",
        "from get_nb.lab.checkpoints import create_model",
        "from get_nb.lab import checkpoints",
        "import get_nb.lab.checkpoints as c",
    ],
)
def test_a_stage_depends_on_the_module_of_a_name_however_it_is_imported(code, tmp_path):
    (tmp_path / "n.ipynb").write_text(
        json.dumps(dict(cells=[dict(cell_type="code", metadata={}, source=code)])), encoding="utf-8"
    )
    used = code_hashes(tmp_path / "n.ipynb").keys()
    assert {"notebook", "lab.checkpoints", "lab.core", "layers", "solvers"} <= used


@pytest.mark.parametrize(
    "code",
    [
        "import get_nb as g\ng.create_model('GET-B/2')",
        "import get_nb.lab as lab\nlab.checkpoints.create_model('GET-B/2')",
        "from get_nb import lab as rooms\nrooms.checkpoints.create_model('GET-B/2')",
        "import get_nb.lab.checkpoints as c\nc.create_model('GET-B/2')",
        "import get_nb.lab\nget_nb.lab.checkpoints.create_model('GET-B/2')",
    ],
)
def test_a_module_is_found_whatever_the_code_calls_it(code):
    assert "lab.checkpoints" in imported_modules(code)


def test_pictures_behind_a_linked_class_folder_count(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "elsewhere/1.png").write_bytes(b"a picture")
    (tmp_path / "pictures/class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pictures/nowhere").symlink_to(tmp_path / "gone")
    stage = replace(STAGES["classifier"], params=dict(data=f"folder:{tmp_path}/pictures@8"))
    before = stage_key(stage, tmp_path)["inputs"]
    (tmp_path / "elsewhere/1.png").write_bytes(b"another picture")
    assert before["content of data"] != stage_key(stage, tmp_path)["inputs"]["content of data"]


def test_a_link_to_nowhere_is_no_output(tmp_path):
    (tmp_path / "weights").symlink_to(tmp_path / "gone")
    assert stage_outputs(tmp_path) == {}


def test_a_stamp_without_its_seconds_is_damaged(tmp_path, capsys):
    (tmp_path / "stamp.json").write_text('{"key": {}, "outputs": {}}', encoding="utf-8")
    assert read_stamp(tmp_path) is None and "damaged stamp" in capsys.readouterr().out


def test_every_name_of_the_package_leads_to_its_module():
    names = ast.parse((ROOT / "get_nb/__init__.pyi").read_text(encoding="utf-8"))
    for n in names.body:
        if isinstance(n, ast.ImportFrom):
            for a in n.names:
                assert imported_modules(f"from get_nb import {a.name}") == {n.module}
