"""Models by name, on a model hub and as a pipeline of diffusers: what is saved comes back as it was, and nothing is fetched."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

import get_nb
from conftest import ROOT
from get_nb.get import GET, ViT
from get_nb.lab import publishing
from get_nb.lab.cli import main
from get_nb.lab.core import ConfigError, FileError, seed_everything
from get_nb.lab.files import save_checkpoint, write_json
from get_nb.lab.publishing import ship
from get_nb.lab.shipped import model_card, shipped_folder, shipped_names, verify_shipped
from get_nb.precond import EDMPrecond
from get_nb.presets import with_options

SHAPE = dict(num_classes=3, image_size=8, channels=1)
TINY = dict(dim=16, heads=2, depth=1)
MAKE = {
    "digits-get": lambda: get_nb.create_model("GET-digits/2", **SHAPE, **TINY),
    "digits-vit": lambda: get_nb.create_model("ViT-digits/2", **SHAPE, **TINY),
    "digits-teacher": lambda: get_nb.create_teacher("unet-digits", **SHAPE, base=8),
}
SCORE = dict(fd=1.234, kid=0.5, precision=0.8, recall=0.9, fd_std=0.1)
MEASURED = dict(data="digits", distance="FD-digits", protocol="5,000 images", train=SCORE, test=dict(SCORE, fd=2.345))
MEASURED |= dict(class_accuracy=0.987, copy_share=0.25, first_seed=10**9, sweep=[1, 2, 3])


def made(name):
    seed_everything(0)
    return MAKE[name]().eval()


def finished_stage(folder, model):
    "The folder of a stage that has trained a model."
    save_checkpoint(folder / "student.safetensors", model, steps=7)
    write_json(folder / "record.json", dict(parameters=sum(p.numel() for p in model.parameters())))
    params = dict(steps=7, lr=0.004, threads=2, overrides={})
    write_json(folder / "stamp.json", dict(stage=folder.name, key=dict(params=params), outputs={}, seconds=1.0))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A folder of shipped weights, made as the package's is."
    folder = tmp_path_factory.mktemp("shipped")
    write_json(folder / "evaluate.json", MEASURED)
    for name in MAKE:
        stage = finished_stage(folder / "runs" / name, made(name))
        ship(name, stage, {"float32": folder / "evaluate.json"}, folder / "weights")
    return folder / "weights"


@pytest.fixture(autouse=True)
def shipped(weights, monkeypatch, tmp_path):
    monkeypatch.setenv("GET_NB_SHIPPED", str(weights))
    monkeypatch.chdir(tmp_path)


def run(model, seed=0):
    "Two images of a model of any kind."
    g = torch.Generator().manual_seed(seed)
    noise, labels = torch.randn(2, 1, 8, 8, generator=g), torch.tensor([0, 2])
    with torch.no_grad():
        return model(noise, *([torch.tensor(2.0)] if isinstance(model, EDMPrecond) else []), labels)


def test_a_shipped_name_is_the_same_model_everywhere(tmp_path, capsys):
    for name in MAKE:
        model = get_nb.load_checkpoint(name)
        assert (run(model) - run(made(name))).abs().max() < 2e-2  # float16
        create = get_nb.create_teacher if "teacher" in name else get_nb.create_model
        options = {k: v for k, v in model.config.items() if k not in ("builder", "name")}
        assert torch.equal(run(create(model.config["name"], pretrained=name, **options).eval()), run(model))
    image = get_nb.OneStepPipeline.from_pretrained("digits-get").model.network
    assert torch.equal(run(image), run(get_nb.load_checkpoint("digits-get")))
    for words in (["digits-get", "-n", "4", "--iterations", "2"], ["digits-teacher", "--steps", "2", "-n", "2"]):
        with pytest.raises(SystemExit) as e:
            main(["sample", *words, "--out", str(tmp_path / f"{words[0]}.png")])
        assert not e.value.code and (tmp_path / f"{words[0]}.png").stat().st_size > 100, capsys.readouterr().err


@pytest.mark.parametrize(
    "use",
    [
        lambda name: get_nb.load_checkpoint(name),
        lambda name: get_nb.create_model("GET-digits/2", pretrained=name),
        lambda name: get_nb.create_teacher("unet-digits", pretrained=name),
        lambda name: get_nb.OneStepPipeline.from_pretrained(name),
        lambda name: GET.from_pretrained(name),
        lambda name: main(["sample", name]),
    ],
)
def test_a_misspelt_name_is_one_line_with_the_names_that_exist(use, capsys):
    for name, hint in (
        ("digits-gte", "did you mean 'digits-get'"),
        ("mnist", "choose from digits-get, digits-teacher"),
    ):
        with pytest.raises((FileError, SystemExit)) as e:
            use(name)
        said = capsys.readouterr().err if e.type is SystemExit else str(e.value)
        assert hint in said and len(said.strip().splitlines()) == 1


def test_a_file_of_ones_own_goes_before_a_shipped_name(tmp_path):
    save_checkpoint(tmp_path / "digits-get", made("digits-vit"))
    assert not isinstance(get_nb.load_checkpoint("digits-get"), GET)


def test_a_card_says_what_the_records_say(weights):
    card = ModelCard.load(weights / "digits-get/README.md")
    said = ("float32", "1.23", "2.35", "5,000 images", "98.7%", "25.0%", "CC BY 4.0", "Apache-2.0", "- lr: 0.004")
    assert not [word for word in said if word not in card.text]
    assert "threads" not in card.text and "## Limits" in card.text and card.data.library_name == "get_nb"
    assert json.loads((weights / "digits-get/config.json").read_text(encoding="utf-8"))["dim"] == 16


def test_a_card_of_an_evaluation_against_statistics_says_what_was_not_measured():
    split = dict(fd=12.3, kid=None, precision=None, recall=None)
    measured = dict(train=split, test=dict(split, fd=13.4), data="clothes", distance="FD", protocol="1,000 images")
    card = model_card(dict(name="x", image_size=8, channels=1), dict(evaluations=dict(float16=measured)))
    assert "| float16, against clothes/test | 13.4 | – | – | – |" in card
    assert "1,000 images.\n" in card and "seeds from" not in card and "?" not in card


def test_what_is_shipped_is_counted_and_checked(weights, tmp_path, monkeypatch):
    assert verify_shipped() == [] and shipped_names() == sorted(MAKE)
    stage = finished_stage(tmp_path / "vit", made("digits-vit"))
    monkeypatch.setattr(publishing, "_MOST_BYTES", 10_000)
    with pytest.raises(ConfigError, match="MB at most"):
        ship("digits-vit-5x", stage)
    monkeypatch.undo()
    monkeypatch.setenv("GET_NB_SHIPPED", str(weights))
    model = made("digits-vit")
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match="does not fit in float16"):
        ship("digits-vit-5x", finished_stage(tmp_path / "large", model))
    (stage / "record.json").unlink()
    for wrong, said in (("digits-vit-5x", "no record.json"), ("Digits/../x", "small letters")):
        with pytest.raises(ConfigError, match=said):
            ship(wrong, stage)
    assert verify_shipped() == [] and shipped_names() == sorted(MAKE)
    assert not list(weights.glob(".*"))


def test_the_packages_own_weights_are_as_they_were_made(monkeypatch):
    monkeypatch.delenv("GET_NB_SHIPPED")
    assert {"digits-teacher", "digits-get", "digits-vit"} <= set(shipped_names())
    assert verify_shipped() == [] and sum(p.stat().st_size for p in shipped_folder().rglob("*.*")) <= 16 * 2**20
    known = {f"{data}-{kind}" for data in ("digits", "fashion") for kind in ("teacher", "get", "vit", "vit-5x")}
    assert set(shipped_names()) <= known
    for name in shipped_names():
        assert get_nb.load_checkpoint(name).meta["evaluations"]


@pytest.mark.parametrize("name", MAKE)
def test_a_model_comes_back_from_a_hub_folder_as_it_was(name, tmp_path, monkeypatch):
    model = made(name)
    model.save_pretrained(tmp_path / "hub")
    again = type(model).from_pretrained(tmp_path / "hub")
    assert torch.equal(run(again), run(model)) and again.config == model.config and not again.training
    assert {p.name for p in (tmp_path / "hub").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    other = EDMPrecond if isinstance(model, ViT) else ViT
    with pytest.raises(ConfigError, match=f"which is no {other.__name__}"):
        other.from_pretrained(tmp_path / "hub")
    pushed = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), dict(repo_id=repo_id)))
    listing = lambda self, folder_path, repo_id, **_: pushed.update({repo_id: sorted(os.listdir(folder_path))})  # noqa: E731
    monkeypatch.setattr(HfApi, "upload_folder", listing)
    model.push_to_hub("me/tiny")
    assert pushed == {"me/tiny": ["README.md", "config.json", "model.safetensors"]}


@pytest.mark.parametrize(
    "load", [lambda name: ViT.from_pretrained(name), lambda name: get_nb.OneStepPipeline.from_pretrained(name)]
)
@pytest.mark.parametrize("name", ["nobody/nothing", "a/b/c", "./nowhere/x", "nowhere.safetensors"])
def test_what_cannot_be_fetched_is_one_line(load, name):
    with pytest.raises(FileError) as e:
        load(name)
    assert "\n" not in str(e.value) and name.removeprefix("./") in str(e.value)


@pytest.mark.parametrize("name", ["digits-get", "digits-vit"])
def test_a_pipeline_is_saved_and_loaded_by_diffusers_itself(name, tmp_path):
    from diffusers import DiffusionPipeline, ImagePipelineOutput

    pipe, how = get_nb.OneStepPipeline(made(name)), dict(class_labels=[0, 2, 1], output_type="pt")
    g = torch.Generator
    images = pipe(**how, generator=g().manual_seed(3)).images
    pipe.save_pretrained(tmp_path)
    for again in (
        get_nb.OneStepPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True),
    ):
        assert torch.equal(again(**how, generator=g().manual_seed(3)).images, images)
    assert images.shape == (3, 1, 8, 8) and 0 <= images.min() and images.max() <= 1
    out = pipe(class_labels=1, generator=g().manual_seed(0))
    assert isinstance(out, ImagePipelineOutput) and out.images[0].size == (8, 8)
    assert isinstance(pipe(2, return_dict=False), tuple) and len(pipe(2, return_dict=False)[0]) == 2
    alone = [pipe(generator=[g().manual_seed(s)], output_type="pt").images for s in (4, 5)]
    both = pipe(2, generator=[g().manual_seed(s) for s in (4, 5)], output_type="pt").images
    assert (torch.cat(alone) - both).abs().max() < 1e-5


def test_the_bar_counts_the_iterations_of_the_equilibrium(monkeypatch):
    pipe, seen = get_nb.OneStepPipeline(made("digits-get")), []
    progress_bar = pipe.progress_bar

    def watched(total):
        seen.append(progress_bar(total=total))
        return seen[-1]

    monkeypatch.setattr(pipe, "progress_bar", watched)
    pipe(3, num_inference_steps=5)
    pipe(3)
    assert [(bar.n, bar.total) for bar in seen] == [(5, 5), (6, 6)]


@pytest.mark.parametrize(
    "how, said",
    [
        (dict(class_labels=[3]), "0..2"),
        (dict(class_labels=[-1]), "0..2"),
        (dict(class_labels=[0.5]), "whole numbers"),
        (dict(class_labels=[]), "whole numbers"),
        (dict(class_labels=[1, 2], batch_size=3), "2 for 3 images"),
        (dict(batch_size=0), "batch_size = 0"),
        (dict(num_inference_steps=0), "num_inference_steps = 0"),
        (dict(output_type="jpg"), "choose from pil, np, pt"),
        (dict(latents=torch.zeros(1, 3, 8, 8)), "latents"),
    ],
)
def test_a_call_that_does_not_fit_is_one_line(how, said):
    with pytest.raises(ConfigError, match=said) as e:
        get_nb.OneStepPipeline(made("digits-get"))(**how)
    assert "\n" not in str(e.value)


def test_a_teacher_is_no_one_step_pipeline():
    with pytest.raises(ConfigError, match="takes many steps: heun_sample"):
        get_nb.OneStepPipeline(made("digits-teacher"))


def test_without_the_extra_one_line_names_it(tmp_path):
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "huggingface_hub"): raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import get_nb
model = get_nb.load_checkpoint("digits-get")
for use in (lambda: get_nb.OneStepPipeline, lambda: model.save_pretrained("x"), lambda: model.push_to_hub("a/b")):
    try: use()
    except get_nb.ConfigError as e: print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))  # fmt: skip
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
    assert len(done.stdout.splitlines()) == 3 == done.stdout.count("pip install 'get_nb[diffusers]'")


def changed_by_hand(model):
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    return model


def trained_further(model):
    noise = torch.randn(4, 1, 8, 8)
    get_nb.save_pairs("pairs", noise, noise.tanh(), torch.arange(4) % 3)
    pairs = get_nb.PairDataset("pairs")
    how = get_nb.TrainConfig(steps=1, batch_size=2)
    return get_nb.distill(model, pairs, get_nb.DistillConfig(n_iter=1), how)[0]


@pytest.mark.parametrize(
    "change", [changed_by_hand, trained_further, lambda model: with_options(model, n_iter=1)], ids=str
)
def test_a_model_that_has_changed_does_not_keep_the_metrics_of_the_old_one(change, tmp_path):
    model = change(get_nb.load_checkpoint("digits-get"))
    for kind, save in (("model", model), ("pipe", get_nb.OneStepPipeline(model))):
        save.save_pretrained(tmp_path / kind)
        card = (tmp_path / kind / "README.md").read_text(encoding="utf-8")
        assert "Not measured." in card and "- steps: 7" not in card
    again = get_nb.load_checkpoint(tmp_path / "model")
    assert again.meta == {} and torch.equal(run(again), run(model))
    again.meta["data"] = "shells"
    changed_by_hand(again).save_pretrained(tmp_path / "further")
    assert "shells" in (tmp_path / "further/README.md").read_text(encoding="utf-8")


def test_a_model_that_is_as_it_was_keeps_its_metrics(tmp_path):
    for model in (get_nb.load_checkpoint("digits-get"), get_nb.load_checkpoint("digits-get").half()):
        model.save_pretrained(tmp_path / str(next(model.parameters()).dtype))
    for card in tmp_path.glob("torch*/README.md"):
        assert "5,000 images" in card.read_text(encoding="utf-8")
    assert len(list(tmp_path.glob("torch*/README.md"))) == 2


def snippet(card):
    return card.split("```python\n")[1].split("\n```")[0]


@pytest.mark.parametrize("name", MAKE)
def test_the_lines_on_a_card_load_the_model_that_it_describes(name, tmp_path, monkeypatch):
    model, names = made(name), {}
    model.save_pretrained("saved")
    exec(snippet((tmp_path / "saved/README.md").read_text(encoding="utf-8")), names)
    assert torch.equal(run(names["model"]), run(model))
    if "teacher" not in name:
        get_nb.OneStepPipeline(model).save_pretrained("pipe")
        exec(snippet((tmp_path / "pipe/README.md").read_text(encoding="utf-8")), names)
        assert torch.equal(run(names["pipe"].model.network), run(model))
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), dict(repo_id=repo_id)))
    cards = []
    keep = lambda self, folder_path, **_: cards.append((folder_path / "README.md").read_text(encoding="utf-8"))  # noqa: E731
    monkeypatch.setattr(HfApi, "upload_folder", keep)
    model.push_to_hub("me/tiny")
    model.save_pretrained("both", push_to_hub=True, repo_id="me/tiny")
    assert [snippet(card).splitlines()[-1] for card in cards] == [
        f"model = {type(model).__name__}.from_pretrained('me/tiny')"
    ] * 2


@pytest.mark.parametrize(
    "module, name", [("kd", "OneStep"), ("meanflow", "MeanFlow"), ("get", "GET"), ("precond", "EDMPrecond")]
)
def test_a_class_loads_a_model_before_anything_else_is_imported(module, name, tmp_path):
    code = f"from get_nb.{module} import {name}\nprint(callable({name}.save_pretrained))\n{name}.from_pretrained('nothing')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))  # fmt: skip
    assert done.stdout == "True\n" and "FileError: nothing: no such file" in done.stderr, done.stderr
