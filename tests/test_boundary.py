"""Wrong input is refused in one line where it enters, and refusing it costs nothing where a model computes."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import toy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from get_nb import create_model, create_teacher, equilibrium, euler_sample, heun_sample, solve, unroll, unroll_constant
from get_nb.distillation import DistillConfig, distill
from get_nb.evaluation import EvalConfig, evaluate
from get_nb.fixed_point import or_nan
from get_nb.get import GET, GETConfig
from get_nb.lab.checkpoints import load_checkpoint, load_weights
from get_nb.lab.classifier import create_classifier
from get_nb.lab.cli import main
from get_nb.lab.core import ConfigError, FileError, torch_rng
from get_nb.lab.fast import Fast
from get_nb.lab.files import load_tensors, save_checkpoint, save_tensors, sha256_file
from get_nb.lab.generation import generate_pairs
from get_nb.lab.images import ImageSet, to_float, to_uint8
from get_nb.lab.metrics import compare, copy_share, load_features, nearest_training
from get_nb.lab.schedule import TrainConfig
from get_nb.lab.store import PairDataset, save_pairs, verify_pairs
from get_nb.pairs import PairsConfig, draw_noise
from get_nb.precond import IdealDenoiser
from get_nb.presets import with_options


def models(num_classes):
    "A teacher, a GET and a ViT of 8x8 images, with weights that make a difference, and what each is called with."
    torch.manual_seed(0)
    shape = dict(num_classes=num_classes, image_size=8, channels=1)
    teacher = create_teacher("unet-digits", base=16, **shape)
    small = dict(dim=16, heads=2, depth=1, **shape)
    out = dict(teacher=teacher, get=create_model("GET-digits/2", **small), vit=create_model("ViT-digits/2", **small))
    for m in out.values():
        for p in m.parameters():
            if p.requires_grad and p.abs().max() < 1e-3:  # fresh weights that are zero, or next to it
                torch.nn.init.normal_(p, std=0.1)
    return {k: m.eval() for k, m in out.items()}


def call(model, noise, labels):
    return model(noise, 1.0, labels) if hasattr(model, "sigma_data") else model(noise, labels)


def on_a_gpu_without_values(kind, num_classes):
    model, labels = models(num_classes)[kind], None
    kinds = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
    with FakeTensorMode():  # has no values: whatever looks at one raises
        state = {k: torch.empty(shape, dtype=dtype, device="cuda") for k, (shape, dtype) in kinds.items()}
        if num_classes:
            labels = torch.zeros(2, dtype=torch.int64, device="cuda")
        noise = torch.zeros(2, 1, 8, 8, device="cuda")
        run = partial(torch.func.functional_call, model, state)
        if kind == "teacher":
            out = heun_sample(lambda *given: run(given), noise, labels, num_steps=3)
        else:
            out = run((noise, labels))
    assert out.shape == (2, 1, 8, 8) and out.device.type == "cuda"


def apart(*calls):
    "Run calls in a process of its own: what they start in torch would keep later tests from forking."
    here, code = Path(__file__).parent, "; ".join(["from test_boundary import *", *calls])
    env = os.environ | dict(PYTHONPATH=f"{here}{os.pathsep}{here.parent}")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_labels_and_noise_levels_on_a_gpu_are_not_waited_for():
    apart(*(f"on_a_gpu_without_values({k!r}, {n})" for k in ("teacher", "get", "vit") for n in (0, 10)))


@pytest.mark.parametrize("kind", ["teacher", "get", "vit"])
def test_labels_that_a_model_cannot_take_are_refused_in_one_line(kind):
    noise = torch.zeros(2, 1, 8, 8)
    first = -1 if kind == "teacher" else 0
    for labels, said in [
        (torch.tensor([0, 10]), f"labels must lie in {first}..9, found 0..10"),
        (torch.tensor([first - 1, 3]), f"labels must lie in {first}..9, found {first - 1}..3"),
        (torch.tensor([0.0, 1.0]), r"labels must be int64 of shape \(2,\), not float32 \(2,\)"),
        (torch.tensor([0, 1], dtype=torch.int32), "labels must be int64"),
        (torch.tensor([0]), r"not int64 \(1,\)"),
        (torch.tensor([[0], [1]]), r"not int64 \(2, 1\)"),
        (torch.eye(10)[:2], "labels must be int64"),
    ]:
        with pytest.raises(ConfigError, match=said):
            call(models(10)[kind], noise, labels)
    with pytest.raises(ConfigError, match="unconditional network"):
        call(models(0)[kind], noise, torch.tensor([0, 1]))


def test_a_teacher_takes_minus_one_as_no_class_and_a_class_as_its_row():
    noise, nothing = torch.randn(3, 1, 8, 8), torch.tensor([-1, -1, -1])
    teacher = models(10)["teacher"]
    with torch.no_grad():
        without = teacher(noise, 1.0)
        assert torch.equal(teacher(noise, 1.0, nothing), without)
        mixed = teacher(noise, 1.0, torch.tensor([-1, 4, -1]))
        assert torch.equal(mixed[[0, 2]], without[[0, 2]]) and not torch.equal(mixed[1], without[1])
        assert torch.equal(models(0)["teacher"](noise, 1.0, nothing), models(0)["teacher"](noise, 1.0))


GOOD = torch.Size((2, 1, 8, 8))
WRONG_NOISE = {
    "9x9": torch.zeros(2, 1, 9, 9),
    "4x16, as many pixels": torch.zeros(2, 1, 4, 16),
    "channels": torch.zeros(2, 3, 8, 8),
    "no batch": torch.zeros(1, 8, 8),
    "an empty batch": torch.zeros(0, 1, 8, 8),
    "bytes": torch.zeros(GOOD, dtype=torch.uint8),
    "whole numbers": torch.zeros(GOOD, dtype=torch.int64),
    "numpy": torch.zeros(GOOD).numpy(),
    "another device": torch.zeros(GOOD, device="meta"),
}


def ways(kind, noise, model):
    "Every way to hand noise to a model."
    if kind == "teacher":
        return [lambda: heun_sample(model, noise, num_steps=2), lambda: euler_sample(model, noise, num_steps=2)]
    return [lambda: model(noise), lambda: model.unrolled(noise, n_iter=2), lambda: Fast(model)(noise)]


@pytest.mark.parametrize("kind", ["teacher", "get", "released get", "vit"])
@pytest.mark.parametrize("wrong", WRONG_NOISE)
def test_noise_that_does_not_fit_a_model_is_refused_in_one_line(kind, wrong):
    if kind == "released get":
        model = GET(GETConfig(dim=16, heads=2, depth=1), 0, 8, 1)
        calls = ways(kind, WRONG_NOISE[wrong], model)[:2]
    else:
        calls = ways(kind, WRONG_NOISE[wrong], models(0)[kind])
    for run in calls:
        with pytest.raises(ConfigError, match="noise must be|^x must be|takes floating") as e:
            run()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["get", "vit"])
def test_noise_of_another_precision_is_refused_unless_autocast_converts_it(kind):
    model = models(0)[kind]
    with pytest.raises(ConfigError, match=r"noise must be float32 \(B, 1, 8, 8\) on cpu, not float64 \(2, 1, 8, 8\)"):
        model(torch.zeros(GOOD, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.zeros(GOOD, dtype=torch.bfloat16)).shape == GOOD
    assert model.double()(torch.zeros(GOOD, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", ["get", "released get", "fast"])
def test_a_start_that_does_not_fit_is_refused_and_one_that_fits_is_used(name):
    model = models(0)["get"]
    if name == "released get":
        model = GET(GETConfig(dim=16, heads=2, depth=1, n_iter=1), 0, 8, 1)
        torch.nn.init.normal_(model.final_layer.linear.weight)
    runs = [model, model.unrolled] if name != "fast" else [Fast(model), Fast(model).unrolled]
    noise, z0 = torch.randn(GOOD), torch.randn(2, 16, 16)
    wrong = [z0[0], z0[:1], z0[:, :8], z0[..., :8], z0.long(), z0.double(), z0.numpy(), z0.to("meta")]
    for run in runs:
        for bad in wrong:
            with pytest.raises(ConfigError, match=r"z0 must be float32 \(2, 16, 16\) on cpu, not "):
                run(noise, None, bad)
        one, other = (run(noise, None, z, n_iter=1) for z in (z0, 2 * z0))
        assert not torch.equal(torch.as_tensor(one[0]), torch.as_tensor(other[0]))


@pytest.mark.parametrize("kind", ["get", "released get", "fast"])
@pytest.mark.parametrize("n", [0, -1, 2.0, True, "6"])
def test_iterations_are_a_whole_number_above_zero(kind, n):
    model = models(0)["get"]
    if kind == "released get":
        model = GET(GETConfig(dim=16, heads=2, depth=1), 0, 8, 1)
    noise = torch.zeros(GOOD)
    for run in (model, model.unrolled) if kind != "fast" else (Fast(model), Fast(model).unrolled):
        with pytest.raises(ConfigError, match="n_iter = "):
            run(noise, n_iter=n)
        run(noise, n_iter=np.int64(1))


@pytest.mark.parametrize("kind", ["get", "released get", "fast"])
def test_a_model_whose_map_gives_no_number_makes_no_image_that_looks_like_one(kind):
    model = models(0)["get"]
    if kind == "released get":
        model = GET(GETConfig(dim=16, heads=2, depth=1), 0, 8, 1)
    if kind == "fast":
        model = with_options(model, select="lowest")
    with torch.no_grad():
        model.deq_blocks[0].mlp.fc2.weight[0, 0] = torch.nan
    assert (model if kind != "fast" else Fast(model))(torch.randn(GOOD)).isnan().all()


def test_sizes_that_a_model_cannot_have_are_refused():
    for size in (9, 0, 1):
        with pytest.raises(ConfigError, match="image_size"):
            create_model("GET-digits/2", image_size=size, channels=1)
        with pytest.raises(ConfigError, match="image_size"):
            GET(GETConfig(dim=16, heads=2, depth=1), 0, size, 1)
    for shape in (dict(channels=0), dict(num_classes=-1), dict(image_size=8.0), dict(num_classes=2.5)):
        for make in (create_model, create_teacher):
            with pytest.raises(ConfigError, match=next(iter(shape))):
                make("GET-digits/2" if make is create_model else "unet-digits", **dict(dict(image_size=8), **shape))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf"), torch.ones(3), torch.tensor([1.0, 0.0])])
def test_noise_levels_that_a_denoiser_cannot_take_are_refused(sigma):
    for denoiser in (models(0)["teacher"], IdealDenoiser(torch.rand(5, 1, 8, 8))):
        with pytest.raises(ConfigError, match="sigma must be"):
            denoiser(torch.randn(GOOD), sigma)
        one = denoiser(torch.ones(GOOD), 0.5)
        for same in (torch.tensor(0.5), torch.full((2,), 0.5), torch.full((1,), 0.5), np.float64(0.5)):
            assert torch.equal(denoiser(torch.ones(GOOD), same), one)


@pytest.mark.parametrize(
    "how",
    [
        dict(num_steps=0),
        dict(num_steps=2.5),
        dict(sigma_min=0.0),
        dict(sigma_min=80.0),
        dict(sigma_min=float("nan")),
        dict(sigma_max=float("inf")),
        dict(rho=0),
        dict(rho=-7.0),
        dict(rho=float("nan")),
    ],
)
def test_noise_schedules_that_mean_nothing_are_refused(how):
    for sample in (heun_sample, euler_sample):
        with pytest.raises(ConfigError, match=next(iter(how)).split("_")[0]):
            sample(models(0)["teacher"], torch.zeros(GOOD), **how)


Z0 = torch.randn(3, 5)
WRONG_MAPS = {
    "another shape": lambda z: z[:, :4],
    "another batch": lambda z: z[:2],
    "a mean over the batch": lambda z: z.mean(0, keepdim=True),
    "whole numbers": lambda z: z.long(),
    "another device": lambda z: z.to("meta"),
    "nothing": lambda z: None,
    "numpy": lambda z: z.detach().numpy(),
    "a tuple": lambda z: (z, z),
}


def solver_calls(f, z0):
    "Every function of the library that evaluates a map."
    yield from (lambda s=s: solve(f, z0, s, max_iter=3) for s in ("fixed_point", "anderson", "broyden"))
    yield lambda: unroll(f, z0, 2)
    yield lambda: unroll_constant(f, z0, 3, tensors=())
    yield from (lambda g=g: equilibrium(f, z0, g, max_iter=3) for g in ("implicit", "phantom"))


@pytest.mark.parametrize("wrong", WRONG_MAPS)
def test_a_map_that_does_not_return_a_state_is_refused_in_one_line(wrong):
    for run in solver_calls(WRONG_MAPS[wrong], Z0.clone()):
        with pytest.raises(ConfigError, match="f must return a state like the one it is given, float32") as e:
            run()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "z0", [torch.tensor(1.0), torch.ones(3, 5, dtype=torch.int64), np.ones((3, 5)), [Z0, Z0], None]
)
def test_a_start_that_is_no_batch_of_states_is_refused_in_one_line(z0):
    for run in solver_calls(lambda z: z / 2, z0):
        with pytest.raises(ConfigError, match="z0 must be a floating-point tensor"):
            run()
    with pytest.raises(ConfigError, match=r"not float32 \(3,\) on cpu"):  # a residual needs a state per image
        solve(lambda z: z / 2, torch.ones(3), max_iter=3)


@pytest.mark.parametrize(
    "said, how",
    [
        *((f"max_iter = {n!r}: a whole", dict(max_iter=n)) for n in (0, -3, 2.0, True, None)),
        *((f"tol = {t!r}: None or", dict(tol=t)) for t in (-1e-3, float("nan"), "1e-3")),
        ("did you mean 'max_iter'", dict(max_itr=3)),
        ("did you mean 'select'", dict(selct="last")),
        ("did you mean 'lowest'", dict(select="lowst")),
        ("did you mean 'rel'", dict(stop_mode="rell")),
        ("did you mean 'anderson'", dict(solver="andersen")),
        ("tau = ", dict(tau=0)),
        ("tau = ", dict(tau="1")),
    ],
)
def test_solver_options_that_mean_nothing_are_refused_in_one_line(said, how):
    with pytest.raises(ConfigError, match=said):
        solve(lambda z: z / 2, Z0, **(dict(max_iter=3) | how))
    with pytest.raises(ConfigError, match=said):
        equilibrium(lambda z: z / 2, Z0, **(dict(max_iter=3) | how))
    with pytest.raises(ConfigError, match=said):  # at once, not in the backward pass
        equilibrium(lambda z: z / 2, Z0, max_iter=3, adjoint=how)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_a_map_that_gives_no_number_is_reported_by_the_solver(solver, broken):
    def f(z):
        z = z / 2
        return torch.where(torch.arange(3)[:, None] == 1, broken, z)

    z, stats = solve(f, Z0, solver, max_iter=20, tol=1e-5, stop_mode="abs")
    assert stats.failed.tolist() == [False, True, False] and stats.converged.tolist() == [True, False, True]
    assert stats.abs_lowest.isinf().tolist() == [False, True, False] and z[[0, 2]].abs().max() < 1e-4
    shown = or_nan(z, stats)
    assert shown[1].isnan().all() and torch.equal(shown[[0, 2]], z[[0, 2]])


def some_bytes(n, seed, shape=(1, 8, 8)):
    return torch.randint(0, 256, (n, *shape), generator=torch_rng("bytes", seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    "The features of an untrained classifier of 8x8 images."
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    torch.manual_seed(0)
    save_checkpoint(path, create_classifier(num_classes=10, image_size=8, channels=1, width=8))
    return load_features(path)


NOT_BYTES = {
    "numbers in [-1, 1]": to_float,
    "float64": lambda x: x.double(),
    "int64": lambda x: x.long(),
    "floats of numpy": lambda x: x.float().numpy(),
    "no batch": lambda x: x[0],
    "flattened": lambda x: x.flatten(1),
    "none": lambda x: x[:0],
    "a list": list,
}


@pytest.mark.parametrize("wrong", NOT_BYTES)
def test_metrics_refuse_what_is_not_bytes(network, wrong):
    a, b, harm = some_bytes(40, 0), some_bytes(50, 1), NOT_BYTES[wrong]
    calls = [
        lambda x, y: compare(x, y, network),
        lambda x, y: nearest_training(x, y),
        lambda x, y: copy_share(x, y),
        lambda x, y: (network(x), network.reference(y)),
    ]
    for run in calls:
        run(a, b)
        for given in ((harm(a), b), (a, harm(b)), (harm(a), harm(b))):
            with pytest.raises(
                ConfigError, match=r"images must be uint8 \(N, C, H, W\), as to_uint8 makes them, not "
            ) as e:
                run(*given)
            assert "\n" not in str(e.value)


def test_metrics_of_bytes_are_those_of_the_images_they_stand_for(network):
    a, b = some_bytes(40, 0), some_bytes(50, 1)
    assert compare(a, b, network, only_fd=True)["fd"] > 0
    assert compare(a, b, network) == compare(to_uint8(to_float(a)), to_uint8(to_float(b)), network)
    assert copy_share(b, b) == 1.0 and copy_share(to_uint8(to_float(b)), b) == 1.0


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 16), (1, 16, 16), (1, 8, 9)])
def test_sets_of_different_sizes_are_not_compared(network, shape):
    a, b = some_bytes(40, 0), some_bytes(50, 1, shape)
    for run in (lambda: compare(a, b, network), lambda: compare(b, a, network), lambda: nearest_training(a, b)):
        with pytest.raises(ConfigError, match="x".join(map(str, shape))):
            run()
    with pytest.raises(ConfigError, match="the classifier knows images of 1x8x8, these have"):
        network(b)
    with pytest.raises(ConfigError, match="at least two"):
        copy_share(a, a[:1])


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(images=torch.zeros(4, 1, 8, 8)), "images must be uint8"),
        (dict(labels=torch.tensor([0, 1, 2, 10])), r"labels must lie in 0..9, found 0..10"),
        (dict(labels=torch.tensor([0, 1, 2, -1])), "labels must lie in 0..9, found -1..2"),
        (dict(labels=torch.tensor([0, 1])), "labels must be int64 of shape"),
        (dict(labels=torch.zeros(4)), "labels must be int64 of shape"),
    ],
)
def test_a_data_set_is_checked_where_it_enters(change, said):
    good = dict(images=some_bytes(4, 0), labels=torch.arange(4), classes=tuple("0123456789"), name="some")
    ImageSet(**good)
    with pytest.raises(ConfigError, match=said):
        ImageSet(**good | change)


@pytest.mark.parametrize("split", ["train", "test"])
def test_evaluation_refuses_splits_that_do_not_fit_the_model(network, split):
    model, cfg = models(0)["vit"], EvalConfig(samples=20)
    for wrong, said in ((torch.zeros(30, 1, 8, 8), "must be uint8"), (some_bytes(30, 0, (1, 4, 16)), "images have")):
        splits = dict(train=some_bytes(30, 0), test=some_bytes(30, 1)) | {split: wrong}
        with pytest.raises(ConfigError, match=said):
            evaluate(model, cfg, **splits, network=network, data="some")


def nan_for(seeds):
    "A teacher that fails for the noise of some seeds."
    bad = draw_noise(seeds, (1, 8, 8), 0)[0]

    class Failing(toy.Denoiser):
        config = dict(builder="teacher", name="failing", num_classes=10, image_size=8, channels=1)

        def forward(self, x, sigma, labels=None):
            broken = (x[:, None] / 80 - bad[None]).flatten(2).abs().amax(2).lt(1e-3).any(1)
            return torch.where(broken.view(-1, 1, 1, 1), torch.nan, super().forward(x, sigma, labels))

    return Failing().eval()


def test_a_shard_of_pairs_with_an_image_that_is_not_finite_is_not_written(tmp_path):
    cfg = PairsConfig(**toy.RECIPE | dict(n=30))
    said = (
        r"pairs-00001.safetensors is not written: the teacher's images: 2 of 10 images are not finite .*seeds 13, 17$"
    )
    with pytest.raises(ConfigError, match=said):
        generate_pairs(nan_for([13, 17]), tmp_path, cfg)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["pairs-00000.safetensors"]  # finished shards are kept
    generate_pairs(toy.Denoiser().eval(), tmp_path, cfg)
    assert len(PairDataset(tmp_path)) == 30


def test_a_recipe_that_the_teacher_cannot_follow_is_refused(tmp_path):
    cfg = PairsConfig(**toy.RECIPE | dict(n=10))
    for teacher, said in ((models(0)["teacher"], "the teacher knows 0"), (Pooled(), "must return images of the shape")):
        with pytest.raises(ConfigError, match=said):
            generate_pairs(teacher, tmp_path / "pairs", cfg)
        assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(ConfigError, match=r"x must be float32 \(B, 1, 8, 8\)"):
        generate_pairs(models(10)["teacher"], tmp_path, PairsConfig(**toy.RECIPE | dict(n=10, shape=(1, 4, 16))))


class Pooled(toy.Denoiser):
    "A teacher whose images are too small."

    def forward(self, x, sigma, labels=None):
        return super().forward(x, sigma, labels)[..., :1, :].expand(-1, 8, -1, -1)


def arrays(n=6):
    noise = torch.randn((n, 1, 8, 8), generator=torch_rng("arrays"))
    return dict(noise=noise, image=noise.tanh(), labels=torch.arange(n) % 3)


def spoil(x, value, *where):
    x = x.clone()
    x[where] = value
    return x


WRONG_PAIRS = {
    "a NaN image": (lambda a: dict(image=spoil(a["image"], torch.nan, 4, 0, 1, 1)), "image: 1 of 6 .* seeds 104$"),
    "infinite noise": (lambda a: dict(noise=spoil(a["noise"], torch.inf, 2)), "noise: 1 of 6 .* seeds 102$"),
    "byte images": (lambda a: dict(image=to_uint8(a["image"])), "must be floating-point, .* not float32 .* and uint8"),
    "bytes as floats": (
        lambda a: dict(image=to_uint8(a["image"]).float()),
        "image reaches 2.*around .-1, 1., as .*to_float",
    ),
    "whole noise": (lambda a: dict(noise=a["noise"].long()), "must be floating-point"),
    "another size": (lambda a: dict(image=a["image"][..., :4]), "pairs need noise and image"),
    "no batch": (lambda a: dict(noise=a["noise"][0], image=a["image"][0]), "pairs need noise and image"),
    "labels of another length": (lambda a: dict(labels=a["labels"][:4]), "pairs need noise and image"),
    "labels with fractions": (lambda a: dict(labels=a["labels"] + 0.5), "labels must be whole numbers"),
    "a mask as labels": (lambda a: dict(labels=a["labels"] > 0), "labels must be whole numbers"),
    "a negative label": (lambda a: dict(labels=spoil(a["labels"], -1, 0)), "labels must lie in 0..2, found -1..2"),
    "a label too large": (lambda a: dict(num_classes=2), "labels must lie in 0..1, found 0..2"),
    "labels without classes": (lambda a: dict(num_classes=0), "labels must be -1"),
    "classes without labels": (lambda a: dict(labels=None, num_classes=3), "labels must lie in 0..2, found -1..-1"),
    "no shards": (lambda a: dict(shard_size=0), "shard_size = 0"),
}


@pytest.mark.parametrize("wrong", WRONG_PAIRS)
def test_pairs_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, wrong):
    change, said = WRONG_PAIRS[wrong]
    with pytest.raises((FileError, ConfigError), match=said) as e:
        save_pairs(tmp_path / "pairs", **arrays() | dict(first_seed=100) | change(arrays()))
    assert "\n" not in str(e.value) and not (tmp_path / "pairs").exists()
    save_pairs(tmp_path / "pairs", **arrays())
    assert torch.equal(PairDataset(tmp_path / "pairs").batch(range(6))["image"], arrays()["image"])


@pytest.mark.parametrize("harm", ["image", "noise", "label"])
def test_a_folder_whose_values_are_wrong_is_neither_verified_nor_served(tmp_path, harm):
    save_pairs(tmp_path, **arrays(), first_seed=100, shard_size=3)
    path, manifest = tmp_path / "pairs-00001.safetensors", tmp_path / "manifest.json"
    tensors, info = load_tensors(path)
    tensors[harm] = spoil(tensors[harm], 7, 1) if harm == "label" else spoil(tensors[harm], torch.nan, 1)
    save_tensors(path, tensors, info)  # whole, and yet wrong
    said = json.loads(manifest.read_text(encoding="utf-8"))
    said["shards"][1]["sha256"] = sha256_file(path)
    manifest.write_text(json.dumps(said), encoding="utf-8")
    wanted = "labels must lie in 0..2, found 0..7" if harm == "label" else f"{harm}: 1 of 3 .* seeds 104"
    for _ in range(2):  # it is not remembered as good
        assert len(wrong := verify_pairs(tmp_path)) == 1 and re.search(wanted, wrong[0])
        with pytest.raises(FileError, match=wanted):
            PairDataset(tmp_path)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    save_pairs(folder, **arrays(5), shard_size=2)
    return PairDataset(folder)


INDICES = {
    "list": [3, 0, -1],
    "empty list": [],
    "range": range(1, 4),
    "slice": slice(1, None, 2),
    "slice backwards": slice(None, None, -1),
    "empty slice": slice(4, 1),
    "array": np.array([4, 4, 0], dtype=np.uint8),
    "tensor": torch.tensor([2, -5]),
    "mask": np.array([True, False, False, True, True]),
    "mask of nothing": torch.zeros(5, dtype=torch.bool),
    "mask as list": [False, True, False, False, True],
}


@pytest.mark.parametrize("name", INDICES)
def test_pairs_are_chosen_as_numpy_chooses(five, name):
    i, images = INDICES[name], arrays(5)["image"].numpy()
    wanted = images[i if isinstance(i, slice | list) else np.asarray(i)]
    for found in (five.batch(i), five[i]):
        assert np.array_equal(found["image"].numpy(), wanted) and len(found["label"]) == len(wanted)


@pytest.mark.parametrize("i", [0, 4, -5, np.int64(3), np.uint8(2), torch.tensor(1), np.array(2)])
def test_one_pair_is_chosen_by_a_whole_number(five, i):
    assert torch.equal(five[i]["image"], arrays(5)["image"][int(i)]) and five[i]["label"].shape == ()


@pytest.mark.parametrize(
    "i",
    [
        *([True] * n for n in (1, 3, 6)),
        True,
        np.ones((5, 1), bool),
        [0.0, 1.0],
        1.0,
        np.array([1.5]),
        [[0, 1]],
        [[0], [1, 2]],
        None,
        "1",
        ["a"],
        slice(0.5, 2),
        slice(0, 5, 0),
        {"a": 1},
        ...,
    ],
)
def test_other_indices_are_refused_in_one_line(five, i):
    for choose in (five.batch, five.__getitem__):
        with pytest.raises(ConfigError, match="pairs are chosen by|pairs cannot be chosen|a mask of shape") as e:
            choose(i)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("i", [5, -6, [0, 5], [-6], np.array([99]), torch.tensor([0, 7])])
def test_an_index_outside_of_the_pairs_is_named(five, i):
    with pytest.raises(IndexError, match=r"pair (5|-6|99|7) is outside of 0..4"):
        five[i]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    "Checkpoints whose images are not finite, though every weight is."
    folder = tmp_path_factory.mktemp("broken")
    for kind, model in models(0).items():
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1e30)
        save_checkpoint(folder / f"{kind}.safetensors", model)
    return folder


@pytest.mark.parametrize("kind", ["teacher", "get", "vit"])
def test_images_that_are_not_finite_are_neither_saved_nor_measured(broken, network, kind, tmp_path, capsys):
    out, path = tmp_path / "images.png", broken / f"{kind}.safetensors"
    with pytest.raises(SystemExit) as e:
        main(["sample", str(path), "--n", "3", "--seed", "40", "--out", str(out)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and not list(tmp_path.iterdir())
    assert "3 of 3 images are not finite (NaN or infinity), seeds 40, 41, 42" in err
    split = some_bytes(30, 0)
    with pytest.raises(ConfigError, match="20 of 20 images are not finite .* seeds 40, 41, 42, 43, 44, ...$"):
        evaluate(load_checkpoint(path), EvalConfig(samples=20, first_seed=40), split, split, network, "some")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused_when_they_are_loaded(value, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    for kind, model in models(0).items():
        with torch.no_grad():
            next(model.parameters()).flatten()[3] = value
        save_checkpoint(path, model)
        fresh = models(0)[kind]
        for load in (load_checkpoint, partial(load_weights, fresh)):
            with pytest.raises(FileError, match="holds NaN or infinity") as e:
                load(path)
            assert "\n" not in str(e.value) and str(path) in str(e.value)
        with pytest.raises(SystemExit) as e:
            main(["sample", str(path), "--out", str(tmp_path / "x.png")])
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "x.png").exists()


def test_a_student_of_other_classes_than_its_pairs_is_refused(tmp_path):
    save_pairs(tmp_path, **arrays(8))
    pairs, steps = PairDataset(tmp_path), TrainConfig(steps=1, batch_size=4)
    shape = dict(image_size=8, channels=1, dim=16, heads=2, depth=1)
    with pytest.raises(ConfigError, match="the student has 2 classes, the pairs 3"):
        distill(create_model("ViT-digits/2", num_classes=2, **shape), pairs, DistillConfig(), steps)
    for classes in (0, 3):
        distill(create_model("ViT-digits/2", num_classes=classes, **shape), pairs, DistillConfig(), steps)
