"""What the tests share: the clone's root, a way to call the command line, and one finished smoke chain."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import rooms

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the library is imported: no test fetches anything
os.environ.setdefault("GET_NB_CHOICES", "first")  # what is timed differs from run to run
ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "from get_nb.lab.cli import main; main()"]


def get_nb(*args, **kw):
    "Run `get-nb` in the clone; -> CompletedProcess."
    return subprocess.run([*COMMAND, *map(str, args)], cwd=ROOT, capture_output=True, text=True, **kw)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    "Runs folder of one complete smoke chain, and what the command printed."
    runs = tmp_path_factory.mktemp("runs")
    done = get_nb(
        "reproduce", "--profile", "smoke", "--runs", runs, "--cores", 2, env=dict(os.environ, OMP_NUM_THREADS="1")
    )
    assert done.returncode == 0, done.stderr
    return runs, done.stdout


@pytest.fixture(scope="session", autouse=True)
def runs(request):
    "Rooms whose tests were asked for, run one after the other from the start, beside all other tests."
    asked = [i.callspec.params["path"] for i in request.session.items if "runs and shows" in i.name.replace("_", " ")]
    with ThreadPoolExecutor(1) as pool:
        yield {path: pool.submit(rooms.run, path) for path in asked}
        pool.shutdown(cancel_futures=True)
