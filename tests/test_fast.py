"""The fast path: the same images, gradients and training as the model behind it, and its compile that may fail."""
import pytest
import torch

from get_nb.core import seed_everything, torch_rng
from get_nb.distill import DistillConfig, distill_loss
from get_nb.evaluate import training_cost
from get_nb.fast import Compiled, Fast
from get_nb.models import create_model

SMALL = dict(image_size=8, dim=64, depth=2, heads=4)
GETS = dict(released={}, last=dict(tol=None, select="last", z0="zero"), normalized=dict(state="normalized"), tolerant=dict(tol=30.))


def awake(name="GET-T/2", num_classes=10, **overrides):
    seed_everything(0, name)
    model = create_model(name, num_classes=num_classes, **(SMALL | overrides)).eval()
    for p in model.parameters():        # nothing zero, nothing one: a forgotten bias or gain would show
        if p.requires_grad:
            p.data.add_(.05 * torch.randn_like(p))
    return model


def batch(model, n=5):
    noise = torch.randn(n, 3, 8, 8, generator=torch_rng("fast"))
    return noise, torch.arange(n) % 10 if model.config["num_classes"] else None


@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("how", GETS)
def test_a_fast_get_makes_the_images_of_the_get(how, num_classes):
    model = awake(num_classes=num_classes, **GETS[how])
    noise, labels = batch(model)
    with torch.no_grad():
        image = model(noise, labels)
        z0 = torch.randn(len(noise), model.tokens, 64, generator=torch_rng("z0"))
        assert torch.allclose(Fast(model)(noise, labels), image, atol=1e-5)
        assert torch.allclose(Fast(model)(noise, labels, z0, n_iter=3), model(noise, labels, z0, n_iter=3), atol=1e-5)
    assert (Fast(model, "bf16")(noise, labels) - image).abs().mean() < .05 * image.std()


def test_a_fast_vit_makes_the_images_of_the_vit():
    model = awake("ViT-S/2")
    noise, labels = batch(model)
    with torch.no_grad():
        assert torch.allclose(Fast(model)(noise, labels), model(noise, labels), atol=1e-5)


@pytest.mark.parametrize("supervise", [None, [2, 6]])
def test_the_unrolled_images_and_gradients_are_the_models(supervise):
    model = awake()
    noise, labels = batch(model)

    def run(m):
        model.zero_grad()
        images = m.unrolled(noise, labels, n_iter=6, supervise=supervise)
        sum((x**2).mean() for x in images).backward()
        return torch.stack(images), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    (images, grads), (fast_images, fast_grads) = run(model), run(Fast(model))
    assert torch.allclose(images, fast_images, atol=1e-5) and grads.keys() == fast_grads.keys()
    for name, g in grads.items():
        assert torch.allclose(g, fast_grads[name], atol=1e-6 + 1e-4 * g.abs().max()), name


def test_sampling_in_bf16_sees_a_parameter_that_has_changed():
    model = awake()
    noise, labels = batch(model)
    fast = Fast(model, "bf16")
    before = fast(noise, labels)
    assert torch.equal(before, fast(noise, labels))
    with torch.no_grad():
        model.final_layer.linear.bias += 1
    assert (fast(noise, labels) - before).mean() == pytest.approx(1, abs=.05)


def test_fast_owns_no_parameters_and_leaves_the_state_dict_alone():
    model = awake()
    names = list(model.state_dict())
    fast = Fast(model, "bf16")
    noise, labels = batch(model)
    distill_loss(fast, noise, labels, noise, DistillConfig()).backward()
    assert list(model.state_dict()) == names and all(p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32) for p in model.parameters())
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}


def test_a_training_step_keeps_no_more_memory_than_the_reference_and_half_of_it_in_bf16():
    model = awake(dim=128)
    kept = {p: training_cost(Fast(model, p), DistillConfig(), 32)["activation_mb"] for p in ("float32", "bf16")}
    reference = training_cost(model, DistillConfig(), 32)["activation_mb"]
    assert kept["float32"] <= reference and kept["bf16"] <= .6 * reference, (kept, reference)


def test_the_compiled_model_makes_the_same_images():
    model = awake(tol=None, select="last")
    noise, labels = batch(model)
    fast = Fast(model, compiled=True)
    with torch.no_grad():
        assert torch.allclose(fast(noise, labels), model(noise, labels), atol=1e-5)
    assert fast.iterate.fast is not None, "it did not compile"


def test_without_a_compiler_it_says_so_in_one_line_and_runs(capsys, monkeypatch):
    import torch._inductor.config as inductor
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nonexistent/g++",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)

    def double(x):
        return 2 * x.sin() + 1
    f, x = Compiled(double), torch.arange(64.)
    assert torch.allclose(f(x), double(x)) and torch.allclose(f(x), double(x))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "runs without it" in said and "double" in said
