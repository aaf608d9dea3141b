"""The fast path: the same images, gradients and training as the model behind it, its compile that may fail, and what it refuses."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import toy
from torch.utils.flop_counter import FlopCounterMode

from get_nb.lab import blocks, choices, kernels
from get_nb.lab.blocks import DTYPES, Plan
from get_nb.lab.store import PairDataset, save_pairs
from get_nb.lab.core import ConfigError, seed_everything, torch_rng
from get_nb.lab.counting import LiveMemory
from get_nb.distillation import DistillConfig, distill, distill_loss
from torch_fidelity.metric_fid import fid_features_to_statistics
from get_nb.evaluation import EvalConfig, generate, measure, training_cost
from get_nb.lab.evaluate import sample_to_file, sampling_formulation, training_formulation
from get_nb.lab.images import to_uint8
from get_nb.lab.fast import Compiled, Fast
from get_nb.lab.kernels import Kernels, LinearFunction, attention, has_one_dnn
from get_nb.lab.files import save_checkpoint
from get_nb.presets import with_options
from get_nb.lab.checkpoints import create_model
from get_nb.precond import EDMPrecond
from get_nb.lab.schedule import TrainConfig, ema_update
from get_nb.lab.state import checkpoints
from get_nb.lab.checkpoints import create_teacher
from get_nb.lab.timing import fastest_product

SMALL = dict(image_size=8, dim=64, depth=2, heads=4)
GETS = dict(
    released={},
    last=dict(tol=None, select="last", z0="zero"),
    normalized=dict(state="normalized"),
    tolerant=dict(tol=30.0),
)


def libraries(dtype):
    "The product libraries that can be called in this precision."
    return ("torch", "onednn") if has_one_dnn(dtype) else ("torch",)


def here(how, precision):
    "These kernels, or torch's products where this processor has no others in this precision."
    if has_one_dnn(DTYPES.get(precision, torch.float32)):
        return how
    return replace(how, forward="torch", backward="torch", packed=False)


def awake(name="GET-T/2", num_classes=10, **overrides):
    seed_everything(0, name)
    model = create_model(name, num_classes=num_classes, **(SMALL | overrides)).eval()
    for p in model.parameters():  # nothing zero, nothing one: a forgotten bias or gain would show
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p))
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
    assert (Fast(model, "bf16")(noise, labels) - image).abs().mean() < 0.05 * image.std()


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


def optimized(model, kind, **how):
    "Two steps of an optimizer on gradients of one."
    optimizer = kind([p for p in model.parameters() if p.requires_grad], 0.03, **how)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


@torch.no_grad()
def lerped(model):
    other = copy.deepcopy(model)
    in_place(other)
    ema_update(model, other, 0.2)


def copied(model):
    for p in model.parameters():
        p.data.copy_(p.data.flip(0) + 0.05)


def permuted(model):
    "The same values at other places: sums and checksums that know no order stay."
    for block in (*model.blocks, *model.deq_blocks):
        block.mlp.fc2.weight.data.copy_(block.mlp.fc2.weight.data.flip(0))


def loaded(model, **how):
    model.load_state_dict({k: 1.1 * v + 0.02 for k, v in model.state_dict().items()}, **how)


@torch.no_grad()
def in_place(model):
    for p in model.parameters():
        p.mul_(1.1).add_(0.02)


def aliased(model):
    "Through another view of the memory, which no version counter sees."
    for p in model.parameters():
        p.detach().numpy()[...] += 0.02


def recast(model):
    model.to(torch.bfloat16).float()  # rounded


def replaced(model):
    for m in model.modules():
        if isinstance(m, torch.nn.Linear):
            m.weight = torch.nn.Parameter(m.weight.detach() * 1.2)


def replaced_block(model):
    model.deq_blocks[0] = copy.deepcopy(model.deq_blocks[0])
    model.deq_blocks[0].mlp.fc1.weight.data.mul_(1.5)


def swapped(model):
    for m in model.modules():
        if isinstance(m, torch.nn.Linear):
            torch.utils.swap_tensors(m.weight, torch.nn.Parameter(m.weight.detach() * 1.2))


def at_once(model):
    torch._foreach_add_([p.data for p in model.parameters()], 0.02)


def moved_positions(model):
    model.pos_embed.data.add_(0.3)


def new_storage(model):
    for p in model.parameters():
        p.data = p.data * 1.1 + 0.02


CHANGES = dict(
    fused_adamw=partial(optimized, kind=torch.optim.AdamW, fused=True),
    foreach_adamw=partial(optimized, kind=torch.optim.AdamW, foreach=True),
    loop_adamw=partial(optimized, kind=torch.optim.AdamW, foreach=False),
    fused_adam=partial(optimized, kind=torch.optim.Adam, fused=True),
    foreach_adam=partial(optimized, kind=torch.optim.Adam, foreach=True),
    fused_sgd=partial(optimized, kind=torch.optim.SGD, fused=True),
    average=lerped,
    copied=copied,
    permuted=permuted,
    loaded=loaded,
    assigned=partial(loaded, assign=True),
    in_place=in_place,
    aliased=aliased,
    recast=recast,
    replaced=replaced,
    replaced_block=replaced_block,
    swapped=swapped,
    at_once=at_once,
    buffer=moved_positions,
    new_storage=new_storage,
)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_in_any_way_are_the_weights_of_the_next_image(change, precision):
    model = awake(state="normalized", depth=1)
    noise, labels = batch(model, 2)
    fast = Fast(model, precision)
    before = fast(noise, labels)
    assert torch.equal(before, fast(noise, labels))
    CHANGES[change](model)
    after = fast(noise, labels)
    assert torch.equal(after, Fast(copy.deepcopy(model), precision)(noise, labels))
    assert not torch.equal(after, before)
    if precision == "float32":
        with torch.no_grad():
            assert torch.allclose(after, model(noise, labels), atol=1e-4)


def test_a_copy_of_a_fast_model_has_weights_of_its_own():
    model = awake(state="normalized", depth=1)
    noise, labels = batch(model, 2)
    fast = Fast(model)
    before, other = fast(noise, labels), copy.deepcopy(fast)
    in_place(other.model)
    assert torch.equal(fast(noise, labels), before) and not torch.equal(other(noise, labels), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_makes_the_images_of_its_weights(dtype):
    model = awake(state="normalized", depth=1).to(dtype)
    noise, labels = batch(model, 2)
    with torch.no_grad():
        wanted = copy.deepcopy(model).float()(noise, labels)
    got = Fast(model)(noise, labels)
    assert got.dtype == torch.float32 and torch.allclose(got, wanted, atol=1e-5)


def test_fast_owns_no_parameters_and_leaves_the_state_dict_alone():
    model = awake()
    names = list(model.state_dict())
    fast = Fast(model, "bf16")
    noise, labels = batch(model)
    distill_loss(fast, noise, labels, noise, DistillConfig()).backward()
    assert list(model.state_dict()) == names and all(
        p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32) for p in model.parameters()
    )
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}


def test_a_training_step_keeps_less_memory_than_the_reference_and_half_of_it_in_bf16():
    model = awake(dim=128)
    kept = {p: training_cost(Fast(model, p), DistillConfig(), 32)["activation_mb"] for p in ("float32", "bf16")}
    reference = training_cost(model, DistillConfig(), 32)["activation_mb"]
    assert kept["float32"] <= 0.8 * reference and kept["bf16"] <= 0.5 * reference, (kept, reference)


LIBRARIES = [(p, t, library) for p, t in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)) for library in libraries(p)]


@pytest.mark.parametrize("dtype, tolerance, library", LIBRARIES)
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("bias, add, gelu", [(True, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("kept", ["again", "kept"])
def test_a_product_has_the_gradients_of_the_formula(dtype, tolerance, library, wide, bias, add, gelu, kept):
    how = Kernels(forward=library, backward=library, gelu=kept)
    n, d, e = (24, 16, 40) if wide else (24, 40, 16)
    x, w, b, a = (
        torch.randn(*s, generator=torch_rng(str(s)), requires_grad=True) for s in ((n, d), (e, d), (e,), (n, e))
    )
    inputs = [x, w, *[b] * bias, *[a] * add]

    def formula():
        return (torch.nn.functional.gelu(x) if gelu else x) @ w.T + b * bias + a * add

    def ours():
        return LinearFunction.apply(
            x.to(dtype), w.to(dtype), b.to(dtype) if bias else None, a.to(dtype) if add else None, gelu, how
        ).float()

    wanted, got = formula(), ours()
    assert (got - wanted).norm() < tolerance * wanted.norm()
    grad = torch.randn(n, e, generator=torch_rng("grad"))
    for ours_, formula_ in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(wanted, inputs, grad)):
        assert (ours_ - formula_).norm() < tolerance * formula_.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("tokens", [16, 400])  # 400: one and a half images at a time
@pytest.mark.parametrize("way", ["fused", "mixed", "formula"])
def test_attention_in_parts_is_attention(dtype, tolerance, tokens, way):
    q, k, v = (torch.randn(5, 4, tokens, 8, generator=torch_rng(n), requires_grad=True) for n in "qkv")
    wanted, got = (
        torch.nn.functional.scaled_dot_product_attention(q, k, v),
        attention(q.to(dtype), k.to(dtype), v.to(dtype), Kernels(attention=way)).float(),
    )
    grad = torch.randn(wanted.shape, generator=torch_rng("grad"))
    for ours, fused in zip(
        (got, *torch.autograd.grad(got, (q, k, v), grad)), (wanted, *torch.autograd.grad(wanted, (q, k, v), grad))
    ):
        assert (ours - fused).norm() < tolerance * fused.norm()


@pytest.mark.slow
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

    f, x = Compiled(double), torch.arange(64.0)
    assert torch.allclose(f(x), double(x)) and torch.allclose(f(x), double(x))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "runs without it" in said and "double" in said


@pytest.fixture(scope="module")
def toy_pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")
    toy.learnable(folder / "pairs")
    return folder


def losses(pairs, folder, **how):
    "The loss of each step of the toy student, trained in a folder of its own."
    folder.mkdir()
    (folder / "pairs").symlink_to(pairs / "pairs")
    ema, history = toy.student(folder, **how)
    assert all(p.isfinite().all() for p in ema.parameters())
    return np.array(history["loss"])


@pytest.fixture(scope="module")
def trained(toy_pairs, tmp_path_factory):
    "Losses of fifty steps of a GET: plain and fast."
    folder = tmp_path_factory.mktemp("trained")
    return {way: losses(toy_pairs, folder / way, fast=way == "fast") for way in ("plain", "fast")}


def test_fifty_fast_steps_in_float32_have_the_losses_of_the_plain_ones(trained, toy_pairs, tmp_path):
    parts = losses(toy_pairs, tmp_path / "parts", fast=True, accumulate=3)
    plain, fast = trained["plain"], trained["fast"]
    assert len(plain) == 50 and plain[-5:].mean() < plain[:5].mean()
    assert np.abs(fast / plain - 1).max() < 1e-4 and np.abs(parts / plain - 1).max() < 1e-4


def test_a_fast_vit_has_the_losses_of_the_plain_one(toy_pairs, tmp_path):
    plain, fast = (
        losses(toy_pairs, tmp_path / str(fast), name="ViT-digits/2", fast=fast, steps=20) for fast in (False, True)
    )
    assert np.abs(fast / plain - 1).max() < 1e-4


@pytest.mark.parametrize("constant_memory", [False, True])
def test_a_student_learns_in_bf16(toy_pairs, tmp_path, constant_memory):
    half = losses(
        toy_pairs,
        tmp_path / "half",
        fast=True,
        precision="bf16",
        lr=3e-3,
        batch_size=32,
        options=dict(constant_memory=constant_memory),
    )
    assert half[-5:].mean() < 0.6 * half[:5].mean()


def test_a_run_goes_on_plain_where_it_stopped_fast(trained, toy_pairs, tmp_path):
    losses(toy_pairs, tmp_path / "mixed", fast=True)
    checkpoints(tmp_path / "mixed/state")[0].unlink()
    ema, history = toy.student(tmp_path / "mixed", fast=False)
    assert history["resumed_at"] == [25] and np.abs(np.array(history["loss"]) / trained["fast"] - 1).max() < 1e-4


def test_two_processes_take_the_fast_steps_of_one(toy_pairs, tmp_path):
    one = losses(toy_pairs, tmp_path / "one", fast=True, steps=10)
    two = tmp_path / "two"
    two.mkdir()
    (two / "pairs").symlink_to(toy_pairs / "pairs")
    here = str(Path(__file__).parent)
    env = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        GET_NB_PROGRESS="off",
        PYTHONPATH=os.pathsep.join([here, *filter(None, sys.path)]),
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "toy", "student", str(two), "fast=true", "steps=10"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    history = toy.student(two, fast=True, steps=10)[1]
    assert history["resumed_at"] == [10] and np.abs(np.array(history["loss"]) / one - 1).max() < 1e-5


@pytest.mark.parametrize(
    "student,loss,train,said",
    [
        ({}, {}, dict(precision="fp16"), "bf16 or float32"),
        ({}, {}, dict(compile="max-autotune"), "mode 'default' or 'graph' only"),
        ({}, dict(residual=0.1), {}, "penalties"),
        (dict(gradient="phantom"), {}, {}, "gradient = 'unrolled' only, not 'phantom'"),
        (dict(injection="adaln"), {}, {}, "injection = 'additive' only, not 'adaln'"),
        (dict(shared=False), {}, {}, "shared = True only, not False"),
        (dict(weight_norm="weight"), {}, {}, "weight_norm = 'none' only"),
    ],
)
def test_what_cannot_be_trained_fast_is_refused_in_one_line_before_training_starts(student, loss, train, said):
    model = create_model("GET-digits/2", num_classes=10, image_size=8, channels=1, **student)
    with pytest.raises(ConfigError) as e:
        training_formulation(model, DistillConfig(**loss), TrainConfig(steps=1, **train))
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_solver_that_the_fast_path_lacks_is_refused_when_sampling():
    with pytest.raises(ConfigError, match="solver"):
        Fast(awake(solver="anderson"))(*batch(awake()))


def test_autocast_outside_does_not_reach_the_fast_path():
    model = awake(tol=None, select="last")
    noise, labels = batch(model)
    image = Fast(model)(noise, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Fast(model)(noise, labels), image) and torch.equal(
            Fast(model).unrolled(noise, labels)[-1], Fast(model).unrolled(noise, labels)[-1].float()
        )


def test_constant_memory_has_the_same_gradients_and_half_the_references_memory():
    model = awake(dim=128)
    noise, labels = batch(model, 8)
    gradients, peak = {}, {}
    for name, run in dict(
        reference=model,
        constant=Fast(with_options(model, constant_memory=True)),
        half=Fast(with_options(model, constant_memory=True, slots=1), "bf16"),
    ).items():
        model.zero_grad()
        with LiveMemory() as live:
            distill_loss(run, noise, labels, noise, DistillConfig()).backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        peak[name] = live.peak
    error = {
        k: ((g - gradients["reference"]).norm() / gradients["reference"].norm()).item() for k, g in gradients.items()
    }
    assert error["constant"] < 1e-5 and error["half"] < 0.1, error
    assert peak["half"] <= 0.5 * peak["reference"], peak


class Pixels:
    "Stands in for a feature network: four pixels."

    kind = "other"

    def __call__(self, images):
        return dict(features=images.flatten(1)[:, :4].double(), logits=torch.zeros(len(images), 10))

    def reference(self, images):
        return dict(statistics=fid_features_to_statistics(self(images)["features"]))


def test_sampling_in_bf16_changes_images_a_little_and_counted_cost_not_at_all(tmp_path):
    student, teacher = awake(), create_teacher("unet-shapes", num_classes=10, image_size=8, base=16).eval()
    noise, labels = batch(student)
    for model in (student, awake("ViT-S/2"), teacher):
        how = dict(num_steps=3) if isinstance(model, EDMPrecond) else {}
        fast = sampling_formulation(model, "bf16")
        assert isinstance(fast, Fast) == (model is not teacher) and sampling_formulation(model, "float32") is None
        image = generate(model, noise, labels, **how)
        other = generate(model, noise, labels, precision="bf16", formulation=fast, **how)
        assert other.dtype == torch.float32 and 0 < (other - image).abs().mean() < 0.05 * image.std()
    results = []
    for p in ("float32", "bf16"):
        cfg, real = EvalConfig(samples=20, precision=p), to_uint8(noise)
        fast = sampling_formulation(student, p)
        results.append(measure(student, cfg, real, real, Pixels(), how={}, only_fd=True, formulation=fast)[0])
    assert "precision" not in results[0] and results[1]["precision"] == "bf16"
    assert all(results[0][k] == results[1][k] for k in ("evaluations", "gmac", "parameters"))
    save_checkpoint(tmp_path / "g.safetensors", student)
    for p in ("float32", "bf16"):
        sample_to_file(tmp_path / "g.safetensors", tmp_path / f"{p}.npz", 4, precision=p)
    a, b = (np.load(tmp_path / f"{p}.npz")["images"].astype(int) for p in ("float32", "bf16"))
    assert 0 < np.abs(a - b).mean() < 8


def test_a_second_derivative_is_refused_and_not_wrong():
    model = awake()
    noise, labels = batch(model, 2)
    image = Fast(model).unrolled(noise.requires_grad_(), labels, n_iter=2)[-1]
    with pytest.raises(ConfigError, match="fast path: no second derivative"):
        torch.autograd.grad(image.sum(), noise, create_graph=True)


def test_no_iterations_are_refused():
    model = awake()
    with pytest.raises(ConfigError, match="n_iter = 0"):
        Fast(model)(*batch(model), n_iter=0)


# What is chosen by measuring.


@pytest.fixture
def choosing(monkeypatch, tmp_path):
    "A machine without answers, on which timing is allowed."
    monkeypatch.setenv("GET_NB_CHOICES", "")
    monkeypatch.setenv("GET_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "_ANSWERS", {})
    return tmp_path


class Clock:
    "Every call of a candidate takes the seconds that are given for it."

    def __init__(self, **seconds):
        self.now, self.calls = 0.0, []
        self.candidates = {n: lambda n=n, s=s: self.run(n, s) for n, s in seconds.items()}

    def run(self, name, seconds):
        self.calls.append(name)
        if seconds is None:
            raise NotImplementedError
        self.now += seconds

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    "seconds, answer",
    [
        (dict(a=1.0, b=0.5, c=0.7), "b"),
        (dict(a=1.0, b=0.99), "a"),  # a gain that noise could make
        (dict(a=1.0, b=None), "a"),
        (dict(a=None, b=5.0), "b"),
        (dict(a=None, b=None), "a"),
    ],
)
def test_the_fastest_candidate_that_there_is_is_chosen(seconds, answer):
    clock = Clock(**seconds)
    assert choices.fastest(clock.candidates, clock)[0] == answer


def test_an_answer_is_kept_per_machine_and_measured_once(choosing, monkeypatch):
    clock = Clock(a=1.0, b=0.1)
    monkeypatch.setattr(choices.fastest, "__defaults__", (clock,))
    for thread_count, measured in ((1, True), (1, False), (2, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=thread_count: n)
        clock.calls.clear()
        choices._ANSWERS.clear()  # as in a new process
        assert choices.choose("question", clock.candidates) == "b" and bool(clock.calls) == measured
    assert len(choices.remembered()) == 2
    choices.forget()
    assert choices.remembered() == {}


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"x": 3}', '{"x": {"q": {}}}', "\x00"])
def test_a_damaged_file_of_answers_is_ignored_with_one_line_and_written_anew(choosing, content, capsys):
    path = choices.choices_file()
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    assert choices.choose("question", Clock(a=1.0, b=None).candidates) == "a"
    assert list(choices.remembered().values())[0]["question"]["answer"] == "a"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/cache"])
def test_where_answers_cannot_be_kept_they_are_measured_again(choosing, monkeypatch, place):
    monkeypatch.setenv("GET_NB_CACHE", place)
    assert choices.choose("question", Clock(a=1.0, b=None).candidates) == "a"


@pytest.mark.parametrize("variable, value", [("WORLD_SIZE", "2"), ("GET_NB_CHOICES", "first")])
def test_nothing_is_timed_where_choices_must_agree(choosing, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    clock = Clock(a=1.0, b=0.1)
    assert choices.choose("question", clock.candidates) == "a" and not clock.calls


def test_nothing_is_timed_while_operators_are_counted(choosing):
    model = awake()
    fast = Fast(model)
    with FlopCounterMode(display=False) as counter:
        fast(*batch(model))
    with FlopCounterMode(display=False) as again:
        Fast(model)(*batch(model))
    assert counter.get_total_flops() == again.get_total_flops() and not choices.remembered() and fast.plan is None


@pytest.mark.parametrize("training", ["bf16", "float32", "reference"])
@pytest.mark.parametrize("kernels", [Kernels(), Kernels(forward="onednn", attention="mixed", gelu="kept", packed=True)])
def test_every_plan_makes_the_same_images_and_gradients(training, kernels):
    kernels = here(kernels, training)
    model = awake()
    noise, labels = batch(model)
    fast = Fast(model, "bf16")
    fast.plan = Plan(training=training, sampling=training, float32=kernels, bf16=kernels)
    close = dict(atol=0.05 if training == "bf16" else 1e-5)
    assert torch.allclose(fast(noise, labels), model(noise, labels), **close)
    images, wanted = (m.unrolled(noise, labels, n_iter=2)[-1] for m in (fast, model))
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x.square().mean(), weights, allow_unused=True) for x in (images, wanted)]
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= (0.1 if training == "bf16" else 1e-4) * b.norm() + 1e-6


def test_the_plan_of_a_checkpoint_holds_whatever_the_machine_has_come_to_think_since(choosing):
    plan = Plan(training="bf16", sampling="float32", float32=Kernels(forward="onednn", gelu="kept"))
    first, other = Fast(awake(), "bf16"), Fast(awake(), "bf16")
    first.plan = plan
    other.restore(json.loads(json.dumps(first.state(4))))
    assert other.plan == plan and other.settle(4) == plan and not choices.remembered()


def test_resumed_without_the_library_it_goes_on_and_says_so(choosing, monkeypatch, capsys):
    fast, other = Fast(awake(), "bf16"), Fast(awake(), "bf16")
    fast.plan = Plan(training="float32", sampling="bf16", float32=Kernels(forward="onednn", packed=True))
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    other.restore(fast.state(4))
    said = capsys.readouterr().out
    assert other.plan.float32 == Kernels() and said.count("\n") == 1 and "oneDNN" in said and "bits may differ" in said


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_without_torchs_private_operators_the_public_ones_are_timed_and_used(choosing, monkeypatch, precision):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    model = awake(depth=1)
    fast, (noise, labels) = Fast(model, precision), batch(model)
    with torch.no_grad():
        image = model(noise, labels)
    assert (fast(noise, labels) - image).abs().mean() < 0.05 * image.std()
    fast.unrolled(noise, labels, n_iter=2)[-1].sum().backward()
    answers = [v["answer"] for v in choices.remembered()[choices.machine()].values()]
    assert answers and not {"onednn", "packed"} & set(answers) and fast.plan.float32.forward == "torch"


@pytest.fixture
def no_bf16(monkeypatch):
    "A processor whose oneDNN refuses bfloat16, as those with AVX2 alone do."
    refuse = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False)
    for name in ("_linear_pointwise", "_reorder_linear_weight"):
        monkeypatch.setattr(refuse, name, NeedsFloat32(getattr(torch.ops.mkldnn, name)), raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", refuse)


class NeedsFloat32:
    def __init__(self, run):
        self.run = run

    def __call__(self, x, *args):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("mkldnn: bf16 path needs the cpu support avx512bw")
        return self.run(x, *args)

    def binary(self, x, *args):
        return self(x, *args) if x.dtype == torch.bfloat16 else self.run.binary(x, *args)


def test_a_processor_without_bfloat16_uses_torchs_products_for_it(choosing, no_bf16):
    model = awake(depth=1)
    fast, (noise, labels) = Fast(model, "bf16"), batch(model)
    with torch.no_grad():
        image = model(noise, labels)
    plan = fast.settle(5)
    assert plan.bf16.forward == plan.bf16.backward == "torch" and not plan.bf16.packed
    fast.plan = replace(plan, training="bf16", sampling="bf16")
    assert (fast(noise, labels) - image).abs().mean() < 0.05 * image.std()
    fast.unrolled(noise, labels, n_iter=2)[-1].sum().backward()
    assert fastest_product(torch.bfloat16, "cpu", 64, 16)[0] == "torch.mm"


def test_a_plan_of_another_processor_is_used_as_far_as_this_one_can(no_bf16, capsys):
    how = Kernels(forward="onednn", gelu="kept", packed=True)
    plan = blocks.available(Plan(training="bf16", sampling="float32", float32=how, bf16=how))
    assert plan.float32 == how and plan.bf16 == Kernels(gelu="kept") and plan.training == "bf16"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "bf16" in said and "float32" not in said


@pytest.mark.parametrize(
    "around", [torch.inference_mode, torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16)]
)
def test_what_surrounds_the_first_call_reaches_neither_the_measurement_nor_the_runs_random_numbers(choosing, around):
    model = awake(depth=1, tol=None, select="last")
    noise, labels = batch(model)
    seen, run = set(), blocks._block_call

    def watched(*args):
        call = run(*args)
        return lambda: (seen.add((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))), call())

    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch, around():
        patch.setattr(blocks, "_block_call", watched)
        Fast(model, "bf16")(noise, labels)
    assert torch.equal(torch.get_rng_state(), before) and seen == {(False, False)}
    for question, answer in choices.remembered()[choices.machine()].items():
        assert len(answer["seconds"]) > 1, question  # every candidate could be run


def test_a_sampling_call_is_timed_as_it_will_be_run(choosing, monkeypatch):
    "With packed weights, if they are the plan."
    packed = []
    monkeypatch.setattr(blocks, "pack_block", lambda w, rows, pack=blocks.pack_block: packed.append(1) or pack(w, rows))
    monkeypatch.setattr(kernels, "choose", lambda question, candidates: list(candidates)[-1])
    model = awake(depth=1)
    assert Fast(model).settle(5).float32.packed and packed


EACH = [Kernels(), Kernels(forward="onednn", backward="onednn"), Kernels(gelu="kept")]
EACH += [Kernels(attention=way) for way in ("mixed", "formula")]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("how", EACH, ids=lambda k: f"{k.forward}-{k.attention}-{k.gelu}")
def test_no_choice_needs_more_memory_in_a_training_step_than_the_reference(how, precision):
    how = here(how, precision)
    model, peak = awake(depth=1), {}
    noise, labels = batch(model, 32)
    fast = Fast(model, precision)
    fast.plan = Plan(training=precision, sampling=precision, float32=how, bf16=how)
    for name, run in dict(reference=model, ours=fast).items():
        model.zero_grad()
        with LiveMemory() as live:
            distill_loss(run, noise, labels, noise, DistillConfig()).backward()
        peak[name] = live.peak
    assert peak["ours"] <= peak["reference"], peak


def test_a_training_that_is_interrupted_ends_the_same_though_the_answers_have_changed(choosing, monkeypatch):
    "The engine's own resume, with a machine that answers otherwise the second time."

    def run(folder, steps, answer):
        monkeypatch.setattr(
            blocks, "choose", lambda question, candidates: answer if answer in candidates else "float32"
        )
        monkeypatch.setattr(kernels, "choose", lambda question, candidates: next(iter(candidates)))
        model = awake()
        fast = Fast(model, "bf16")
        cfg = TrainConfig(steps=6, batch_size=8, checkpoint_every=2)
        stop = dict(probe=lambda net, step: (_ for _ in ()).throw(KeyboardInterrupt) if step == steps else None)
        try:
            return distill(model, pairs, DistillConfig(n_iter=2), cfg, folder, formulation=fast, **stop)[0]
        except KeyboardInterrupt:
            return None

    noise, labels = batch(awake(), 16)
    save_pairs(choosing / "pairs", noise, noise.clamp(-1, 1), labels, num_classes=10)
    pairs = PairDataset(choosing / "pairs")
    whole = run(choosing / "whole", -1, "bf16")
    assert run(choosing / "cut", 4, "bf16") is None
    resumed = run(choosing / "cut", -1, "reference")
    other = run(choosing / "other", -1, "reference")
    same = [torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values())]
    differs = [torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values())]
    assert all(same) and not all(differs)
