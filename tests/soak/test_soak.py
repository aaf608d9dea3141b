"""Long campaigns, run by `make soak`: whole chains repeated, and kills at random moments."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-c", "from get_nb.lab.cli import main; main()"]
PROFILE = os.environ.get("SOAK_PROFILE", "smoke")  # SOAK_PROFILE=cpu repeats the real thing
KILLS = int(os.environ.get("SOAK_KILLS", 8))


def reproduce(runs, *args):
    done = subprocess.run(
        [*COMMAND, "reproduce", "--profile", PROFILE, "--runs", str(runs), *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tables(runs):
    from get_nb.lab.publishing import untimed

    return {
        p.stem: untimed(json.loads(p.read_text(encoding="utf-8")))
        for p in sorted((runs / PROFILE).glob("table_*/table_*.json"))
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    runs = tmp_path_factory.mktemp("first")
    reproduce(runs)
    return runs


def test_two_chains_from_nothing_give_identical_tables(first, tmp_path):
    reproduce(tmp_path)
    assert tables(tmp_path) == tables(first) and len(tables(first)) >= 2


def test_kills_at_random_moments_change_nothing(first, tmp_path):
    seed = int(os.environ.get("SOAK_SEED", 0))
    rng, began = random.Random(seed), time.time()
    for i in range(KILLS):
        process = subprocess.Popen(
            [*COMMAND, "reproduce", "--profile", PROFILE, "--runs", str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(rng.uniform(2, 20))
        except subprocess.TimeoutExpired:
            lines = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()
            for pid in [process.pid, *[int(x.split()[0]) for x in lines if int(x.split()[1]) == process.pid]]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        done = sorted(p.parent.name for p in (tmp_path / PROFILE).glob("*/stamp.json"))
        print(f"kill {i + 1} of {KILLS} (seed {seed}): {len(done)} stages finished")
    reproduce(tmp_path)
    assert tables(tmp_path) == tables(first)
    print(f"{KILLS} kills in {time.time() - began:.0f} s: same tables")


def test_flipped_bytes_in_every_artifact_are_found(first, tmp_path):
    from get_nb.lab.core import FileError
    from get_nb.lab.files import load_tensors

    rng, flips = random.Random(1), 0
    for path in sorted((first / PROFILE).rglob("*.safetensors")):
        good = path.read_bytes()
        for _ in range(40):
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            copy = tmp_path / "bad.safetensors"
            copy.write_bytes(bad)
            with pytest.raises(FileError, match="bad.safetensors"):
                load_tensors(copy)
            flips += 1
    shutil.rmtree(tmp_path)
    print(f"{flips} flips, all found")
