"""Pairs: the same on any number of workers, whole or absent on disk, checked when read."""

import json
import os
import random
import shutil
import time

import numpy as np
import pytest
import torch
import toy
from test_engine import fork, full_disk, start

from get_nb.lab import store
from get_nb.lab.cli import main
from get_nb.lab.core import FileError
from get_nb.lab.files import load_tensors
from get_nb.lab.generation import merge_pairs
from get_nb.lab.manifest import read_pairs_manifest
from get_nb.lab.store import PairDataset, verify_pairs
from get_nb.pairs import draw_noise


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A finished folder of toy pairs, made by one worker."
    folder = tmp_path_factory.mktemp("whole")
    toy.make(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def shards(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("pairs-*"))}


def command(capsys, *args):
    "Run `get-nb pairs ...` in this process; -> exit code, stdout, stderr."
    with pytest.raises(SystemExit) as end:
        main(["pairs", *map(str, args)])
    return end.value.code, *capsys.readouterr()


def refused(capsys, args, *words):
    code, out, err = command(capsys, *args)
    assert code == 2 and out == "" and err.count("\n") == 1 and all(w in err for w in words), err


def flip(path, rng=None, at=None):
    "Flip one bit."
    bad = bytearray(path.read_bytes())
    bad[rng.randrange(len(bad)) if rng else at] ^= 1 << (rng.randrange(8) if rng else 0)
    path.write_bytes(bad)


def test_two_workers_one_of_them_killed_make_what_one_makes(whole, tmp_path):
    one, two = (fork(toy.make, tmp_path, pause=0.02) for _ in range(2))
    while len(shards(tmp_path)) < 2:
        time.sleep(0.005)
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("pairs-*")}
    one.kill()
    two.join(600)
    assert two.exitcode == 0 and len(kept) < 12
    assert shards(tmp_path) == shards(whole) and read_pairs_manifest(tmp_path) == read_pairs_manifest(whole)
    assert all((tmp_path / name).stat().st_mtime_ns == t for name, t in kept.items())  # finished shards are not touched


def test_torchrun_makes_the_same_bytes(whole, tmp_path):
    process = start(tmp_path, what="pairs", processes=2)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert shards(tmp_path) == shards(whole)


def test_noise_and_label_depend_on_the_seed_alone_and_images_hardly_on_the_batch(whole, tmp_path):
    toy.make(tmp_path, batch_size=7, shard_size=40)
    a, b = PairDataset(whole).batch(range(120)), PairDataset(tmp_path).batch(range(120))
    assert (
        all(torch.equal(a[k], b[k]) for k in ("noise", "label", "seed"))
        and (a["image"] - b["image"]).abs().max() < 1e-4
    )
    assert torch.equal(a["noise"], draw_noise(range(120), (1, 8, 8), 10)[0])


@pytest.mark.parametrize("harm", ["flip", "recipe", "truncate", "delete"])
def test_only_the_damaged_shard_is_made_again(copy, whole, harm, capsys):
    path = copy / "pairs-00004.safetensors"
    before = {p.name: p.stat().st_mtime_ns for p in copy.glob("pairs-*")}
    data = path.read_bytes()
    harmed = dict(
        flip=data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
        recipe=data.replace(b"num_classes", b"num_classez"),
        truncate=data[:1000],
        delete=None,
    )[harm]
    path.unlink() if harmed is None else path.write_bytes(harmed)
    with pytest.raises(FileError, match="pairs-00004.safetensors: " + ("missing" if harm == "delete" else "damaged")):
        PairDataset(copy)
    toy.make(copy)
    assert shards(copy) == shards(whole) and len(PairDataset(copy)) == 120
    assert [n for n, t in before.items() if (copy / n).stat().st_mtime_ns != t] == ["pairs-00004.safetensors"]
    assert harm == "delete" or "pairs-00004.safetensors" in capsys.readouterr().err


def test_flips_and_cuts_anywhere_are_found_and_named(copy):
    rng = random.Random(0)
    for i in range(30):
        path = rng.choice(sorted(copy.glob("pairs-*")))
        good = path.read_bytes()
        flip(path, rng) if i % 5 else path.write_bytes(good[: rng.randrange(len(good))])
        assert [w.split(": ")[0] for w in verify_pairs(copy, afresh=True)] == [str(path)]
        path.write_bytes(good)
    assert verify_pairs(copy) == []


def test_a_flip_that_leaves_size_and_time_is_found_when_asked(copy, capsys):
    PairDataset(copy)
    path = copy / "pairs-00002.safetensors"
    s = path.stat()
    flip(path, at=-9)
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))
    refused(capsys, ["verify", copy], "1 of 12 shards", "pairs-00002.safetensors", "damaged")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileError, match="pairs-00002.safetensors: shorter than its header says"):
        PairDataset(copy, verify=False).batch(range(120))


def test_a_full_disk_is_one_line_and_the_work_goes_on_when_there_is_space(whole, tmp_path):
    shutil.copy(whole / "pairs-00000.safetensors", tmp_path)
    with (
        full_disk(3000),
        pytest.raises(FileError, match="pairs-00001.safetensors: cannot be written.*finished shards are kept"),
    ):
        toy.make(tmp_path)
    assert [p.name for p in sorted(tmp_path.iterdir()) if not p.name.startswith(".claims")] == [
        "pairs-00000.safetensors"
    ]
    toy.make(tmp_path)
    assert shards(tmp_path) == shards(whole)


def test_a_folder_that_vanishes_is_named(tmp_path):
    class Vanish(toy.Denoiser):
        def forward(self, x, sigma, labels=None):
            folder.exists() and folder.rename(tmp_path / "gone")
            return super().forward(x, sigma, labels)

    from get_nb.lab.generation import generate_pairs
    from get_nb.pairs import PairsConfig

    folder = tmp_path / "pairs"
    with pytest.raises(FileError, match="vanished"):
        generate_pairs(Vanish().eval(), folder, PairsConfig(**toy.RECIPE))
    assert not folder.exists()


def test_another_recipe_is_refused_before_anything_is_made(copy):
    before = shards(copy)
    with pytest.raises(FileError, match="made with num_steps = 3, now 4; use an empty folder"):
        toy.make(copy, num_steps=4)
    assert shards(copy) == before


def test_more_shards_than_may_be_open_are_read_in_any_order(tmp_path, monkeypatch):
    n, most = 60, 20
    monkeypatch.setattr(store, "_MOST_OPEN", most)
    toy.make(tmp_path, n=n, shard_size=1, num_steps=1)
    data, order = PairDataset(tmp_path), np.random.default_rng(0).permutation(n)
    batch = data.batch(order)
    assert batch["seed"].tolist() == order.tolist() and torch.equal(batch["noise"], draw_noise(order, (1, 8, 8), 10)[0])
    assert len([f for f in os.listdir("/proc/self/fd") if "pairs-" in os.path.realpath(f"/proc/self/fd/{f}")]) == most


def test_the_command_line_informs_verifies_and_merges(whole, tmp_path, capsys):
    toy.make(tmp_path / "more", n=30, first_seed=500)
    code, out, _ = command(capsys, "info", whole)
    assert code == 0 and json.loads(out)["pairs"] == 120 and json.loads(out)["missing"] == 0
    code, out, _ = command(capsys, "verify", whole)
    assert code == 0 and "12 shards, none damaged" in out
    code, out, _ = command(capsys, "merge", tmp_path / "both", tmp_path / "more", whole)
    assert code == 0 and "150 pairs in 15 shards" in out
    both = PairDataset(tmp_path / "both")
    assert both.batch(range(150))["seed"].tolist() == [*range(120), *range(500, 530)]
    refused(capsys, ["merge", tmp_path / "both", whole], "not empty")
    refused(capsys, ["info", tmp_path], "manifest.json", "no such file")


def test_folders_that_do_not_fit_are_not_merged(whole, tmp_path):
    toy.make(tmp_path / "overlap", n=10, first_seed=115)
    toy.make(tmp_path / "other", n=10, first_seed=500, num_steps=4)
    with pytest.raises(FileError, match="seed 115 is in .* too"):
        merge_pairs([whole, tmp_path / "overlap"], tmp_path / "target")
    with pytest.raises(FileError, match="other: made with num_steps = 4, .*whole.* with 3"):
        merge_pairs([whole, tmp_path / "other"], tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_recipe_older_than_a_field_is_not_merged_with_another_value_of_it(whole, tmp_path):
    for name, n, first, precision in (("old", 10, 500, "float32"), ("new", 10, 600, "bf16")):
        toy.make(tmp_path / name, n=n, first_seed=first, precision=precision)
    path = tmp_path / "old/manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["recipe"]["precision"]  # as if it had been made before there was the field
    path.write_text(json.dumps(manifest), encoding="utf-8")
    for order in (["old", "new"], ["new", "old"]):
        with pytest.raises(FileError, match="made with precision"):
            merge_pairs([tmp_path / f for f in order], tmp_path / "target")
    merge_pairs([tmp_path / "old", whole], tmp_path / "target")


def test_without_locks_two_workers_do_not_disturb_each_other(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("filelock.FileLock.acquire", lambda *a, **k: (_ for _ in ()).throw(NotImplementedError))
    tmp_path.joinpath(".pairs-00000.safetensors.1234.tmp").write_bytes(b"another worker's, being written")
    toy.make(tmp_path)
    assert shards(tmp_path) == shards(whole) and tmp_path.joinpath(".pairs-00000.safetensors.1234.tmp").is_file()


def test_redrawn_noise_is_the_stored_noise_and_costs_no_space(whole, tmp_path):
    toy.make(tmp_path, store_noise=False)
    i = np.random.default_rng(0).integers(0, 120, 50)
    assert torch.equal(PairDataset(tmp_path).batch(i)["noise"], PairDataset(whole).batch(i)["noise"])
    assert sum(map(len, shards(tmp_path).values())) < 0.65 * sum(map(len, shards(whole).values()))
    assert "noise" not in load_tensors(tmp_path / "pairs-00000.safetensors")[0]
