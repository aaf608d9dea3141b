"""Shapes, the gpu profile, and the ways beyond one machine: Snakefile, SLURM profile, container file, prices."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from conftest import ROOT, get_nb, in_process
from get_nb.lab.shapes import DRAWS, SHAPES, draw_numbers, make_shapes, render_shapes, shape_distance
from get_nb.lab.core import FileError
from get_nb.lab.profiles import load_profile
from get_nb.lab.costs import data_of, stage_cost, teacher_cost
from get_nb.lab.measured import measured_rates, published_nearest, published_same
from get_nb.lab.price import price_table, read_speeds
from get_nb.lab.stages import why_run


def test_a_shape_does_not_depend_on_the_batch_it_is_drawn_in():
    whole = make_shapes(300, 16, seed=3)
    parts = [make_shapes(n, 16, seed=3, start=s) for s, n in ((0, 1), (1, 256), (257, 43))]
    assert torch.equal(whole.images, torch.cat([p.images for p in parts])) and torch.equal(
        whole.labels, torch.cat([p.labels for p in parts])
    )
    assert (make_shapes(300, 16, seed=4).images != whole.images).any(dim=(1, 2, 3)).all()


def test_what_an_image_shows_does_not_depend_on_its_size():
    small, large = make_shapes(200, 16), make_shapes(200, 32)
    pooled = torch.nn.functional.avg_pool2d(large.images.float(), 2)
    assert torch.equal(small.labels, large.labels) and (pooled - small.images.float()).abs().mean() < 6


def test_every_number_of_an_image_changes_it():
    p = draw_numbers(0, 0, 32)
    image = render_shapes(p, 32)[0]
    for name in DRAWS:
        other = render_shapes(p | {name: (p[name] + 0.37) % 1}, 32)[0]
        assert (image != other).any(axis=(1, 2, 3)).mean() > 0.3, name


def test_no_two_classes_share_an_outline():
    t = np.linspace(-1.2, 1.2, 64, dtype=np.float32)
    x, y = np.meshgrid(t, t)
    masks = {name: shape_distance(name, x, y) < 0 for name in SHAPES}
    overlap = {
        (a, b): (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum() for a in SHAPES for b in SHAPES if a < b
    }
    assert max(overlap.values()) < 0.85, max(overlap, key=overlap.get)


def test_the_gpu_profile_has_what_the_tables_need():
    stages = load_profile(ROOT, "gpu")
    assert {"table_1_unconditional", "table_2_conditional", "table_3_get_vs_vit", "figure_samples"} <= stages.keys()
    assert all(s.params.get("device", "cuda") == "cuda" for s in stages.values())
    assert {data_of(s, stages) for s in stages.values() if not s.draws} == {"fashion-mnist", "shapes"}


def test_the_sizes_of_the_gpu_profile_are_the_ones_it_names():
    from get_nb.lab.checkpoints import create_model

    stages = load_profile(ROOT, "gpu")

    def count(name):
        p = stages[name].params
        with torch.device("meta"):
            net = create_model(p["model"], num_classes=0, image_size=28, channels=1, **p["overrides"])
        return sum(w.numel() for w in net.parameters())

    assert count("vit_0") == pytest.approx(count("get_0"), rel=0.01)
    assert 4.5 < count("vit_5x_0") / count("get_0") < 5


def test_a_price_is_of_the_stage_s_own_data_and_of_what_it_changes():
    stages = load_profile(ROOT, "gpu")
    spent = {
        name: stage_cost(stages[name], stages, "digits")["pflop"] for name in ("teacher", "pairs", "shapes_teacher")
    }
    p = stages["teacher"].params
    narrow = teacher_cost(p["teacher"], "fashion-mnist")["train_gflop"] * p["steps"] * p["batch_size"] / 1e6
    assert 3.5 < spent["teacher"] / narrow < 4.1  # twice the width
    per_pair = teacher_cost(p["teacher"], "fashion-mnist", (("base", 64),))["flop"] * 23
    assert spent["pairs"] == pytest.approx(stages["pairs"].params["n"] * per_pair / 1e15)
    p = stages["shapes_teacher"].params
    counted = teacher_cost(p["teacher"], "shapes")["train_gflop"] * p["steps"] * p["batch_size"] / 1e6
    assert spent["shapes_teacher"] == pytest.approx(counted)


def test_snakemake_sees_the_stages_of_a_profile(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "-n",
            "-s",
            ROOT / "workflow/Snakefile",
            "--config",
            "profile=smoke",
            f"runs={tmp_path}",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    for name in load_profile(ROOT, "smoke"):
        assert re.search(rf"(rule|localrule|job) {name}:|^{name} ", said, re.M), name


@pytest.mark.slow
def test_snakemake_runs_a_stage_and_what_it_needs_and_notices_what_is_no_longer_up_to_date(tmp_path):
    runs = tmp_path / "a folder"  # with a space
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "1",
        "-s",
        ROOT / "workflow/Snakefile",
        "--config",
        "profile=smoke",
        "stage=pairs",
        f"runs={runs}",
    ]

    def snakemake(*args):
        done = subprocess.run([*command, *args], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    snakemake()
    stages = load_profile(ROOT, "smoke")
    assert not why_run(stages["teacher"], runs / "smoke") and not why_run(stages["pairs"], runs / "smoke")
    assert "Nothing to be done" in snakemake()
    (runs / "smoke/.done/pairs").unlink()
    assert "pairs: up to date" in snakemake()
    (runs / "smoke/pairs/pairs-00001.safetensors").unlink()
    assert re.search(r"^pairs +1$", snakemake("-n"), re.M)
    assert "pairs: done" in snakemake() and not why_run(stages["pairs"], runs / "smoke")


def test_snakemake_refuses_an_unknown_profile_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "-s", ROOT / "workflow/Snakefile", "--config", "profile=smok"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "did you mean 'smoke'" in done.stdout + done.stderr


def test_a_job_refuses_to_build_on_what_is_not_up_to_date(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "workflow/stage.py", "--root", ROOT, "--runs", tmp_path, "smoke", "pairs"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "teacher is not up to date" in done.stderr


def test_the_container_and_the_cluster_profile_are_in_step():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert (
        "PIP_CONSTRAINT=/get_nb/constraints.txt" in dockerfile
        and "constraints.txt" in re.search(r"^COPY (.*)$", dockerfile, re.M)[1]
    )
    version = re.search(r"^FROM python:3\.(\d+)", dockerfile, re.M)[1]
    assert 11 <= int(version) <= 13
    slurm = yaml.safe_load((ROOT / "workflow/slurm/config.yaml").read_text(encoding="utf-8"))
    assert slurm["executor"] == "slurm" and slurm["default-resources"]["runtime"] > 0


@pytest.mark.parametrize("profile", ["cpu", "fashion-laptop"])
def test_a_published_profile_costs_on_its_own_machine_what_it_took(profile):
    stages, rates = load_profile(ROOT, profile), measured_rates(ROOT / "results")
    took = {machine: {m.stage: m.seconds for m in known if m.profile == profile} for machine, known in rates.items()}
    for machine, seconds in took.items():
        rows = price_table(stages, rates, machine)["rows"]
        told = {r["stage"]: 3600 * r["hours"]["value"] for r in rows if r["stage"] in seconds}
        large = [n for n, s in seconds.items() if s > 30 and machine.endswith(f"{stages[n].params['threads']} threads")]
        assert not large or 2 / 3 < sum(told[n] for n in large) / sum(seconds[n] for n in large) < 3 / 2
    assert sum(len(s) for s in took.values()) > 10


def test_a_stage_that_was_not_published_is_told_by_the_nearest_in_size():
    stages, rates = load_profile(ROOT, "cpu"), measured_rates(ROOT / "results")
    for name in ("get", "vit", "vit_5x", "hybrid"):
        for known in rates.values():
            took = [m.seconds for m in known if m.profile == "cpu" and m.stage == name]
            others = [m for m in known if m.stage != name]
            cost = stage_cost(stages[name], stages, "digits")
            if took:
                told = 1e15 * cost["pflop"] / published_nearest(stages[name], cost, others).rate
                assert 1 / 2 < told / took[0] < 2, name


def test_a_stage_is_told_by_the_same_processor_with_other_threads_where_its_own_were_not_measured():
    stages = load_profile(ROOT, "cpu")
    some = next(known for known in measured_rates(ROOT / "results").values() if any(m.stage == "get" for m in known))
    known = [m for m in some if m.kind == "train transformer"]
    for threads, told in ((1, True), (3, True), (0, False)):
        machine = f"Some processor, {threads} threads" if told else "Another processor, 1 threads"
        rows = price_table(stages, {machine: known}, "Some processor, 8 threads")["rows"]
        hours = next(r["hours"] for r in rows if r["stage"] == "get")
        assert (hours != "not measured") == told, machine


def test_of_stages_as_near_the_least_disturbed_tells():
    stages = load_profile(ROOT, "cpu")
    cost = stage_cost(stages["get"], stages, "digits")
    quiet = next(
        m
        for known in measured_rates(ROOT / "results").values()
        for m in known
        if m.profile == "cpu" and m.stage == "get"
    )
    busy = dataclasses.replace(quiet, stage="busy", seconds=4 * quiet.seconds)
    for order in ([quiet, busy], [busy, quiet]):
        assert published_nearest(stages["get"], cost, order) is quiet


@pytest.mark.parametrize("same", [True, False])
def test_a_published_stage_counts_as_the_same_only_if_what_it_reads_does_too(same):
    stages, rates = load_profile(ROOT, "cpu"), measured_rates(ROOT / "results")
    machine = next(k for k, known in rates.items() if any(m.stage == "evaluate_get" for m in known))
    stages["get"].params["lr"] = stages["get"].params["lr"] if same else 0.5
    found = published_same(stages["evaluate_get"], stages, rates, machine)
    assert (found is not None) == same and (not same or found.profile == "cpu")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"device": "cuda"}'])
def test_a_damaged_published_benchmark_is_named(text, tmp_path, monkeypatch):
    path = tmp_path / "results/bench/record_gpu/record.json"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr("get_nb.lab.price.find_root", lambda: tmp_path)
    with pytest.raises(FileError, match=f"^{path}: damaged record"):
        read_speeds()


def test_a_price_names_its_sources_and_refuses_what_it_does_not_know(capsys):
    code, out, _ = in_process(capsys, "price", "--gpus", 2, "--set", "peak=3e14")
    assert code == 0 and "| peak | 3e+14 | given |" in out and "on 2 GPUs, predicted" in out
    for args, hint in (
        (["--set", "peek=3e14"], "did you mean 'peak'"),
        (["--set", "peak"], "NAME=NUMBER"),
        (["--record", "nothing.json"], "no such record"),
    ):
        code, _, err = in_process(capsys, "price", *args)
        assert code == 2 and err.count("\n") == 1 and hint in err, err


def test_a_benchmark_of_an_unknown_size_is_refused_before_it_starts(tmp_path):
    done = get_nb("bench", "--size", "GET-TT/2", "--out", tmp_path / "b")
    assert done.returncode == 2 and "did you mean 'GET-T/2'" in done.stderr and not (tmp_path / "b").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "results/bench").glob("bench_*.json")), ids=lambda p: p.stem)
def test_every_number_of_the_published_benchmark_is_in_its_record(path):
    table = json.loads(path.read_text(encoding="utf-8"))
    record = json.loads((path.parent / f"record_{path.stem[6:]}/record.json").read_text(encoding="utf-8"))
    for row in table["rows"]:
        for key, cell in row.items():
            if isinstance(cell, dict) and cell["value"] is not None:
                i, name = cell["source"][0].split(":")[1].split(".")[1:]
                assert cell["value"] == pytest.approx(
                    record["rows"][int(i)][name] * {"seconds": 1e3, "share": 100}.get(key, 1)
                )
