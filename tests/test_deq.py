"""Gradients of equilibrium models: exact where they claim to be, in constant memory, under data parallelism."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import ROOT
from get_nb.lab.core import ConfigError, seed_everything, torch_rng
from get_nb.distillation import correction_weights
from get_nb.gradients import equilibrium, implicit, supervised, unroll, unroll_constant
from get_nb.lab.graph import gate
from get_nb.distillation import DistillConfig, distill_loss
from get_nb.jacobian import jacobian_penalty, spectral_radius
from get_nb.get import GET, GETConfig
from get_nb.losses import l1
from get_nb.presets import with_options
from get_nb.lab.checkpoints import create_model
from get_nb.solvers import solve

TINY = dict(num_classes=3, image_size=4, channels=1, dim=8, heads=2, depth=1)


def tiny(**how):
    torch.manual_seed(0)
    model = create_model("GET-digits-30/2", **TINY, **how).double().eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.3, generator=torch_rng("w"))
    return model


def batch(n=2):
    return torch.randn(n, 1, 4, 4, generator=torch_rng("e"), dtype=torch.float64), torch.arange(n) % 3


def tanh_map():
    def rand(*s, name):
        return torch.randn(*s, generator=torch_rng(name), dtype=torch.float64)

    W, b = (rand(5, 5, name="W") / 5**0.5 * 0.5).requires_grad_(), rand(2, 5, name="b").requires_grad_()
    return (lambda z, W, b: torch.tanh(z @ W.T + b)), W, b


def test_gradcheck_of_the_implicit_gradient():
    f, W, b = tanh_map()

    def run(W, b):
        def g(z):
            return f(z, W, b)

        with torch.no_grad():
            z, _ = solve(g, torch.zeros(2, 5, dtype=torch.float64), max_iter=60, tol=1e-14)
        return implicit(g, z, tol=1e-13, max_iter=60)

    assert torch.autograd.gradcheck(run, (W, b))


def test_gradcheck_of_a_GET_in_evaluation_through_its_fixed_point():
    model, (noise, labels) = (
        tiny(
            state="normalized",
            gradient="implicit",
            solver="anderson",
            n_iter=200,
            tol=1e-13,
            stop_mode="rel",
            adjoint_iter=200,
            adjoint_tol=1e-12,
            window=20,
        ),
        batch(1),
    )
    with torch.no_grad():
        model.qkv_inj.weight.mul_(3)  # a strong injection makes the map contract
    with sdpa_kernel(SDPBackend.MATH):
        assert model.solve(noise, labels)[1].converged.all()
        assert torch.autograd.gradcheck(lambda e: model(e, labels), noise.requires_grad_(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 2, 5, 11])
@pytest.mark.parametrize("which", [None, (-1,), (1, -2, -1)])
def test_constant_memory_gives_the_gradients_of_unrolling(n, slots, which):
    if which and n < 2 and len(which) > 1:
        which = (1,)
    f, W, b = tanh_map()
    z0 = torch.randn(2, 5, generator=torch_rng("z"), dtype=torch.float64).requires_grad_()
    calls = []

    def g(z):
        calls.append(1)
        return f(z, W, b)

    plain = unroll(g, z0, n, which)

    def loss(states):
        return sum((i + 1) * s.sin().sum() for i, s in enumerate(states))

    wanted = torch.autograd.grad(loss(plain), (z0, W, b))
    got = unroll_constant(g, z0, n, which, tensors=(W, b), slots=slots)
    assert all(torch.equal(a, c) for a, c in zip(plain, got))
    for a, c in zip(torch.autograd.grad(loss(got), (z0, W, b)), wanted):
        assert torch.allclose(a, c, rtol=1e-10, atol=1e-12)


def test_constant_memory_works_backwards_twice_over_one_graph():
    f, W, b = tanh_map()
    out = unroll_constant(lambda z: f(z, W, b), torch.zeros(2, 5, dtype=torch.float64), 7, (-1,), tensors=(W, b))[
        0
    ].sum()
    first = torch.autograd.grad(out, W, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, W)[0])


def test_constant_memory_recomputes_in_the_precision_of_the_forward_pass():
    model, (noise, labels) = tiny().float(), batch()
    grads = []
    for constant in (False, True):
        other = with_options(model, constant_memory=constant)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sum(x.float().square().sum() for x in other.unrolled(noise.float(), labels, n_iter=4))
        model.zero_grad()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (grads[0] - grads[1]).norm() < 5e-3 * grads[0].norm()


def test_a_forgotten_tensor_is_an_error_and_not_a_missing_gradient():
    f, W, b = tanh_map()
    with pytest.raises(ConfigError, match=r"\(5, 5\)"):
        unroll_constant(lambda z: f(z, W, b), torch.zeros(2, 5, dtype=torch.float64), 3, tensors=(b,))


def test_naming_one_output_of_a_node_does_not_hide_its_other_one():
    a = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    p, q = gate(a, 2 * a)
    for f, given in (
        (lambda z: 0.5 * z * p + q, (p,)),
        (lambda z: z * a.chunk(2, 1)[0].repeat(1, 2) + a.chunk(2, 1)[1].repeat(1, 2), ()),
    ):
        with pytest.raises(ConfigError, match="gradient would be lost"):
            unroll_constant(f, torch.zeros(2, 4, dtype=torch.float64), 3, tensors=given)
    u, v = a.chunk(2, 1)

    def f(z):
        return 0.5 * z * u + v

    with pytest.raises(ConfigError, match="gradient would be lost"):
        unroll_constant(f, torch.zeros(2, 2, dtype=torch.float64), 3, tensors=(u,))
    grads = [
        torch.autograd.grad(way[-1].sum(), a, retain_graph=True)[0]
        for way in (
            unroll(f, torch.zeros(2, 2, dtype=torch.float64), 3),
            unroll_constant(f, torch.zeros(2, 2, dtype=torch.float64), 3, tensors=(u, v)),
        )
    ]
    assert torch.allclose(*grads)


def test_every_step_of_training_draws_other_probes_for_the_jacobian_penalty():
    torch.manual_seed(0)
    W = (1.2 * torch.eye(24)).requires_grad_()
    optimizer = torch.optim.Adam([W], 0.02)
    for step in range(300):
        seed_everything("step", step)
        optimizer.zero_grad()
        jacobian_penalty(lambda z: z @ W.T, torch.zeros(4, 24)).backward()
        optimizer.step()
    assert torch.linalg.matrix_norm(W) < 0.1  # with the same probes in every step most directions are never seen
    seed_everything("step", 7)
    once = jacobian_penalty(lambda z: z @ W.T, torch.zeros(4, 24))
    seed_everything("step", 7)
    assert jacobian_penalty(lambda z: z @ W.T, torch.zeros(4, 24)) == once


def test_the_spectral_radius_of_what_vanishes_is_zero():
    nilpotent = torch.diag(torch.ones(5), 1)
    for f in (lambda z: 0 * z, lambda z: z @ nilpotent.T):
        assert spectral_radius(f, torch.ones(2, 6)).max() < 1e-30


def test_a_phantom_gradient_without_a_step_is_refused():
    with pytest.raises(ConfigError, match="phantom_steps = 0"):
        equilibrium(torch.tanh, torch.ones(1, 2), "phantom", phantom_steps=0, max_iter=2)


@pytest.mark.parametrize(
    "way, how",
    [
        ("implicit gradient", dict(gradient="implicit", state="normalized")),
        ("constant memory", dict(constant_memory=True)),
    ],
)
def test_a_second_derivative_is_refused_and_not_wrong(way, how):
    f, W, b = tanh_map()
    start = torch.zeros(2, 5, dtype=torch.float64)
    (noise, labels), model = batch(), tiny(**how)
    states = dict(
        bare=equilibrium(lambda z: f(z, W, b), start, "implicit", solver="anderson", max_iter=30)[0]
        if "implicit" in way
        else unroll_constant(lambda z: f(z, W, b), start, 4, tensors=(W, b))[-1],
        model=model.unrolled(noise.requires_grad_(), labels, n_iter=4)[-1],
    )
    for z, x in zip(states.values(), (b, noise)):
        for loss in (z.sum(), z.square().sum()):  # the gradient that arrives needs no graph, or needs one
            with pytest.raises(ConfigError, match=f"{way}: no second derivative"):
                torch.autograd.grad(loss, x, create_graph=True)
            assert torch.autograd.grad(loss, x, retain_graph=True)[0].abs().sum() > 0


DDP = """
import copy
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from get_nb.lab.checkpoints import create_model
from get_nb.lab.core import torch_rng

dist.init_process_group("gloo")
rank = dist.get_rank()


class Student(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, e, y):
        return sum((x - 1).abs().mean() for x in self.model.unrolled(e, y, n_iter=4))


e, y = torch.randn(4, 1, 4, 4, generator=torch_rng("e")), torch.arange(4) % 3
normalized = dict(gradient="implicit", state="normalized", adjoint_tol=0.0)
for how in (
    dict(),
    dict(constant_memory=True),
    dict(gradient="phantom", phantom_steps=2),
    dict(normalized, solver="anderson"),
    dict(weight_norm="weight"),
    dict(normalized, weight_norm="spectral"),
    dict(injection="adaln"),
    dict(shared=False),
):
    torch.manual_seed(0)
    model = create_model("GET-digits-30/2", num_classes=3, image_size=4, channels=1, dim=8, heads=2, depth=1, **how)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.3, generator=torch_rng("w"))
    alone = Student(copy.deepcopy(model))
    spectral = "spectral" in how.values()  # a forward pass changes its buffers: each process runs its own half
    if spectral:
        alone(e[2 * rank :][:2], y[2 * rank :][:2]).backward()
    else:
        (alone(e[:2], y[:2]) / 2 + alone(e[2:], y[2:]) / 2).backward()
    many = DistributedDataParallel(Student(model))
    many(e[2 * rank :][:2], y[2 * rank :][:2]).backward()
    for (name, a), b in zip(alone.named_parameters(), many.parameters()):
        if not b.requires_grad:
            continue
        if spectral:
            dist.all_reduce(a.grad)
            a.grad /= 2
        assert a.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6), (how, name)
print("same", rank)
"""


def test_a_tensor_that_would_be_counted_twice_is_an_error():
    f, W, b = tanh_map()
    c = (2 * b).clone()
    with pytest.raises(ConfigError, match="gate"):
        unroll_constant(lambda z: f(z, W, b) + c, torch.zeros(2, 5, dtype=torch.float64), 3, tensors=(W, b, c))


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(state="normalized"),
        dict(injection="adaln"),
        dict(injection="none"),
        dict(shared=False),
        dict(weight_norm="weight"),
    ],
)
def test_a_GET_in_constant_memory_has_the_gradients_of_the_plain_one(how):
    (noise, labels), grads = batch(), []
    for constant in (False, True):
        model = tiny(constant_memory=constant, **how)
        sum(x.square().sum() for x in model.unrolled(noise, labels, n_iter=4)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (grads[0] - grads[1]).norm() < 1e-10 * grads[0].norm()


def test_two_processes_get_the_gradients_of_one_in_every_mode(tmp_path):
    (tmp_path / "ddp.py").write_text(DDP, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "ddp.py"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("same") == 2, done.stderr[-3000:]


@pytest.mark.parametrize(
    "how",
    [
        dict(injection="none"),
        dict(injection="adaln"),
        dict(shared=False, z0="normal"),
        dict(weight_norm="weight"),
        dict(weight_norm="spectral"),
        dict(constant_memory=True),
        dict(gradient="phantom", solver="broyden"),
        dict(gradient="implicit", state="normalized", weight_norm="spectral", solver="anderson"),
    ],
)
def test_every_option_trains_all_weights_and_hears_the_noise(how):
    model, (noise, labels) = tiny(**how), batch()
    model.unrolled(noise, labels, n_iter=4)[-1].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(
        p.grad.abs().max() > 0
        for name, p in model.named_parameters()
        if "qkv_inj" in name or "deq_blocks" in name and "weight" in name
    )
    with torch.no_grad():
        assert (model(noise, labels)[0] - model(noise.flip(0), labels)[0]).abs().max() > 1e-6


def test_sampling_ends_where_training_s_last_iteration_does():
    for how in (dict(), dict(state="normalized"), dict(injection="none"), dict(injection="adaln"), dict(shared=False)):
        model, (noise, labels) = tiny(**how), batch()
        with torch.no_grad():
            assert torch.allclose(model(noise, labels), model.unrolled(noise, labels, n_iter=4)[-1])


def test_weights_that_are_not_shared_have_an_end():
    model, (noise, labels) = tiny(shared=False), batch()
    assert len(model.deq_blocks) == 4
    for run in (model, model.unrolled):
        with pytest.raises(ConfigError, match="n_iter = 5"):
            run(noise, labels, n_iter=5)
    with pytest.raises(ConfigError, match="n_iter = 8"):
        with_options(model, n_iter=8)(noise, labels)


def test_a_start_that_a_model_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="starts from the tokens"):
        with_options(tiny(injection="none"), z0_seed=5)


def test_options_of_sampling_share_the_weights_and_leave_the_model_alone():
    model, (noise, labels) = tiny(), batch()
    other = with_options(model, n_iter=1)
    assert next(other.parameters()) is next(model.parameters()) and model.cfg.n_iter == 4
    with torch.no_grad():
        assert torch.equal(other(noise, labels), model(noise, labels, n_iter=1))
    with pytest.raises(ConfigError, match="n_itre"):
        with_options(model, n_itre=1)


def test_the_default_loss_is_the_released_one_to_the_bit():
    model, (noise, labels) = tiny(), batch()
    target = torch.ones_like(noise)
    ours = distill_loss(model, noise, labels, target, DistillConfig(n_iter=4))
    theirs = sum(w * l1(x, target) for w, x in zip([0.8**3, 0.8**2, 0.8, 1.0], model.unrolled(noise, labels, n_iter=4)))
    assert torch.equal(ours, theirs)


def test_the_loss_unrolls_the_released_get_as_often_as_it_is_told():
    torch.manual_seed(0)
    cfg = GETConfig(dim=8, heads=2, depth=1, deq_depth=1, deq_mlp_ratio=4.0)
    model, (noise, labels) = GET(cfg, 3, 4, 1).double(), batch()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    target = torch.ones_like(noise)
    for what, chosen in ((DistillConfig(n_iter=3), (1, 2, 3)), (DistillConfig(n_iter=3, supervise=(1, -1)), (1, 3))):
        torch.manual_seed(1)  # of z0
        ours = distill_loss(model, noise, labels, target, what)
        torch.manual_seed(1)
        images = model.unrolled(noise, labels, n_iter=3)
        assert torch.allclose(ours, sum(0.8 ** (3 - k) * l1(images[k - 1], target) for k in chosen))


@pytest.mark.parametrize(
    "cfg",
    [
        dict(supervise=(-1,)),
        dict(supervise=(1, -1), weights="linear"),
        dict(residual=0.1),
        dict(residual=0.1, jacobian=0.01),
        dict(n_iter_max=8, iterations="random"),
    ],
)
def test_every_option_of_the_loss_has_a_gradient(cfg):
    model, (noise, labels) = tiny(state="normalized"), batch()
    loss = distill_loss(model, noise, labels, torch.zeros_like(noise), DistillConfig(n_iter=4, **cfg))
    loss.backward()
    assert loss.isfinite() and model.deq_blocks[0].mlp.fc1.weight.grad.abs().max() > 0


def test_supervised_iterations_and_weights_refuse_what_means_nothing():
    assert (
        supervised(4) == [1, 2, 3, 4]
        and supervised(4, (-1, 1, 4)) == [1, 4]
        and correction_weights(4, kind="linear") == [0.25, 0.5, 0.75, 1.0]
    )
    for bad in ((5,), (0,), (-5,)):
        with pytest.raises(ConfigError):
            supervised(4, bad)
    with pytest.raises(ConfigError, match="linear"):
        correction_weights(4, kind="linaer")


def test_a_training_step_with_an_implicit_gradient_can_be_counted():
    from get_nb.evaluation import training_cost

    model = create_model(
        "GET-digits-30/2",
        num_classes=10,
        state="normalized",
        gradient="implicit",
        solver="anderson",
        n_iter=3,
        adjoint_iter=2,
    )
    torch.nn.init.normal_(
        model.final_layer.linear.weight, std=0.1
    )  # as initialised it gives no gradient: nothing to solve
    longer = with_options(model, adjoint_iter=6)
    shorter, more = (training_cost(m, DistillConfig(n_iter=3), 2)["train_gflop"] for m in (model, longer))
    assert more > 1.1 * shorter  # each product of the adjoint solver is counted


def test_hooks_of_a_model_that_samples_otherwise_are_its_own():
    model, calls = tiny(), []
    other = with_options(model, n_iter=2)
    other.register_forward_hook(lambda *given: calls.append("other"))
    other.register_forward_pre_hook(lambda *given: calls.append("before"))
    with torch.no_grad():
        model(*batch())
        assert not calls
        other(*batch())
    assert calls == ["before", "other"]


def test_another_solver_samples_without_gradients_and_says_so_with_them():
    model = with_options(tiny(), solver="anderson")
    with pytest.raises(ConfigError, match=r"sample under torch.no_grad\(\)"):
        model(*batch())
    with torch.no_grad():
        assert model(*batch()).isfinite().all()
    with pytest.raises(ConfigError, match="solver = 'andersn'; did you mean 'anderson'"):
        with_options(model, solver="andersn")


def test_a_model_unrolls_as_often_as_its_preset_says():
    model = tiny()
    assert len(model.unrolled(*batch())) == len(model.trajectory(*batch())[1]) == model.cfg.n_iter == 4
    released = GET(GETConfig(dim=8, heads=2, depth=1, n_iter=3), 3, 4, 1)
    assert len(released.unrolled(batch()[0].float(), batch()[1])) == 3


def test_labels_that_all_say_no_class_are_none():
    none = torch.full((2,), -1)
    for name in ("GET-digits-30/2", "ViT-digits/2"):
        size = dict(TINY, num_classes=0)
        model = create_model(name, **size).double().eval()
        with torch.no_grad():
            assert torch.equal(model(batch()[0], none), model(batch()[0]))
            for labels in (torch.tensor([0, -1]), none[:1], none.float()):
                with pytest.raises(ConfigError, match="labels"):
                    model(batch()[0], labels)
    with pytest.raises(ConfigError, match="labels must lie in 0..2"):
        tiny()(batch()[0], none)


@pytest.mark.parametrize("how", [dict(gradient="phantom"), dict(gradient="implicit", state="normalized"), dict()])
def test_supervised_iterations_are_looked_at_whatever_the_gradient(how):
    with pytest.raises(ConfigError, match="9 is not in 1..4"):
        tiny(**how).unrolled(*batch(), n_iter=4, supervise=[9])


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda f, z: equilibrium(f, z, "phantom", solver="anderson", max_iter=2, adjoint=dict(foo=3)), "option 'foo'"),
        (
            lambda f, z: equilibrium(f, z, "phantom", phantom_tau="1", solver="anderson", max_iter=2),
            "phantom_tau = '1'",
        ),
        (lambda f, z: spectral_radius(f, z, n_iter=0), "n_iter = 0"),
        (lambda f, z: jacobian_penalty(f, z, probes=0), "probes = 0"),
    ],
)
def test_options_that_mean_nothing_are_refused_though_nothing_uses_them(call, said):
    with pytest.raises(ConfigError, match=said):
        call(torch.tanh, torch.ones(2, 3))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_model_can_be_mapped_over_its_images():
    noise, labels = batch(3)
    for model, y in ((tiny(), labels), (create_model("GET-digits-30/2", **dict(TINY, num_classes=0)).double(), None)):
        one = torch.func.vmap(lambda e, *c, model=model: model(e[None], *(v[None] for v in c))[0])
        assert torch.allclose(one(noise, *([] if y is None else [y])), model(noise, y), atol=1e-9)


@torch.no_grad()
def test_an_export_refuses_a_tolerance_and_works_without():
    noise, labels = batch()
    with pytest.raises(ConfigError, match="torch.export .* use tol=None"):
        torch.export.export(with_options(tiny(), tol=0.1), (noise, labels))
    model = tiny()
    exported = torch.export.export(model, (noise, labels)).module()
    assert torch.allclose(exported(noise, labels), model(noise, labels))
