"""Every method's loss, and the teacher's denoiser, as one graph for torch.compile: the same numbers, the same gradients."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from get_nb.consistency import Consistency, consistency_loss, pseudo_huber
from get_nb.discriminator import (
    ClassifierPyramid,
    Discriminator,
    DiscriminatorConfig,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from get_nb.distillation import DistillConfig, distill_loss
from get_nb.gdd import generate_fakes
from get_nb.gradients import equilibrium
from get_nb.kd import OneStep
from get_nb.lab.classifier import create_classifier
from get_nb.lab.core import seed_everything
from get_nb.lab.fast import Fast
from get_nb.meanflow import create_meanflow, meanflow_loss
from get_nb.precond import edm_loss
from get_nb.presets import build_model
from get_nb.progressive import progressive_loss
from get_nb.sampler import edm_sigmas
from get_nb.solvers import solve
from get_nb.teachers import build_teacher

SHAPE, UNET = dict(image_size=8, channels=1), dict(base=8, mult=(1,), blocks=1, attention=(8,))
TWICE, PENALISED = DistillConfig(n_iter=2), DistillConfig(n_iter=2, residual=0.1)


@dataclass
class Batch:
    "Three images, what belongs to them, and a critic that looks at them."

    x: torch.Tensor
    y: torch.Tensor
    critic: nn.Module
    other: nn.Module


def teacher(num_classes=3):
    return build_teacher("unet-digits", num_classes=num_classes, **SHAPE, **UNET)


def get(name="GET-digits-30/2", **options):
    size = dict(dim=16, heads=2, depth=1) | (dict(deq_depth=1) if "GET" in name else {})
    return build_model(name, num_classes=3, **SHAPE, **size, **options)


def small_classifier():
    return create_classifier(width=4, num_classes=3, **SHAPE).eval()


class OneMap(nn.Module):
    "A pyramid of one map."

    def forward(self, x):
        """The image itself.

        Args:
            x: (B, C, H, W)

        Returns:
            list of one map
        """
        return [x]


def critic(pyramid):
    return Discriminator([pyramid], torch.zeros(1, 1, 8, 8), DiscriminatorConfig(dim=4, width=4), 3)


def distance(net, b, cfg=TWICE):
    return distill_loss(net, b.x, b.y, b.x.flip(0), cfg)


def against_critic(net, b):
    return generator_loss(b.critic(generate_fakes(net, b.x, b.y, 2), b.y))


def halving(net, b):
    place, sigmas = torch.arange(3) % 2, edm_sigmas(4)
    return progressive_loss(net, b.other, b.x, b.y, b.x, place, sigmas, "truncated")


def neighbours(net, b):
    place, sigmas = torch.arange(3) % 2, edm_sigmas(4)[:-1]
    return consistency_loss(net, b.other, b.x, b.y, b.x, place, sigmas, pseudo_huber)


class Velocity(nn.Module):
    "MeanFlow's interface on one convolution of the mixture and its two times."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3, padding=1)

    def velocity(self, z, t, r, labels):
        """An average velocity.

        Args:
            z: (B, 1, H, W)
            t: (B,)
            r: (B,)
            labels: not used

        Returns:
            (B, 1, H, W)
        """
        times = [v.view(-1, 1, 1, 1).expand_as(z) for v in (t, r)]
        return torch.tanh(self.conv(torch.cat([z, *times], 1)))


def average_velocity(net, b):
    t, r = torch.tensor([0.9, 0.7, 0.5]), torch.tensor([0.2, 0.7, 0.1])
    return meanflow_loss(lambda z, t, r: net.velocity(z, t, r, b.y), b.x, b.x.flip(0), t, r)["loss"]


LOSSES = {  # the network that learns, and its loss
    "teacher": (teacher, lambda net, b: edm_loss(net, b.x, b.y, b.x.flip(0), b.x[:, 0, 0, 0], -1.2, 1.2)),
    "classifier": (small_classifier, lambda net, b: F.cross_entropy(net(b.x), b.y)),
    "GET, phantom gradient and penalty": (lambda: get(gradient="phantom"), lambda net, b: distance(net, b, PENALISED)),
    "GET, fast": (get, lambda net, b: distance(Fast(net), b)),
    "ViT": (lambda: get("ViT-digits/2"), distance),
    "KD": (lambda: OneStep(teacher()), distance),
    "progressive": (teacher, halving),
    "consistency": (lambda: Consistency(teacher()), neighbours),
    "MeanFlow, one convolution": (Velocity, average_velocity),
    "GDD, critic": (
        lambda: critic(ClassifierPyramid(small_classifier())),
        lambda net, b: discriminator_loss(net(b.x, b.y), net(b.x.flip(0), b.y)),
    ),
    "GDD, generator": (lambda: OneStep(teacher()), against_critic),
    "hybrid": (get, lambda net, b: against_critic(net, b) + 0.5 * distance(net, b)),
}


def value_and_gradients(f, net, batch):
    "What f returns, and what its sum's gradient is for every weight that it reaches."
    net.zero_grad()
    value = f(net, batch)
    value.square().sum().backward()
    return [value.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_compiles_to_one_graph(name):
    create, loss = LOSSES[name]
    seed_everything("one graph")
    others = critic(OneMap()).eval(), teacher().requires_grad_(False)
    batch, net = Batch(torch.randn(3, 1, 8, 8), torch.arange(3), *others), create()
    for p in net.parameters():  # nothing is zero at the start
        p.data.add_(0.05 * torch.randn_like(p))
    net.eval()  # neither dropout nor the power iteration of a spectral norm moves between the two
    torch._dynamo.reset()
    eager = value_and_gradients(loss, net, batch)
    compiled = value_and_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), net, batch)
    assert len(eager) > 2 and eager[0].abs().sum() > 0
    largest = max(a.abs().max() for a in eager)  # a slope that is zero but for rounding is as far off as the largest is
    for a, b in zip(eager, compiled, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * (1 + largest))


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_denoiser_compiles_to_one_graph(num_classes):
    seed_everything("denoiser")
    net, x, y = teacher(num_classes).eval(), torch.randn(3, 1, 8, 8), torch.arange(3) if num_classes else None
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    levels = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)  # as a sampler gives them
    assert torch.allclose(compiled(x, levels, y), net(x, levels, y), rtol=1e-4, atol=1e-5)


def both(net, b):
    x, y = solve(lambda x, y: (torch.tanh(y), torch.cos(x)), (b.x, b.x), solver="anderson", max_iter=3)[0]
    return x + y


ANY_BATCH = {  # what is called with batches of several sizes
    "GET": (get, lambda net, b: net(b.x, b.y)),
    "GET, Anderson": (lambda: get(solver="anderson"), lambda net, b: net(b.x, b.y)),
    "GET, unconditional": (lambda: build_model("GET-digits/2", **SHAPE), lambda net, b: net(b.x)),
    "ViT": (lambda: get("ViT-digits/2"), lambda net, b: net(b.x, b.y)),
    "teacher": (teacher, lambda net, b: net(b.x, 1.5, b.y)),
    "teacher, levels": (teacher, lambda net, b: net(b.x, 1 + b.x[:, 0, 0, 0] ** 2, b.y)),
    "two states": (nn.Module, both),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ANY_BATCH)
def test_another_batch_size_is_no_other_graph(name):
    create, call = ANY_BATCH[name]
    net, counter = create().eval(), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for n in (2, 3, 4, 5, 7):
        b = Batch(torch.randn(n, 1, 8, 8), torch.arange(n) % 3, None, None)
        assert torch.allclose(compiled(net, b), call(net, b), atol=1e-4)
    assert counter.frame_count <= 2  # the second one is of any size


def implicit(net, x):
    z, _ = equilibrium(lambda z: torch.tanh(net(z) + x), torch.zeros_like(x), "implicit", max_iter=5)
    return z.sum()


def test_a_compiler_has_no_forward_mode_derivative_of_a_group_norm():
    net = create_meanflow("unet-digits", num_classes=3, **SHAPE, **UNET)
    b = Batch(torch.randn(3, 1, 8, 8), torch.arange(3), None, None)
    assert average_velocity(net, b).isfinite()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="group_norm"):
        torch.compile(average_velocity, fullgraph=True, backend="aot_eager")(net, b)


CALLS_AUTOGRAD = {  # what calls autograd inside of the loss, which fullgraph refuses
    "R1": lambda net, x: r1_penalty(lambda x, _: [net(x.flatten(1))], x.view(2, 1, 2, 2)),
    "implicit gradient": implicit,
}


@pytest.mark.parametrize("name", CALLS_AUTOGRAD)
def test_what_calls_autograd_inside_is_no_single_graph(name):
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    net.weight.data.mul_(0.1)
    f = CALLS_AUTOGRAD[name]
    assert f(net, x).isfinite()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="autograd"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(net, x)
