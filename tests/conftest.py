"""What the tests share: the clone's root, the command line, one finished smoke chain, and the source of a cell."""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import rooms

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the library is imported: no test fetches anything
os.environ.setdefault("GET_NB_CHOICES", "first")  # what is timed differs from run to run
ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "from get_nb.lab.cli import main; main()"]


def until(ready, process=None, seconds=120, pause=0.005):
    "Wait until `ready()` is true, as long as the process lives and the time lasts; -> its answer."
    end = time.time() + seconds
    while not (answer := ready()):
        assert process is None or process.poll() is None, "the process ended before it was ready"
        assert time.time() < end, f"not ready after {seconds} s"
        time.sleep(pause)
    return answer


def get_nb(*args, **kw):
    "Run `get-nb` in the clone; -> CompletedProcess."
    return subprocess.run([*COMMAND, *map(str, args)], cwd=ROOT, capture_output=True, text=True, **kw)


def in_process(capsys, *args):
    "The same in this process, which saves the start of another; -> exit code, output, errors."
    from get_nb.lab.cli import main

    with pytest.raises(SystemExit) as e:
        main([str(a) for a in args])
    return e.value.code or 0, *capsys.readouterr()


UNITS = dict(
    share_plain=100,
    share_anderson=100,
    share_broyden=100,
    share=100,
    parameters=1e-3,
    images=1e-3,
    teacher=1e-3,
    accuracy=100,
    copies=100,
    mmac=1e3,
    repeated=100,
    memory=1e3,
    gflop=1e3,
    seconds=1e3,
)  # column -> factor to the record's unit
AS_RECORDED = ("memory_mb", "images_per_second")  # whatever the column is called


def look_up(records, source):
    "The value that a cell's source names: stage:path.in.its.record."
    stage, path = source.split(":")
    value = json.loads((records / stage / "record.json").read_text(encoding="utf-8"))
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def traced_cells(table, records):
    "Every measured cell of a table: its column, itself, and the value by the records that it names."
    for row in table["rows"]:
        for key, cell in row.items():
            if isinstance(cell, dict) and cell["value"] is not None and key != "published":
                values = [look_up(records, s) for s in cell["source"]]
                value, raw = sum(values) if cell.get("sum") else statistics.fmean(values), cell["source"][0].split(".")
                if raw[-1] in AS_RECORDED:
                    yield key, cell, value
                else:
                    yield key, cell, 1000 / value if key == "rate" else value * UNITS.get(key, 1)


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
