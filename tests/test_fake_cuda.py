"""Every model, teacher and sampler on a GPU that is not there: all tensors are where they should be, and the CPU never waits."""

from contextlib import nullcontext

import pytest
import torch
from fake_gpu import FakeGPU, Waits, left_behind
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from get_nb.evaluation import generate, sample_seeds
from get_nb.get import GET, GETConfig
from get_nb.kd import OneStep
from get_nb.lab.fast import Fast
from get_nb.precond import IdealDenoiser
from get_nb.presets import build_model
from get_nb.progressive import ddim_sample
from get_nb.sampler import edm_sigmas, euler_sample, heun_sample
from get_nb.teachers import TEACHERS, build_teacher

SHAPE = dict(image_size=8, channels=1)
SMALL = dict(base=8, mult=(1, 2), blocks=1, attention=(4,))  # of a teacher
HOW = ["built there", "moved"]
OPTIONS = [  # of a GET: each value of each field that changes what is computed
    dict(),
    dict(injection="adaln"),
    dict(injection="none"),
    dict(state="normalized"),
    dict(z0="normal"),
    dict(select="lowest"),
    dict(shared=False, n_iter=2),
    dict(weight_norm="weight"),
    dict(weight_norm="spectral"),
    dict(solver="anderson", gradient="phantom"),
    dict(solver="broyden", gradient="phantom"),
    dict(gradient="phantom", phantom_steps=2, phantom_tau=0.5),
    dict(gradient="implicit", state="normalized"),
    dict(constant_memory=True),
]
CASES = [("ViT-digits/2", {})] + [("GET-digits-30/2", o) for o in OPTIONS]


@pytest.fixture
def gpu():
    with FakeGPU() as g:
        yield g


def build(how, create, *args, **kw):
    "A network on the fake GPU: built there, or built on the CPU and moved."
    if how == "moved":
        return create(*args, **kw).to("cuda")
    with torch.device("cuda"):
        return create(*args, **kw)


def inputs(num_classes, n=2, channels=1, size=8):
    y = torch.zeros(n, dtype=torch.int64, device="cuda") if num_classes else None
    return torch.randn(n, channels, size, size, device="cuda"), y


PLANTED = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if x.max() < 3 else 0,
    "float": lambda x: float(x.mean()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
    "copy to": lambda x: torch.empty(x.shape).copy_(x),
    "to": lambda x: torch.zeros(3).to(x.device),
    "half asynchronous": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    "copy from": lambda x: x.copy_(torch.zeros(x.shape)),
    "scalar": lambda x: torch.tensor(2.0, device=x.device),
    "list": lambda x: torch.as_tensor([1.0, 2.0], device=x.device),
    "index": lambda x: x[torch.tensor([0, 1])],
    "list index": lambda x: x[[0, 1]],
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("name", PLANTED)
def test_this_file_notices_what_waits(gpu, name):
    x = torch.randn(2, 3, device="cuda")
    PLANTED["cpu"](x)  # where waiting is allowed it is
    with gpu.no_wait(), pytest.raises((Waits, DataDependentOutputException, DynamicOutputShapeException)):
        PLANTED[name](x)


def test_this_file_notices_a_tensor_on_the_wrong_device(gpu):
    with pytest.raises(Exception, match="same device"):
        torch.randn(3, device="cuda") + torch.randn(3)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_models_stay_on_the_gpu_and_do_not_wait(gpu, name, options, num_classes, how):
    net = build(how, build_model, name, num_classes=num_classes, **SHAPE, **options)
    assert not left_behind(net)
    noise, labels = inputs(num_classes)
    with gpu.no_wait():
        with torch.no_grad():
            out = [net.eval()(noise, labels)]
        out += net.train().unrolled(noise, labels, n_iter=2)
    assert all(x.device.type == "cuda" and x.shape == noise.shape for x in out)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_stay_on_the_gpu_and_do_not_wait(gpu, name, how):
    num_classes = 0 if "uncond" in name else 3
    net = build(how, build_teacher, name, num_classes=num_classes, **SHAPE, **SMALL)
    assert not left_behind(net)
    noise, labels = inputs(num_classes)
    augment = torch.zeros(2, 9, device="cuda") if hasattr(net.model, "map_augment") else None
    with gpu.no_wait():
        out = net(noise, noise[:, 0, 0, 0].exp(), labels, augment)
    assert out.device.type == "cuda" and out.shape == noise.shape


SAMPLERS = {
    "Heun": lambda net, x, y: heun_sample(net, x, y, num_steps=2),
    "Heun with churn": lambda net, x, y: heun_sample(net, x, y, num_steps=2, S_churn=4.0, S_min=0.05, S_max=50.0),
    "Euler": lambda net, x, y: euler_sample(net, x, y, num_steps=2),
    "DDIM": lambda net, x, y: ddim_sample(net, x, y, edm_sigmas(2, device="cuda")),
    "one step": lambda net, x, y: OneStep(net)(x, y),
    "generate": lambda net, x, y: generate(net, x, y, num_steps=1),
    "generate in bf16": lambda net, x, y: generate(net, x, y, num_steps=1, precision="bf16"),
    "a number as level": lambda net, x, y: net(x, 0.5, y),
    "finite set": lambda net, x, y: net.finite(x, 2.0, y),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_stay_on_the_gpu_and_do_not_wait(gpu, name):
    net = build_teacher("unet-digits", num_classes=3, **SHAPE, **SMALL).to("cuda").eval()
    net.finite = IdealDenoiser(torch.randn(5, 1, 8, 8), torch.arange(5) % 3).to("cuda")
    noise, labels = inputs(3)
    with gpu.no_wait():
        out = SAMPLERS[name](net, noise, labels)
    assert out.device.type == "cuda" and out.shape == noise.shape


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    "name, options", [("ViT-digits/2", {}), ("GET-digits-30/2", {}), ("GET-digits/2", dict(select="lowest"))]
)
def test_the_fast_formulation_stays_on_the_gpu_and_does_not_wait(gpu, name, options, precision):
    fast = Fast(build_model(name, num_classes=3, **SHAPE, **options).to("cuda"), precision)
    noise, labels = inputs(3)
    with gpu.no_wait():
        out = [fast(noise, labels), *fast.unrolled(noise, labels, n_iter=2)]
    assert all(x.device.type == "cuda" and x.shape == noise.shape for x in out)


def test_sampling_from_seeds_waits_for_its_images_alone(gpu, monkeypatch):
    net = build_model("GET-digits-30/2", num_classes=3, **SHAPE).to("cuda")
    monkeypatch.setattr("get_nb.evaluation.finite_bytes", lambda images, *_: images)
    with gpu.no_wait():
        images, labels, _ = sample_seeds(net, range(2))
    assert images.device.type == "cuda" and labels.device.type == "cpu"


@pytest.mark.parametrize("num_classes", [0, 3])
def test_with_a_tolerance_a_model_waits(gpu, num_classes):
    net = build_model("GET-digits-30/2", num_classes=num_classes, **SHAPE, tol=1e-3).to("cuda")
    noise, labels = inputs(num_classes)
    with torch.no_grad(), pytest.raises(DataDependentOutputException):
        net(noise, labels)


@pytest.mark.parametrize("tol, waits", [(0.0, False), (1e-3, True)])
def test_the_released_get_waits_for_its_tolerance_alone(gpu, tol, waits):
    net, (noise, _) = GET(GETConfig(dim=16, heads=2, depth=1, tol=tol), image_size=8, channels=1).to("cuda"), inputs(0)
    with gpu.no_wait(), pytest.raises(DataDependentOutputException) if waits else nullcontext():
        net(noise)
