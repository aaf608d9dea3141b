"""Models, samplers and losses on a GPU that is not there: shapes alone (FakeTensorMode), where a value on the host is an error."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from get_nb.distillation import DistillConfig, distill_loss
from get_nb.lab.checkpoints import create_model, create_teacher
from get_nb.sampler import euler_sample, heun_sample

GETS = (
    dict(tol=None),
    dict(tol=None, state="normalized"),
    dict(tol=None, injection="adaln"),
    dict(tol=None, injection="none"),
    dict(tol=None, z0="zero", select="last"),
    dict(tol=None, z0="normal"),
    dict(tol=None, solver="anderson"),
    dict(tol=None, solver="broyden"),
    dict(tol=None, weight_norm="spectral"),
    dict(tol=None, shared=False),
)
SHAPE = dict(image_size=8, channels=1)


def on_fake_gpu(f, *args, **kw):
    "Call f where every tensor is made on a GPU that has shapes and no values."
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"):
        f(*args, **kw)


def whole(model):
    "The model, no part of which may have stayed on the CPU."
    parts = itertools.chain(model.named_parameters(), model.named_buffers())
    stayed = [name for name, t in parts if t.device.type != "cuda"]
    assert not stayed, f"on the CPU: {stayed}"
    return model


def inputs(classes):
    return torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64) if classes else None


def sample_and_distil(name, classes, **options):
    model, (noise, labels) = whole(create_model(name, num_classes=classes, **SHAPE, **options)), inputs(classes)
    with torch.no_grad():
        assert model.eval()(noise, labels).device.type == "cuda"
    distill_loss(model.train(), noise, labels, noise, DistillConfig(n_iter=3))


def denoise(variant, classes):
    teacher = whole(create_teacher("unet-digits", num_classes=classes, variant=variant, **SHAPE)).eval()
    noise, labels = inputs(classes)
    with torch.no_grad():
        for image in (
            teacher(noise, torch.ones(4), labels),
            heun_sample(teacher, noise, labels, num_steps=3),
            euler_sample(teacher, noise, labels, num_steps=3),
        ):
            assert image.device.type == "cuda" and image.shape == noise.shape


def waits_for_a_value(f, *args, **kw):
    "f is expected to ask the GPU for a number."
    with pytest.raises(Exception, match="data.dependent|DataDependent|item|Boolean|is_nonzero|local_scalar"):
        on_fake_gpu(f, *args, **kw)


def all_models():
    for classes in (0, 10):
        on_fake_gpu(sample_and_distil, "ViT-digits/2", classes)
        for options in GETS:
            on_fake_gpu(sample_and_distil, "GET-digits/2", classes, **options)


def all_teachers():
    for classes, variant in itertools.product((0, 10), ("ddpmpp", "ncsnpp")):
        on_fake_gpu(denoise, variant, classes)


def what_must_wait():
    "A tolerance needs a value by its nature; a planted one is noticed, too."
    waits_for_a_value(sample_and_distil, "GET-digits/2", 0, tol=1e-3)
    waits_for_a_value(lambda: torch.ones(3).sum().item())
    waits_for_a_value(lambda: bool(torch.ones(3).max() > 0))


def compiled_losses():
    for name, options in (("ViT-digits/2", {}), ("GET-digits/2", dict(tol=None, z0="zero", state="normalized"))):
        torch.manual_seed(0)
        model, (noise, labels) = create_model(name, num_classes=10, **SHAPE, **options).train(), inputs(10)
        image, cfg = torch.randn_like(noise), DistillConfig(n_iter=3)
        torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)

        def loss(m, noise, labels, image):
            return distill_loss(m, noise, labels, image, cfg)  # noqa: B023

        fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
        gradients = []
        for f in (loss, fast):
            model.zero_grad()
            value = f(model, noise, labels, image)
            value.backward()
            gradients.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("part", ["all_models", "all_teachers", "what_must_wait", "compiled_losses"])
def test_a_gpu_that_is_not_there(part):
    "In a process of its own: what torch starts here would keep later tests from forking."
    here = Path(__file__).parent
    env = os.environ | dict(PYTHONPATH=f"{here}{os.pathsep}{here.parent}")
    code = f"import test_fake_cuda as t; t.{part}()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
