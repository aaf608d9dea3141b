"""Images that are already there: a folder of pictures or an npz file is measured against a data set as a model is."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from get_nb.lab.cli import main
from get_nb.lab.classifier import create_classifier
from get_nb.lab.core import ConfigError, FileError, seed_everything
from get_nb.lab.data import load_data
from get_nb.lab.files import save_checkpoint
from get_nb.lab.metrics import compare, load_features
from get_nb.lab.pictures import evaluate_images, read_images


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    seed_everything(0)
    path = tmp_path_factory.mktemp("network") / "classifier.safetensors"
    save_checkpoint(path, create_classifier(num_classes=10, image_size=8, channels=1))
    return path


def write_pictures(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:04d}.png")


def run(words, capsys):
    with pytest.raises(SystemExit) as e:
        main(list(map(str, words)))
    return e.value.code, capsys.readouterr()


def test_what_sample_writes_is_what_evaluate_reads(network, tmp_path, capsys):
    npz = tmp_path / "s.npz"
    assert run(["sample", "digits-vit", "-n", 40, "--out", npz], capsys)[0] == 0
    code, said = run(["evaluate", npz, "--classifier", network], capsys)
    result = json.loads(said.out)
    assert code == 0 and result["samples"] == 40 and result["distance"] == "FD-digits" and "| digits/test |" in said.err
    images = torch.from_numpy(np.load(npz)["images"])
    own = compare(images, load_data("digits", "test"), load_features(network))
    assert result["test"]["fd"] == own["fd"] and result["test"]["recall"] == own["recall"]
    write_pictures(tmp_path / "flat", images)
    write_pictures(tmp_path / "nested/a", images[:20])
    write_pictures(tmp_path / "nested/b", images[20:])
    for folder in ("flat", "nested"):
        assert run(["evaluate", tmp_path / folder, "--classifier", network], capsys)[1].out.count('"fd"') == 2
        assert evaluate_images(tmp_path / folder, network, device="cpu")["train"] == result["train"]


def test_a_folder_is_compared_with_a_folder(network, tmp_path, capsys):
    digits = load_data("digits")
    for c in (0, 1):
        write_pictures(tmp_path / f"real/{c}", digits.images[digits.labels == c][:30])
    write_pictures(tmp_path / "made", load_data("digits", "test").images[:20])
    words = ["evaluate", tmp_path / "made", "--data", f"folder:{tmp_path / 'real'}", "--classifier", network]
    assert json.loads(run(words, capsys)[1].out)["data"] == "real"


@pytest.mark.parametrize(
    "make, more, said",
    [
        (lambda p: np.savez(p / "x.npz", images=np.zeros((9, 1, 8, 8))), [], "must be uint8"),
        (lambda p: np.savez(p / "x.npz", labels=np.zeros(9)), [], "no images in it"),
        (lambda p: (p / "x.npz").write_bytes(b"half"), [], "not an npz file"),
        (lambda p: None, [], "no such file"),
        (lambda p: (p / "x.npz").mkdir(), [], "neither model.safetensors nor pictures"),
        (lambda p: write_pictures(p / "x.npz", torch.zeros(9, 1, 12, 12).byte()), ["--data", "digits"], "1x12x12"),
        (lambda p: write_pictures(p / "x.npz", load_data("digits").images[:9]), ["--samples", "10"], "no --samples"),
        (lambda p: write_pictures(p / "x.npz", load_data("digits").images[:3]), [], "at least 4"),
    ],
)
def test_images_that_cannot_be_measured_are_one_line(make, more, said, network, tmp_path, capsys):
    make(tmp_path)
    code, out = run(["evaluate", tmp_path / "x.npz", "--classifier", network, *more], capsys)
    assert code == 2 and said in out.err and len(out.err.strip().splitlines()) == 1


def test_pictures_of_two_sizes_are_one_line(tmp_path):
    write_pictures(tmp_path, torch.zeros(2, 1, 8, 8).byte())
    Image.new("L", (9, 8)).save(tmp_path / "odd.png")
    with pytest.raises(FileError, match=r"odd.png: 9x8 pixels, 0000.png has 8x8"):
        read_images(tmp_path)


def test_arrays_in_the_order_of_other_projects_are_read(tmp_path):
    images = torch.randint(256, (5, 3, 4, 4)).byte()
    np.savez(tmp_path / "adm.npz", images.permute(0, 2, 3, 1).numpy())
    assert torch.equal(read_images(tmp_path / "adm.npz"), images)


def test_sets_tensors_and_arrays_are_compared_alike(network):
    a, b, features = load_data("digits", "test"), load_data("digits"), load_features(network)
    first = compare(a.images, b.images, features)
    assert compare(a, b, features) == first == compare(a.images.numpy(), b.images.numpy(), features)


def test_all_images_of_a_folder_can_be_had(tmp_path):
    write_pictures(tmp_path / "a", load_data("digits").images[:6])
    assert len(load_data(f"folder:{tmp_path}@8", "all")) == 6 and len(load_data("digits", "all")) == 1797
    for name in ("shapes", "fashion-mnist"):
        with pytest.raises(ConfigError, match="unknown split 'all' of .*; choose from test, train"):
            load_data(name, "all")


def test_who_has_no_classifier_is_told_where_one_comes_from(capsys):
    with pytest.raises(FileError, match="digits-classifier: no such file; .* reproduce --stage classifier"):
        load_features("digits-classifier")
    for words in (["evaluate", "digits-get"], ["evaluate", "digits-get", "--classifier", "digits-get"]):
        code, out = run(words, capsys)
        assert code == 2 and "reproduce --stage classifier" in out.err and len(out.err.strip().splitlines()) == 1
