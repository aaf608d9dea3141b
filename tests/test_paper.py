"""The profile of the paper: every stage at smoke size on made-up CIFAR files, imported teachers and pairs, tables; and its price."""

import copy
import json

import matplotlib.pyplot as plt
import pytest
import torch
import yaml

import released
from conftest import ROOT, get_nb
from get_nb.lab import pipeline
from get_nb.lab.profiles import load_profile
from get_nb.lab.core import seed_everything
from get_nb.lab.checkpoints import create_teacher

PAPER = yaml.safe_load((ROOT / "nbs/paper/profiles/paper.yaml").read_text(encoding="utf-8"))
SMALL = dict(
    classifier=dict(steps=3, batch_size=32, floor_splits=1),
    pairs=dict(n=16, num_steps=2, shard_size=8, batch_size=8),
    import_teacher=dict(num_steps=2),
    student=dict(steps=2, batch_size=4, n_iter=2, checkpoint_every=1),
    evaluate=dict(samples=30, num_steps=2, sweep=[]),
)


def run_here(stage, parameters, folder, cwd):
    "What papermill does, without a kernel: the cells in order, parameters after theirs."
    names = {}
    for cell in json.loads(stage.notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names.update(parameters)
    plt.close("all")


def run_profile_here(profile, runs, **environment):
    "A whole profile, its notebooks in this process; -> its folder of runs."
    with pytest.MonkeyPatch.context() as m:
        for name, value in (dict(GET_NB_PROGRESS="off", MPLBACKEND="Agg") | environment).items():
            m.setenv(name, value)
        m.setattr(pipeline, "execute", run_here)
        threads = torch.get_num_threads()
        folder = pipeline.run_profile(ROOT, str(profile), runs=runs)
        torch.set_num_threads(threads)
    return folder


def small_profile(path, files):
    "The paper's profile, every stage of it, with small numbers, made-up files, and the unconditional pairs imported."
    spec = copy.deepcopy(PAPER)
    spec["defaults"] |= dict(data="cifar10-unverified", threads=1, device="cpu", features="classifier")
    for name, s in spec["stages"].items():
        s.setdefault("params", {})
        kind = s.get("notebook", name)
        s["params"] |= SMALL.get(kind, {})
        if kind == "student":
            model = s["params"]["model"]
            s["params"]["overrides"] = dict(dim=32, heads=2, depth=1) | (
                dict(deq_depth=1, n_iter=2) if model.startswith("GET") else {}
            )
        if kind == "import_teacher":
            s["params"]["file"] = str(files / f"{name}.pkl")
    spec["stages"]["pairs_uncond"] = dict(notebook="import_pairs", params=dict(source=str(files / "pairs")))
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    "Runs folder of the small paper profile."
    tmp = tmp_path_factory.mktemp("paper")
    released.write_cifar(tmp / "data", per_file=40)
    for name, n in (("teacher_cond", 10), ("teacher_uncond", 0)):
        seed_everything(0, name)
        kind = "cond" if n else "uncond"
        released.write_edm(
            tmp / f"data/{name}.pkl",
            create_teacher(
                f"edm-cifar10-32x32-{kind}-vp",
                num_classes=n,
                base=8,
                mult=(1, 1, 1),
                blocks=1,
                attention=(),
                dropout=0.0,
            ),
        )
    released.write_pairs(tmp / "data/pairs", ["11", "7", "103"], 8, 0, (3, 32, 32))
    small_profile(tmp / "paper.yaml", tmp / "data")
    return run_profile_here(tmp / "paper.yaml", tmp / "runs", GET_NB_DATA=str(tmp / "data"))


def test_every_stage_of_the_paper_runs_from_imported_teachers_and_pairs_to_tables(paper):
    names = load_profile(ROOT, "paper").keys()
    assert len(names) >= 30 and all((paper / n / "stamp.json").is_file() for n in names)
    for table, rows in (("table_1_unconditional", 11), ("table_2_conditional", 5), ("table_3_get_vs_vit", 6)):
        t = json.loads((paper / table / f"{table}.json").read_text(encoding="utf-8"))
        assert len(t["rows"]) >= rows and "CIFAR-10 (unverified)" in json.dumps(
            t["columns"]
        )  # what was not verified says so
    assert json.loads((paper / "pairs_uncond/record.json").read_text(encoding="utf-8"))["imported"] is True
    assert (
        json.loads((paper / "teacher_cond/record.json").read_text(encoding="utf-8"))["imported"] == "teacher_cond.pkl"
    )


def test_students_of_the_paper_have_the_reference_s_settings():
    got = {n: s.params for n, s in load_profile(ROOT, "paper").items() if s.notebook.stem == "student"}
    assert {p["model"] for p in got.values()} >= {
        "GET-T/2",
        "GET-M/2",
        "GET-S/2",
        "GET-B/2",
        "GET-B/2+",
        "ViT-S/2",
        "ViT-B/2",
        "ViT-L/2",
        "ViT-XL/2",
    }
    for p in got.values():
        assert (p["lr"], p["schedule"], p["warmup"], p["clip"], p["n_iter"], p["gamma"], p["loss"]) == (
            1e-4,
            "constant",
            0,
            0.0,
            6,
            0.8,
            "l1",
        )
        assert (
            0.5 ** (p["batch_size"] / p["ema_half_life"]) == pytest.approx(0.9999, abs=1e-7) and p["steps"] >= 800_000
        )


def test_a_dry_run_prices_every_stage_that_computes(tmp_path):
    done = get_nb("reproduce", "--profile", "paper", "--dry-run", "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in done.stdout.splitlines()
        if line.startswith("| ")
    }
    assert rows["pairs_uncond"][0] == "35,000,000" and float(rows["pairs_uncond"][3]) == pytest.approx(
        24.592, abs=0.001
    )  # a million images and noises, float32
    assert rows["get_B"][0] == "102,400,000" and float(rows["get_B"][1].replace(",", "")) == pytest.approx(
        102.4 * 487, rel=0.01
    )
    inception = 5.7e9  # multiply-adds per image at 299 pixels
    assert float(rows["evaluate_get_B"][1]) == pytest.approx(50_000 * 2 * (81.2e9 + inception) / 1e15, rel=0.01)
    assert not (tmp_path / "runs").exists() and len(rows) > 25


def test_doctor_lists_what_is_there_and_what_is_missing(tmp_path):
    done = get_nb("doctor", "--root", ROOT)
    assert done.returncode == 0, done.stdout
    for word in (
        "Python",
        "torch",
        "GPU",
        "packages",
        "CIFAR-10",
        "edm-cifar10-32x32-cond-vp.pkl",
        "disk",
        "memory",
        "published: cpu",
        "weights",
        "[dev]",
    ):
        assert word in done.stdout, word
    done = get_nb("doctor", "--root", "/")
    assert done.returncode == 1 and "MISSING clone: no get_nb clone" in done.stdout and "Traceback" not in done.stderr
