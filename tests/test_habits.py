"""What users of torch do out of habit, around a call or to a model: the answer is the same, or a refusal in one line."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

import get_nb
from get_nb import DistillConfig, euler_sample, heun_sample
from get_nb.evaluation import EvalConfig, _ways, cost, family, generate, sample_images
from get_nb.gdd import draw_inputs
from get_nb.lab.checkpoints import build_described
from get_nb.lab.classifier import create_classifier, load_classifier, train_classifier
from get_nb.lab.core import ConfigError, FileError, torch_rng
from get_nb.lab.evaluate import join_gloo, sampling_formulation
from get_nb.lab.generation import generate_pairs
from get_nb.lab.images import flip_some
from get_nb.lab.state import Processes
from get_nb.meanflow import MeanFlowConfig, train_meanflow
from get_nb.pairs import PairsConfig, draw_noise, sample_pairs
from get_nb.progressive import draw_examples

SIZE = dict(num_classes=10, image_size=8, channels=1)


def get_of(**more):
    "A small GET, eval mode; its weights are the same at each call."
    torch.manual_seed(0)
    model = get_nb.create_model("GET-digits/2", **SIZE, **{**dict(dim=8, heads=2, depth=1), **more})
    for p in model.parameters():  # fresh, the last layer is zero and so is every image
        p.data.add_(0.1 * torch.randn(p.shape))
    return model.eval()


def teacher_of(**more):
    "A small teacher, likewise."
    torch.manual_seed(0)
    model = get_nb.create_teacher("unet-digits", **SIZE, **{**dict(base=8), **more})
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    return model.eval()


def vit_of():
    torch.manual_seed(0)
    return get_nb.create_model("ViT-digits/2", **SIZE, dim=8, heads=2, depth=1).eval()


KINDS = dict(get=get_of, teacher=teacher_of, vit=vit_of)


@pytest.fixture
def uncompiled():
    "torch.compile wraps as it does, and computes as before: these tests are of the wrapping."
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_still_what_it_is(kind, uncompiled):
    model = KINDS[kind]()
    wrapped, how = compiled(model), dict(get=dict(n_iter=1), teacher=dict(num_steps=2), vit={})[kind]
    assert torch.equal(sample_images(wrapped, 4, **how)[0], sample_images(model, 4, **how)[0])
    assert family(wrapped) == kind
    assert cost(wrapped, **how) == cost(model, **how)
    asked = EvalConfig(num_steps=2, sweep=(1,))
    assert _ways(wrapped, asked) == _ways(model, asked)
    in_place = sampling_formulation(wrapped, "bf16")
    assert type(in_place) is type(sampling_formulation(model, "bf16"))


def test_a_compiled_formulation_takes_the_models_place(uncompiled):
    model, noise, labels = get_of(), torch.ones(2, 1, 8, 8), torch.tensor([3, 7])
    assert torch.equal(generate(model, noise, labels, formulation=compiled(model)), generate(model, noise, labels))


def test_a_compiled_model_makes_the_images_of_a_pipeline(uncompiled):
    model = get_of()
    made = {}
    for network in (model, compiled(model)):
        pipe = get_nb.OneStepPipeline(network)
        pipe.set_progress_bar_config(disable=True)
        for n in (2, 3):
            rng = torch.Generator().manual_seed(0)
            image = pipe(class_labels=[3, 7], num_inference_steps=n, generator=rng, output_type="pt").images
            assert torch.equal(image, made.setdefault(n, image))
    assert not torch.equal(made[2], made[3])


def dropping_teacher():
    return teacher_of(dropout=0.5).train()


def mean_flow():
    torch.manual_seed(0)
    return build_described(dict(builder="meanflow", name="unet-digits", base=8, dropout=0.5, **SIZE), "here").train()


PAIRS = PairsConfig(n=2, shape=(1, 8, 8), num_classes=10, num_steps=2, teacher="small")
WAYS = {
    "Heun": lambda: heun_sample(dropping_teacher(), torch.ones(1, 1, 8, 8), num_steps=2),
    "Euler": lambda: euler_sample(dropping_teacher(), torch.ones(1, 1, 8, 8), num_steps=2),
    "of a compiled teacher": lambda: heun_sample(compiled(dropping_teacher()), torch.ones(1, 1, 8, 8), num_steps=2),
    "pairs": lambda: sample_pairs(dropping_teacher(), [0, 1], PAIRS),
    "images": lambda: sample_images(dropping_teacher(), 2, num_steps=2),
    "images in one step": lambda: sample_images(mean_flow(), 2),
    "torch's own dropout": lambda: heun_sample(torch.nn.Dropout(0.5), torch.ones(1, 1, 8, 8), num_steps=2),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_sampled_with_dropout(way):
    with pytest.raises(ConfigError, match=r"training mode .*call \.eval\(\)"):
        WAYS[way]()


def test_without_dropout_the_mode_is_the_callers():
    for model in (get_of(), teacher_of()):
        assert torch.equal(sample_images(model.train(), 2)[0], sample_images(model.eval(), 2)[0])


def test_weights_are_loaded_for_sampling(tmp_path):
    get_nb.save_checkpoint(tmp_path / "t.safetensors", teacher_of(dropout=0.5))
    get_nb.save_checkpoint(tmp_path / "g.safetensors", get_of())
    t = get_nb.create_teacher("unet-digits", **SIZE, base=8, dropout=0.5, pretrained=tmp_path / "t.safetensors")
    g = get_nb.create_model("GET-digits/2", **SIZE, dim=8, heads=2, depth=1, pretrained=tmp_path / "g.safetensors")
    assert not t.training and not g.training
    assert get_nb.create_teacher("unet-digits").training  # torch's habit: fresh weights are to be trained


def one_step():
    return build_described(dict(builder="one-step", name="unet-digits", base=8, **SIZE), "here")


def classifier():
    torch.manual_seed(0)
    return create_classifier(width=4, **SIZE)


BUILT = dict(KINDS, meanflow=mean_flow, one_step=one_step, classifier=classifier)


@pytest.mark.parametrize("kind", BUILT)
def test_a_compiled_model_is_saved_as_itself(kind, tmp_path, uncompiled):
    model = BUILT[kind]()
    for name, m in dict(plain=model, whole=compiled(model), copied=copy.deepcopy(compiled(model))).items():
        before = torch.get_rng_state()
        get_nb.save_checkpoint(tmp_path / f"{name}.safetensors", m)
        assert torch.equal(before, torch.get_rng_state())
        again = get_nb.load_checkpoint(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    files = {p.read_bytes() for p in tmp_path.iterdir()}
    assert len(files) == 1


def averaged(model):
    wrapped = torch.optim.swa_utils.AveragedModel(model)
    wrapped.config = model.config
    return wrapped


def with_a_layer(model):
    model.head = torch.nn.Linear(2, 2)
    return model


def weight_normed(model):
    torch.nn.utils.parametrizations.weight_norm(model.final_layer.linear)
    return model


def pruned(model):
    prune.l1_unstructured(model.final_layer.linear, "weight", 0.5)
    return model


def wider(model):
    model.final_layer.linear = torch.nn.Linear(16, 4)
    return model


@pytest.mark.parametrize("change", [averaged, with_a_layer, weight_normed, pruned, wider], ids=lambda f: f.__name__)
def test_what_could_not_be_loaded_is_not_saved(change, tmp_path):
    with pytest.raises(ConfigError, match="model: .*changed after it was built"):
        get_nb.save_checkpoint(tmp_path / "m.safetensors", change(get_of()))
    assert not list(tmp_path.iterdir())


def test_weights_without_values_are_not_saved(tmp_path):
    with torch.device("meta"):
        model = get_nb.create_model("GET-digits/2", **SIZE)
    with pytest.raises(ConfigError, match="without values"):
        get_nb.save_checkpoint(tmp_path / "m.safetensors", model)


class Pairs:
    "Stored pairs, in memory."

    num_classes, manifest = 10, dict(shards=[])

    def __init__(self, n=16):
        self.noise, self.label = draw_noise(range(n), (1, 8, 8), 10)

    def __len__(self):
        return len(self.noise)

    def batch(self, index):
        return dict(noise=self.noise[index], label=self.label[index], image=self.noise[index].tanh())


def distilled(model=None, n_iter=2, **how):
    "The weights after three steps."
    cfg = get_nb.TrainConfig(steps=3, batch_size=8, **how)
    trained, _ = get_nb.distill(model or get_of(), Pairs(), DistillConfig(n_iter=n_iter), cfg)
    return trained.state_dict()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("gradient", ["unrolled", "phantom", "implicit"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_callers_autocast_reaches_no_training(precision, gradient):
    own = distilled(get_of(gradient=gradient), precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(distilled(get_of(gradient=gradient), precision=precision), own)


def test_the_callers_autocast_reaches_no_metric(tmp_path):
    get_nb.save_checkpoint(tmp_path / "c.safetensors", classifier())
    network, images = get_nb.load_features(tmp_path / "c.safetensors"), get_nb.load_data("digits", "test").images[:20]
    own = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(network(images), own)


@pytest.mark.parametrize("word", ["float16", "bfloat16", "fp32", "", None, torch.float16])
def test_a_precision_that_is_not_known_is_refused(word):
    with pytest.raises(ConfigError, match="precision .*; choose from float32, bf16, fp16"):
        generate(get_of(), torch.ones(1, 1, 8, 8), precision=word)


X = torch.linspace(-1, 1, 16).view(8, 2)


def trained(loss, model=None, **how):
    "A line's history."
    torch.manual_seed(0)
    return get_nb.train(model or torch.nn.Linear(2, 1), loss, get_nb.TrainConfig(steps=2, batch_size=8), **how)[1]


def mean(model, step, share):
    return model(X[share]).mean()


LOSSES = {
    "a number": (lambda m, s, h: 1.0, "loss: a scalar tensor is needed"),
    "a number of numpy": (lambda m, s, h: np.float32(1), "loss: a scalar tensor is needed"),
    "nothing": (lambda m, s, h: None, "loss: a scalar tensor is needed"),
    "no losses": (lambda m, s, h: {}, "loss: none was returned"),
    "a loss per image": (lambda m, s, h: m(X[h]), r"not a \[8, 1\]"),
    "whole numbers": (lambda m, s, h: torch.tensor(1), "without gradient"),
    "detached": (lambda m, s, h: mean(m, s, h).detach(), "loss: a tensor without gradient"),
    "a number beside it": (lambda m, s, h: dict(loss=mean(m, s, h), size=1.0), "size: a scalar tensor"),
    **{n: (lambda m, s, h, n=n: {"loss": mean(m, s, h), n: X.mean()}, n) for n in ("step", "watch", "seconds")},
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_cannot_be_descended_is_refused(kind):
    loss, said = LOSSES[kind]
    with pytest.raises(ConfigError, match=said):
        trained(loss)


def test_training_wants_gradients_whatever_the_caller_wants():
    own = distilled()
    with torch.no_grad():
        assert equal(distilled(), own)
    model = get_of()
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"torch.inference_mode\(\) .* leave its block"):
        distilled(model)
    with torch.inference_mode():
        made = torch.nn.Linear(2, 1)
    with pytest.raises(ConfigError, match=r"torch.inference_mode\(\) .* make it outside"):
        trained(mean, made)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 1).requires_grad_(False), torch.nn.ReLU()], ids=str)
def test_a_model_without_a_weight_to_train_is_refused(model):
    with pytest.raises(ConfigError, match="nothing to train"):
        trained(mean, model)


@pytest.mark.parametrize("identity", [dict(a=Path("x")), dict(a=float("nan")), {(1, 2): 3}, ["a"]], ids=str)
def test_an_identity_that_no_checkpoint_could_confirm_is_refused(identity, tmp_path):
    with pytest.raises(ConfigError, match="identity: "):
        trained(mean, state_dir=tmp_path / "state", identity=identity)
    assert not (tmp_path / "state").exists()


def trained_classifier():
    model, data = classifier(), get_nb.load_data("digits", "train")
    return train_classifier(model, data, get_nb.TrainConfig(steps=2, batch_size=8))[0].state_dict()


def drawn_pairs(folder):
    generate_pairs(teacher_of(), folder, PAIRS)
    return get_nb.PairDataset(folder).batch([0, 1])


def measured(folder):
    with torch.device("cpu"):
        get_nb.save_checkpoint(folder / "c.safetensors", classifier())
        network = get_nb.load_features(folder / "c.safetensors")
    train, test = (get_nb.load_data("digits", split) for split in ("train", "test"))
    cfg = EvalConfig(samples=12, num_steps=2)
    result, images, labels = get_nb.evaluate(teacher_of(), cfg, train, test, network, "digits")
    return {k: torch.tensor(result[k]["fd"], dtype=torch.float64, device="cpu") for k in ("train", "test")} | dict(
        images=images, labels=labels
    )


def one_progressive_draw():
    cfg = get_nb.TrainConfig(steps=1, batch_size=4)
    return dict(enumerate(draw_examples(get_nb.load_data("digits", "train"), 4, 0, cfg, True)))


def meanflowed():
    with torch.device("cpu"):
        model, data = mean_flow(), get_nb.load_data("digits", "train")
    cfg = get_nb.TrainConfig(steps=2, batch_size=4)
    return train_meanflow(model, data, MeanFlowConfig(), cfg)[0].state_dict()


def gan_draw():
    cfg = get_nb.TrainConfig(steps=1, batch_size=4)
    return dict(enumerate(draw_inputs((1, 8, 8), 10, 0, cfg)))


WORK = {
    "a distillation": lambda folder: distilled(),
    "a teacher's augmented step": lambda folder: dict(
        x=flip_some(torch.eye(4, device="cpu").view(4, 1, 2, 2), torch_rng("a"))
    ),
    "a classifier's training": lambda folder: trained_classifier(),
    "pairs": drawn_pairs,
    "an evaluation": measured,
    "progressive distillation's draw": lambda folder: one_progressive_draw(),
    "MeanFlow": lambda folder: meanflowed(),
    "an adversary's draw": lambda folder: gan_draw(),
}


@pytest.fixture
def small(monkeypatch):
    "The models of this file are made on the CPU, in float32, whatever the test sets."

    def on_cpu(make):
        def made(**more):
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            with torch.device("cpu"):
                model = make(**more)
            torch.set_default_dtype(before)
            return model

        return made

    for name in ("get_of", "teacher_of", "classifier", "mean_flow"):
        monkeypatch.setitem(globals(), name, on_cpu(globals()[name]))


@pytest.mark.parametrize("work", WORK)
def test_the_default_device_and_type_are_the_callers_business(work, small, tmp_path):
    own = WORK[work](tmp_path / "own")
    torch.set_default_device("meta")  # in the place of a GPU: what lands there by mistake has no values
    torch.set_default_dtype(torch.float64)
    try:
        assert equal(WORK[work](tmp_path / "other"), own)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models_are_float32_whatever_torchs_default(dtype, tmp_path):
    own = {kind: sample_images(get_nb.load_checkpoint(f"digits-{kind}"), 2)[0] for kind in ("get", "vit", "teacher")}
    get_nb.save_checkpoint(tmp_path / "c.safetensors", classifier())
    torch.set_default_dtype(dtype)
    try:
        for kind, images in own.items():
            assert torch.equal(sample_images(get_nb.load_checkpoint(f"digits-{kind}"), 2)[0], images)
        made = [get_of(), teacher_of(), load_classifier(tmp_path / "c.safetensors")]
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for m in made for t in m.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("there", [(), ("RANK",), ("RANK", "MASTER_ADDR")], ids=str)
def test_half_of_a_launchers_variables_are_refused(there, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in there:
        monkeypatch.setenv(name, "0")
    for start in (join_gloo, lambda: Processes(torch.device("cpu"))):
        with pytest.raises(
            ConfigError, match="WORLD_SIZE is set, but not .*MASTER_PORT: start with torchrun, or unset"
        ):
            start()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 'two'"):
        join_gloo()


def test_an_empty_variable_of_a_launcher_says_nothing(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert join_gloo("cpu") == torch.device("cpu") and Processes(torch.device("cpu")).world == 1


NOISE = torch.ones(1, 1, 8, 8)
REFUSED = {
    "no images": (lambda: sample_images(get_of(), 0), "n = 0"),
    "fewer than none": (lambda: sample_images(get_of(), -3), "n = -3"),
    "a fraction of images": (lambda: sample_images(get_of(), 2.0), "n = 2.0"),
    "no batch": (lambda: sample_images(get_of(), 2, batch_size=0), "batch_size = 0"),
    "a seed in words": (lambda: sample_images(get_of(), 2, first_seed="5"), "first_seed = '5'"),
    "a sampler misspelt": (
        lambda: generate(teacher_of(), NOISE, sampler="huen"),
        "sampler 'huen'; did you mean 'heun'",
    ),
    "no sampler": (lambda: generate(teacher_of(), NOISE, sampler=None), "sampler None; choose from"),
    "a cost of no sampler": (lambda: cost(teacher_of(), sampler="ruler"), "sampler 'ruler'; did you mean 'euler'"),
    "no seeds": (lambda: draw_noise([], (1, 8, 8), 10), "seeds: there are none"),
    "seeds that are fractions": (lambda: draw_noise([0.5], (1, 8, 8), 10), "seeds = "),
    "a pipeline's seed": (lambda: pipeline()(generator=0), "generator = 0: torch.Generator"),
    "seeds of a pipeline": (lambda: pipeline()(generator=[0, 1]), "generator = .*: torch.Generator"),
    "a class in words": (lambda: pipeline()(class_labels="3"), "class_labels = '3': whole numbers"),
    "classes in words": (lambda: pipeline()(class_labels=["3", "4"]), "class_labels = .*: whole numbers"),
    "too few generators": (lambda: pipeline()(batch_size=3, generator=[torch.Generator()]), "generator: a list for 3"),
    "a type in words": (
        lambda: get_nb.OneStepPipeline.from_pretrained("digits-get", dtype="float16"),
        "dtype = 'float16'",
    ),
}


def pipeline():
    pipe = get_nb.OneStepPipeline(get_of())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("what", REFUSED)
def test_an_argument_is_refused_by_its_name(what):
    call, said = REFUSED[what]
    with pytest.raises(ConfigError, match=said):
        call()


def test_seeds_may_come_as_an_array():
    for seeds in ([0, 1], torch.arange(2), np.arange(2), (0, 1)):
        assert all(map(torch.equal, draw_noise(seeds, (1, 8, 8), 10), draw_noise(range(2), (1, 8, 8), 10)))


def test_weights_that_were_loaded_in_inference_mode_can_be_trained(tmp_path):
    get_nb.save_checkpoint(tmp_path / "g.safetensors", get_of())
    same = dict(SIZE, dim=8, heads=2, depth=1, pretrained=tmp_path / "g.safetensors")
    own = distilled(get_nb.load_checkpoint(tmp_path / "g.safetensors"))
    with torch.inference_mode():
        made = [get_nb.load_checkpoint(tmp_path / "g.safetensors"), get_nb.create_model("GET-digits/2", **same)]
        teacher = get_nb.load_checkpoint("digits-teacher")
    assert all(equal(distilled(model), own) for model in made)
    assert not any(p.is_inference() for p in teacher.parameters())


IN_THE_WAY = {
    "a distillation's state": lambda file: trained(mean, state_dir=file),
    "a state below a file": lambda file: trained(mean, state_dir=file / "state"),
    "pairs": lambda file: generate_pairs(teacher_of(), file, PAIRS),
    "a checkpoint": lambda file: get_nb.save_checkpoint(file / "x.safetensors", get_of()),
    "a pipeline": lambda file: pipeline().save_pretrained(file),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_a_file_in_the_way_of_a_folder_is_said(what, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="file.*: no folder can be made there"):
        IN_THE_WAY[what](tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_names_no_checkpoint_is_refused():
    with pytest.raises(FileError, match="aaa: .*too long"):
        get_nb.load_checkpoint("a" * 5000)
    for given in (None, b"digits-get", 3):
        with pytest.raises(ConfigError, match=f"not by a {type(given).__name__}"):
            get_nb.load_checkpoint(given)


def test_no_folder_is_left_of_pairs_that_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="training mode"):
        generate_pairs(dropping_teacher(), tmp_path / "pairs", PAIRS)
    assert not (tmp_path / "pairs").exists()


def in_place(z):
    return 0.5 * z.relu_()


def in_place_of_one(z, u):
    return 0.5 * z, u.mul_(0.5)


SOLVES = {
    "iteration": lambda f, z: get_nb.fixed_point_iter(f, z, max_iter=3),
    "Anderson": lambda f, z: get_nb.anderson(f, z, max_iter=3),
    "Broyden": lambda f, z: get_nb.broyden(f, z, max_iter=3),
    "unrolled": lambda f, z: get_nb.unroll(f, z, n_iter=2),
    "equilibrium": lambda f, z: get_nb.equilibrium(f, z, gradient="implicit", max_iter=3),
}


@pytest.mark.parametrize("how", SOLVES)
def test_a_map_that_works_in_place_is_refused(how):
    z0 = torch.linspace(-1, 1, 8).view(2, 4)
    with torch.no_grad(), pytest.raises(ConfigError, match="f changes the state that it is given"):
        SOLVES[how](in_place, z0.clone())
    with torch.no_grad(), pytest.raises(ConfigError, match="f changes the state that it is given"):
        SOLVES[how](in_place_of_one, (z0.clone(), z0.clone()))
    with torch.inference_mode():  # torch counts no changes of such a tensor
        SOLVES["iteration"](torch.cos, z0.clone())
