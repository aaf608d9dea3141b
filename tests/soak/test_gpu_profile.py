"""The gpu profile, shrunk until a CPU can run it: every stage of the real profile, through the real pipeline."""

import json

import yaml

from conftest import ROOT, get_nb
from get_nb.lab.profiles import load_profile

SMALL = dict(
    device="cpu",
    threads=1,
    steps=4,
    batch_size=16,
    warmup=1,
    checkpoint_every=2,
    n=64,
    shard_size=32,
    num_steps=2,
    samples=300,
    floor_splits=2,
    teacher="unet-digits",
    tflop=0.0,
    start=4,
    monitor_samples=100,
    monitor_every=2,
)


def shrunk(profile):
    "The profile with the same stages and wiring, and next to nothing to do in each."
    stages = {}
    for name, s in load_profile(ROOT, profile).items():
        params = {k: v for k, v in s.params.items() if k not in ("out", "inputs", "rows", "records")}
        params |= {k: v for k, v in SMALL.items() if k in params}
        if "sweep" in params:
            params["sweep"] = params["sweep"][:1]
        if s.notebook.stem == "student":
            params["overrides"] = params["overrides"] | dict(dim=32, heads=4, depth=1)
        spec = dict(notebook=s.notebook.stem, params=params, inputs=s.inputs, rows=s.rows)
        stages[name] = {k: v for k, v in spec.items() if v}
    return dict(about="the gpu profile, shrunk", stages=stages)


def test_every_stage_of_the_gpu_profile_runs(tmp_path):
    path = tmp_path / "gpu-small.yaml"
    path.write_text(yaml.safe_dump(shrunk("gpu"), sort_keys=False), encoding="utf-8")
    done = get_nb("reproduce", "--profile", path, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    stages = load_profile(ROOT, str(path))
    assert all((tmp_path / "runs/gpu-small" / name / "stamp.json").is_file() for name in stages)
    table = json.loads(
        (tmp_path / "runs/gpu-small/table_3_get_vs_vit/table_3_get_vs_vit.json").read_text(encoding="utf-8")
    )
    assert [r["method"] for r in table["rows"]] == list(stages["table_3_get_vs_vit"].rows)
