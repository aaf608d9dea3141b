"""What somebody meets who uses the package for the first time: wrong kinds of file and name, own models, messages with a way out."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi
from torch import nn

import get_nb
from conftest import ROOT
from get_nb.get import GET, RELEASED_SIZES, ViT
from get_nb.lab.classifier import create_classifier
from get_nb.lab.core import ConfigError, FileError
from get_nb.lab.data import load_data
from get_nb.lab.files import save_checkpoint
from get_nb.pairs import PairsConfig

SHAPE = dict(num_classes=3, image_size=8, channels=1)


def one_line(e, said):
    assert said in str(e.value) and "\n" not in str(e.value), e.value


class Own(nn.Module):
    "A generator of somebody else's."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, noise, labels=None):
        return self.conv(noise).tanh()


def test_a_generator_of_ones_own_is_evaluated_once_it_says_what_it_makes(tmp_path):
    save_checkpoint(tmp_path / "c.safetensors", create_classifier(num_classes=10, image_size=8, channels=1))
    model, network = Own().eval(), get_nb.load_features(tmp_path / "c.safetensors")
    digits = load_data("digits"), load_data("digits", "test"), network, "digits"
    with pytest.raises(ConfigError) as e:
        get_nb.evaluate(model, get_nb.EvalConfig(samples=20), *digits)
    one_line(e, 'give your own its config = dict(name="mine", num_classes=0, image_size=32, channels=3)')
    model.config = dict(name="mine", num_classes=0, image_size=8, channels=1)
    result, images, _ = get_nb.evaluate(model, get_nb.EvalConfig(samples=20), *digits)
    assert result["name"] == "mine" and images.shape == (20, 1, 8, 8) and result["train"]["fd"] > 0
    said = get_nb.evaluate.__doc__.split("Returns:")[1]
    assert not [k for k in [*result, *result["train"]] if k.removesuffix("_std") not in said and k not in ("about",)]


def test_a_field_that_is_missing_is_named_and_nothing_is_printed_whole():
    for make, said in (
        (get_nb.TrainConfig, "TrainConfig: steps: is missing"),
        (PairsConfig, "PairsConfig: n: is missing"),
    ):
        with pytest.raises(ConfigError) as e:
            make()
        assert str(e.value) == said
    with pytest.raises(ConfigError) as e:
        PairsConfig(n=3, shape=(1, 8, 8))
    assert str(e.value) == "PairsConfig: teacher: is missing"


def test_without_a_clone_the_data_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GET_NB_DATA", raising=False)
    monkeypatch.delenv("GET_NB_ROOT", raising=False)
    with pytest.raises(ConfigError) as e:
        load_data("cifar10")
    one_line(e, "GET_NB_DATA")
    one_line(e, "get-nb import cifar10 --download")


def test_the_wrong_kind_of_file_names_what_reads_it(tmp_path):
    get_nb.OneStepPipeline(get_nb.create_model("ViT-digits/2", **SHAPE)).save_pretrained(tmp_path / "pipe")
    with pytest.raises(FileError) as e:
        get_nb.load_checkpoint(tmp_path / "pipe")
    one_line(e, "OneStepPipeline.from_pretrained")
    for name, reader in (("x.pkl", "load_edm_pickle"), ("x.pth", "load_reference_get"), ("x.pt", "load_reference_get")):
        (tmp_path / name).write_bytes(pickle.dumps({}))
        with pytest.raises(FileError) as e:
            get_nb.load_checkpoint(tmp_path / name)
        one_line(e, reader)
    for name in ("./nothing", "../nothing", "/nothing"):
        with pytest.raises(FileError) as e:
            ViT.from_pretrained(name)
        one_line(e, f"{name}: no such folder")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def offline(self, **_):
        raise ConnectionError("offline mode\nis enabled")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    with pytest.raises(FileError) as e:
        get_nb.create_model("ViT-digits/2", **SHAPE).push_to_hub("me/tiny")
    one_line(e, "me/tiny: cannot be uploaded: offline mode is enabled")


@pytest.mark.parametrize("pretrained", [True, 3, b"x"])
def test_weights_that_are_no_path_are_one_line(pretrained):
    for make in (
        lambda: get_nb.create_model("ViT-digits/2", pretrained=pretrained),
        lambda: get_nb.load_checkpoint(pretrained),
    ):
        with pytest.raises(ConfigError) as e:
            make()
        one_line(e, "named by a path or a shipped name")


@pytest.mark.parametrize(
    "create, name, said",
    [
        (get_nb.create_model, "unet-digits", "create_teacher('unet-digits')"),
        (get_nb.create_model, "digits-get", "load_checkpoint('digits-get')"),
        (get_nb.create_teacher, "GET-B/2", "create_model('GET-B/2')"),
        (get_nb.create_teacher, "digits-teacher", "load_checkpoint('digits-teacher')"),
        (get_nb.create_model, "ViT-digit/2", "did you mean 'ViT-digits/2'?"),
    ],
)
def test_a_name_of_another_kind_names_the_function_that_takes_it(create, name, said):
    with pytest.raises(ConfigError) as e:
        create(name)
    one_line(e, said)


def test_a_pipeline_takes_as_many_images_as_latents():
    pipe = get_nb.OneStepPipeline(get_nb.create_model("ViT-digits/2", **SHAPE))
    z = torch.randn(4, 1, 8, 8)
    assert len(pipe(latents=z).images) == 4 and len(pipe(class_labels=2, latents=z).images) == 4
    for wrong in (dict(batch_size=3), dict(class_labels=[0, 1])):
        with pytest.raises(ConfigError):
            pipe(latents=z, **wrong)


def test_every_name_of_a_model_is_listed_and_makes_one():
    names = get_nb.list_models()
    assert {"GET-B/2", "ViT-digits/2", "unet-digits", "digits-get"} <= set(names) and names == sorted(names)
    for name in names:
        makers = [get_nb.create_model, get_nb.create_teacher, get_nb.load_checkpoint]
        assert any(name in made for made in map(get_nb.list_models, ("model", "teacher", "trained"))), (name, makers)
    with pytest.raises(ConfigError):
        get_nb.list_models("student")
    code = "import sys, get_nb; get_nb.create_model, get_nb.list_models; print('diffusers' in sys.modules)"
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout == "False\n"


def test_options_of_what_has_none_are_one_line():
    for model in (GET(RELEASED_SIZES["GET-T/2"], 0, 8, 1), get_nb.create_model("ViT-digits/2", **SHAPE)):
        with pytest.raises(ConfigError) as e:
            get_nb.with_options(model, n_iter=2)
        one_line(e, "a GET as create_model makes it is needed")
