"""Kills, flips and cuts over teacher, pairs, students and a run of two processes; writes results/soak/*.json. Run by `make soak`."""

import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
import toy  # noqa: E402
from get_nb.lab.core import FileError  # noqa: E402
from get_nb.lab.files import load_tensors  # noqa: E402
from get_nb.lab.generation import generate_pairs  # noqa: E402
from get_nb.lab.manifest import read_pairs_manifest  # noqa: E402
from get_nb.lab.store import PairDataset, verify_pairs  # noqa: E402
from get_nb.pairs import PairsConfig  # noqa: E402
from get_nb.lab.state import checkpoints  # noqa: E402

SEED = int(os.environ.get("SOAK_SEED", 0))
KILLS = int(os.environ.get("SOAK_KILLS", 25))  # over teacher, pairs and student
KILLS_TWO = int(os.environ.get("SOAK_KILLS_TWO", 10))  # of the run of two processes
FLIPS = int(os.environ.get("SOAK_FLIPS", 1000))
CUTS = int(os.environ.get("SOAK_CUTS", 100))
ENV = dict(
    os.environ,
    OMP_NUM_THREADS="1",
    GET_NB_PROGRESS="off",
    PYTHONPATH=os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
)
PAPER = ROOT / "nbs/paper"


def report(name, **values):
    "Keep what was measured, where it is committed."
    out = Path(os.environ.get("SOAK_OUT", ROOT / "results/soak"))
    out.mkdir(parents=True, exist_ok=True)
    values |= dict(seed=SEED, python=platform.python_version(), torch=torch.__version__, cores=os.cpu_count())
    (out / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(values))


def stage(runs, name, processes=1):
    "Command that runs one stage's notebook, small, in the folder `runs`."
    params = dict(
        teacher=["steps=60", "batch_size=32", "checkpoint_every=5"],
        pairs=["n=400", "num_steps=4", "shard_size=20", "batch_size=10", f"inputs={{teacher: {runs}/teacher}}"],
        student=["steps=60", "batch_size=32", "checkpoint_every=5", f"inputs={{pairs: {runs}/pairs}}"],
    )[name]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    return [
        sys.executable,
        *launcher,
        "-m",
        "get_nb.lab.launch",
        str(PAPER / f"{name}.ipynb"),
        f"out={runs}/{name}",
        "threads=1",
        "device=cpu",
        *params,
    ]


def run(command):
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def family(pid):
    "A process and all that descend from it (torchrun puts its workers into sessions of their own)."
    table = [
        tuple(map(int, line.split()))
        for line in subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()
    ]
    found = [pid]
    for parent in found:
        found += [child for child, of in table if of == parent]
    return found


def kill(command, wait):
    "Start, wait, kill -9 it and all that it started; -> was it still running?"
    process = subprocess.Popen(command, env=ENV, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(wait)
        return False
    except subprocess.TimeoutExpired:
        for pid in family(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        return True


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).glob("*.safetensors"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "Teacher, pairs and student, run through; how long each took."
    runs, took = tmp_path_factory.mktemp("undisturbed"), {}
    for name in ("teacher", "pairs", "student"):
        began = time.time()
        run(stage(runs, name))
        took[name] = time.time() - began
    return runs, took


def test_kills_over_teacher_pairs_and_student_change_no_bit(undisturbed, tmp_path):
    runs, took = undisturbed[0], dict(undisturbed[1])
    rng, landed, began = random.Random(SEED), dict(teacher=0, pairs=0, student=0), time.time()
    for k, name in enumerate(landed):
        for earlier in list(landed)[:k]:
            if not (tmp_path / earlier).exists():
                shutil.copytree(runs / earlier, tmp_path / earlier)
        while landed[name] < KILLS // 3 + (k < KILLS % 3):
            if kill(stage(tmp_path, name), rng.uniform(0.3, 1.0) * took[name]):
                landed[name] += 1
            else:
                shutil.rmtree(tmp_path / name)  # it came to its end first: from the start again
                took[name] *= 0.8
        run(stage(tmp_path, name))
        ours, wanted = contents(tmp_path / name), contents(runs / name)
        assert ours.keys() == wanted.keys()
        for f in ours:
            a, b = load_tensors(tmp_path / name / f)[0], load_tensors(runs / name / f)[0]
            assert all(torch.equal(a[t], b[t]) for t in a), f
    report("kills", asked=KILLS, landed=landed, same_bits=True, seconds=round(time.time() - began))


def test_kills_of_a_run_of_two_processes_leave_it_within_rounding(undisturbed, tmp_path):
    runs, took = undisturbed
    rng, landed, began = random.Random(SEED + 1), 0, time.time()
    longest = 1.5 * took["teacher"]
    while landed < KILLS_TWO:
        if kill(stage(tmp_path, "teacher", processes=2), rng.uniform(0.3, 1.0) * longest):
            landed += 1
        else:
            shutil.rmtree(tmp_path / "teacher")
            longest *= 0.8
    run(stage(tmp_path, "teacher", processes=2))
    a, b = (load_tensors(f / "teacher/teacher.safetensors")[0] for f in (tmp_path, runs))
    largest = max((a[k] - b[k]).abs().max().item() for k in a)
    assert largest < 1e-4
    report(
        "kills_two_processes",
        asked=KILLS_TWO,
        landed=landed,
        largest_difference_of_a_weight=largest,
        seconds=round(time.time() - began),
    )


def test_flips_and_cuts_of_shards_and_checkpoints_are_found_and_only_those_made_again(tmp_path):
    rng, began, found = random.Random(SEED + 2), time.time(), dict(flips=0, cuts=0)
    toy.make(tmp_path / "pairs")
    toy.fit(tmp_path / "state")
    files = sorted((tmp_path / "pairs").glob("pairs-*")) + checkpoints(tmp_path / "state")
    original = contents(tmp_path / "pairs")
    for i in range(FLIPS + CUTS):
        path, what = rng.choice(files), "flips" if i < FLIPS else "cuts"
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad if what == "flips" else good[: rng.randrange(len(good))])
        if path.parent.name == "pairs":
            assert [w.split(": ")[0] for w in verify_pairs(path.parent)] == [str(path)]
            times = {p.name: p.stat().st_mtime_ns for p in path.parent.glob("pairs-*")}
            if i % 20 == 0:
                toy.make(path.parent)
                assert [n for n, t in times.items() if (path.parent / n).stat().st_mtime_ns != t] == [path.name]
                assert contents(path.parent) == original
        else:
            with pytest.raises(FileError, match=path.name):
                load_tensors(path)
        path.write_bytes(good)
        found[what] += 1
    report(
        "flips_and_cuts",
        asked=dict(flips=FLIPS, cuts=CUTS),
        found=found,
        files=len(files),
        seconds=round(time.time() - began),
    )


class Free(torch.nn.Module):
    "A denoiser that costs nothing: what is measured is the writing."

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, sigma, labels=None):
        return x * 0.1


def memory():
    "Anonymous memory of this process, MB (what a file lends to the page cache is not counted)."
    return next(
        int(line.split()[1]) // 1024
        for line in open("/proc/self/status", encoding="utf-8")
        if line.startswith("RssAnon")
    )


def test_reading_speed_and_memory_are_measured(tmp_path):
    n, pairs, rng = int(os.environ.get("SOAK_PAIRS", 1_000_000)), 20_000, np.random.default_rng(0)
    generate_pairs(
        Free(), tmp_path / "cifar", PairsConfig(n=pairs, num_classes=10, shape=(3, 32, 32), num_steps=1, teacher="free")
    )
    data, speeds = PairDataset(tmp_path / "cifar"), []
    for _ in range(5):
        batches = [rng.integers(0, pairs, 256) for _ in range(100)]
        wall, cpu = time.perf_counter(), time.process_time()
        for i in batches:
            data.batch(i)
        speeds.append((25_600 / (time.perf_counter() - wall), 25_600 / (time.process_time() - cpu)))
    used = [memory()]
    for part in (10, 1):  # a tenth, then all: writing
        generate_pairs(
            Free(),
            tmp_path / f"part{part}",
            PairsConfig(n=n // part, num_classes=10, shape=(1, 4, 4), num_steps=1, teacher="free"),
        )
        used.append(memory())
    assert len(read_pairs_manifest(tmp_path / "part1")["shards"]) == -(-n // 2000)
    data = PairDataset(tmp_path / "part1")
    for k in range(2000):
        data.batch(rng.integers(0, n, 256))
        if k in (0, 1000, 1999):
            used.append(memory())
    report(
        "pairs",
        reading=dict(
            pairs=pairs,
            shape=[3, 32, 32],
            batch=256,
            pairs_per_second=round(max(s[0] for s in speeds)),
            pairs_per_cpu_second=round(max(s[1] for s in speeds)),
        ),
        memory_mb=dict(
            pairs=n, before=used[0], after_writing_a_tenth=used[1], after_writing_all=used[2], reading=used[3:]
        ),
    )
