"""A run against the published results: `make check-results`."""

import json
import shutil

import pytest

from conftest import ROOT, get_nb
from get_nb.lab.check import MOST, check_profile

RECORDS = ROOT / "results/cpu/records"


@pytest.fixture
def runs(tmp_path):
    "The published records of profile cpu, as a run of today."
    for path in RECORDS.glob("*/record.json"):
        (tmp_path / "cpu" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "cpu" / path.parent.name)
    return tmp_path


def plant(runs, row, value):
    "Another value in the place that a row of a check names."
    path = runs / "cpu" / row["stage"] / "record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    *place, last = row["quantity"].split(".")
    inside = record
    for key in place:
        inside = inside[int(key) if isinstance(inside, list) else key]
    inside[int(last) if isinstance(inside, list) else last] = value
    path.write_text(json.dumps(record), encoding="utf-8")


def deviating(runs):
    found = check_profile(ROOT, "cpu", runs=runs)
    assert found["agrees"] == (not found["absent"] and all(r["agrees"] for r in found["rows"]))
    return [(r["stage"], r["quantity"]) for r in found["rows"] if not r["agrees"]]


def test_a_run_that_came_out_the_same_agrees_and_every_distance_is_among_what_is_checked(runs):
    done = get_nb("check", "--runs", runs)
    assert done.returncode == 0 and done.stdout.strip().endswith("all within what is allowed"), done.stderr
    rows = check_profile(ROOT, "cpu", runs=runs)["rows"]
    checked = {(r["stage"], r["quantity"]) for r in rows if 0 < r["allowed"] <= MOST}
    evaluations = [p.parent.name for p in RECORDS.glob("evaluate_*/record.json")]
    metrics = [f"{split}.{m}" for split in ("train", "test") for m in ("fd", "precision", "recall")]
    assert evaluations and {(e, m) for e in evaluations for m in metrics} <= checked


def test_another_processor_is_allowed_for(runs):
    "Every measured number of the run moved by nine tenths of what is allowed."
    for i, row in enumerate(check_profile(ROOT, "cpu", runs=runs)["rows"]):
        if row["allowed"]:
            plant(runs, row, row["published"] * (1 + 0.9 * (-1) ** i * row["allowed"]))
    assert not deviating(runs)


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_an_error_of_a_fifth_is_found_wherever_it_is(runs, factor):
    rows = [r for r in check_profile(ROOT, "cpu", runs=runs)["rows"] if r["allowed"]]
    for row in rows:
        plant(runs, row, row["published"] * factor)
    assert deviating(runs) == [(r["stage"], r["quantity"]) for r in rows]


def test_one_wrong_number_fails_the_command_and_is_named(runs):
    published = json.loads((RECORDS / "evaluate_vit/record.json").read_text(encoding="utf-8"))["train"]["fd"]
    plant(runs, dict(stage="evaluate_vit", quantity="train.fd"), published * 1.2)
    done = get_nb("check", "--runs", runs)
    wrong = [line for line in done.stdout.splitlines() if line.endswith("DEVIATES")]
    assert done.returncode == 1 and len(wrong) == 1 and "evaluate_vit" in wrong[0] and "+20.0%" in wrong[0]
    assert not json.loads(get_nb("check", "--runs", runs, "--json").stdout)["agrees"]


@pytest.mark.parametrize("quantity", ["parameters", "evaluations", "samples", "gmac", "distance"])
def test_what_is_counted_must_be_equal(runs, quantity):
    published = json.loads((RECORDS / "evaluate_get/record.json").read_text(encoding="utf-8"))[quantity]
    other = published + "?" if isinstance(published, str) else published * 1.001
    plant(runs, dict(stage="evaluate_get", quantity=quantity), other)
    assert deviating(runs) == [("evaluate_get", quantity)]


def test_a_missing_stage_or_number_is_a_deviation(runs):
    plant(runs, dict(stage="evaluate_vit", quantity="train"), {})
    assert ("evaluate_vit", "train.fd") in deviating(runs)
    shutil.rmtree(runs / "cpu/evaluate_get")
    found = check_profile(ROOT, "cpu", runs=runs)
    assert found["absent"] == ["evaluate_get"] and not found["agrees"]


def test_what_is_not_checked_is_listed_with_a_reason(runs):
    listed = check_profile(ROOT, "cpu", runs=runs)["not_checked"]
    names = [n for names in listed.values() for n in names]
    assert {"seconds", "kid", "provenance", "table_2_conditional"} <= set(names)
    assert not [reason for reason in listed if reason.startswith("of another kind")], listed


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda runs: shutil.rmtree(runs / "cpu"), "no run to check"),
        (lambda runs: (runs / "cpu/get/record.json").write_text("{"), "get/record.json"),
    ],
    ids=["nothing there", "damaged"],
)
def test_a_run_that_cannot_be_checked_is_one_line(runs, change, said):
    change(runs)
    done = get_nb("check", "--runs", runs)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
