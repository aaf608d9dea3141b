"""Fashion-MNIST: found where others put it, read only if it is what was published, fetched whole or not at all."""

import gzip
import hashlib

import numpy as np
import pytest
import torch

from get_nb import load_data
from get_nb.lab import clothes
from get_nb.lab.cli import main
from get_nb.lab.clothes import FASHION_FILES, find_fashion, load_fashion, read_idx
from get_nb.lab.core import ConfigError, FileError
from get_nb.lab.data import load_split, short_name
from get_nb.lab.doctor import examine


def idx(array):
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def arrays(n=20):
    "Name of the file -> what it holds: ten classes, n images each way."
    rng, out = np.random.default_rng(0), {}
    for images, labels in FASHION_FILES.values():
        out[images] = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        out[labels] = np.arange(n, dtype=np.uint8) % 10
    return out


def write(folder, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays().items():
        raw = idx(array)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(raw) if packed else raw)


def exit_code(*args):
    with pytest.raises(SystemExit) as e:
        main(list(args))
    return e.value.code or 0


@pytest.fixture
def published(tmp_path, monkeypatch):
    "Made-up files count as the published ones; no file of this machine is found."
    digests = {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in arrays().items()}
    monkeypatch.setattr(clothes, "_SHA256", digests)
    monkeypatch.setattr(clothes, "DEBIAN", tmp_path / "usr/share/datasets/fashion-mnist")
    monkeypatch.setenv("GET_NB_DATA", str(tmp_path / "data"))
    return tmp_path


RAW = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    "raw, reason",
    [
        (b"", "does not begin"),
        (RAW[:3], "does not begin"),
        (b"\1" + RAW[1:], "does not begin"),
        (RAW[:2] + b"\x0d" + RAW[3:], "type 0x0d"),
        (RAW[:3] + b"\0", "header"),
        (RAW[:3] + b"\xff" + RAW[4:], "header"),
        (RAW[:9], "header"),
        (RAW[:-1], "cut short"),
        (RAW[:4] + b"\xff\xff\xff\xff" + RAW[8:], "cut short"),
        (RAW + b"\0", "too long"),
        (gzip.compress(RAW)[:-9], "gzip"),
        (gzip.compress(RAW)[:12] + b"\xff\xff\xff" + gzip.compress(RAW)[15:], "gzip"),
        (gzip.compress(RAW) + b"more", "gzip"),
        (gzip.compress(RAW[:-1]), "cut short"),
    ],
)
def test_a_file_that_is_not_exactly_an_idx_file_of_bytes_is_refused_in_one_line(raw, reason):
    with pytest.raises(FileError) as e:
        read_idx(raw, "there/images")
    assert reason in str(e.value) and "there/images" in str(e.value) and "\n" not in str(e.value)


def test_a_packed_file_that_unpacks_without_end_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(clothes, "_MOST", 10**6)
    with pytest.raises(FileError, match="too long"):
        read_idx(gzip.compress(RAW + bytes(10**7)), "images")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("where", ["data/FashionMNIST/raw", "data/fashion-mnist", "usr/share/datasets/fashion-mnist"])
def test_the_set_is_found_where_torchvision_debian_and_people_put_it(published, where, packed):
    write(published / where, packed)
    for split, files in FASHION_FILES.items():
        s = load_data("fashion-mnist", split)
        assert np.array_equal(s.images[:, 0], arrays()[files[0]]) and s.labels.tolist() == arrays()[files[1]].tolist()
        assert s.shape == (1, 28, 28) and len(s.classes) == 10 and s.data == short_name("fashion-mnist")
        assert find_fashion(split)[0].parent == published / where
    said = [f for f in examine() if "Fashion-MNIST" in f.text]
    assert len(said) == 1 and said[0].ok and where in said[0].text


def test_absent_files_are_named_with_the_way_out_and_half_a_split_is_absent(published, capsys):
    write(published / "data/fashion-mnist")
    (published / "data/fashion-mnist/t10k-labels-idx1-ubyte.gz").unlink()
    assert len(load_data("fashion-mnist")) == 20
    with pytest.raises(ConfigError, match=r"not there.*get-nb import fashion-mnist --download.*apt install"):
        load_data("fashion-mnist", "test")
    assert exit_code("import", "fashion-mnist") == 2
    finding = next(f for f in examine() if "Fashion-MNIST" in f.text)
    assert not finding.ok and "--download" in finding.text and "\n" not in finding.text


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("file", [f for files in FASHION_FILES.values() for f in files])
def test_one_changed_number_is_noticed_also_after_the_file_was_read(published, file, packed):
    folder = published / "data/fashion-mnist"
    write(folder, packed)
    split = "train" if file.startswith("train") else "test"
    load_fashion(split)
    array = arrays()[file]
    array.flat[-1] ^= 1
    path = folder / (f"{file}.gz" if packed else file)
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    with pytest.raises(FileError, match=f"{file}.*published"):
        load_fashion(split)


def test_a_caller_who_changes_its_images_changes_nobody_elses(published):
    write(published / "data/fashion-mnist")
    load_data("fashion-mnist").images.zero_()
    assert load_data("fashion-mnist").images.any()


def test_another_split_is_stratified_over_all_images(published):
    write(published / "data/fashion-mnist")
    train, test = (load_split("fashion-mnist", s, 1) for s in ("train", "test"))
    assert len(train) == len(test) == 20 and test.labels.bincount().tolist() == [2] * 10
    everything = torch.cat([load_data("fashion-mnist", s).images for s in ("train", "test")])
    key = {x.numpy().tobytes() for x in everything}
    assert {x.numpy().tobytes() for x in torch.cat([train.images, test.images])} == key and len(key) == 40
    with pytest.raises(ConfigError, match="fashion-mnist have one size"):
        load_data("fashion-mnist", size=14)


@pytest.mark.parametrize("fault", ["", "cut", "offline"])
def test_a_download_is_checked_and_leaves_all_files_or_none(published, monkeypatch, capsys, fault):
    import torchvision.datasets

    def fetch(root, download):
        raw = clothes.Path(root) / "FashionMNIST/raw"
        if fault == "offline":
            raise RuntimeError("Error downloading:\nno such host")
        write(raw)
        write(raw, packed=False)  # torchvision unpacks
        if fault == "cut":
            (raw / "t10k-images-idx3-ubyte").write_bytes(RAW)

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fetch)
    code = exit_code("import", "fashion-mnist", "--download")
    said = capsys.readouterr()
    left = sorted(p.name for p in published.rglob("*") if p.is_file())
    if fault:
        assert code == 2 and not left and len(said.err.splitlines()) == 1
    else:
        assert code == 0 and left == sorted(arrays()) and "test: 20 images, checksums as published" in said.out
    assert not list((published / "data").glob(".*"))


def test_the_published_files_are_read_where_they_are_installed():
    try:
        sets = [load_fashion(s) for s in ("train", "test")]
    except ConfigError as e:
        pytest.skip(str(e))
    assert [len(s) for s in sets] == [60_000, 10_000] and abs(sets[0].sigma_data - 0.706) < 0.001
    assert sets[0].labels.bincount().tolist() == [6000] * 10
    assert [sets[0].classes[y] for y in sets[0].labels[:4]] == ["ankle boot", "t-shirt/top", "t-shirt/top", "dress"]
